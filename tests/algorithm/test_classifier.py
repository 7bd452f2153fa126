"""A backbone of the user's own that still has its classifier is warned of, and no other."""

from collections import OrderedDict

import pytest
import timm
import torchvision
from torch import nn

from moco.algorithm.own_backbone import own_backbone, warn_of_classifier
from moco.config import ModelConfig


def headless():
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network


class Projecting(nn.Module):
    """Its layers called `fc` are no classifiers: a layer to features follows them."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(3 * 32 * 32, 6)})
        self.features = nn.Linear(6, 6)

    def forward(self, images):
        return self.features(self.block["fc"](images.flatten(1)))


KEPT = {
    "torchvision": (torchvision.models.resnet18, "set its fc to torch.nn.Identity()"),
    "sequence": (torchvision.models.mobilenet_v3_small, "set its classifier to torch"),
    "wrapped": (lambda: nn.Sequential(torchvision.models.resnet18()), "set its 0.fc to torch"),
    "timm": (lambda: timm.create_model("test_resnet"), "num_classes=0"),
}
NONE = {
    "torchvision": headless,
    "timm": lambda: timm.create_model("test_resnet", num_classes=0),
    "projecting": Projecting,
    "maps": lambda: nn.Conv2d(3, 8, 3),
    "sequence": lambda: nn.Sequential(
        OrderedDict(flat=nn.Flatten(), fc=nn.Linear(3072, 6), more=nn.Linear(6, 6))
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_classifier_that_is_left_is_warned_of(kind):
    build, remedy = KEPT[kind]
    warning = warn_of_classifier(*own_backbone(build(), ModelConfig(), 3, 32))
    assert warning.startswith("warning: the features of the backbone ") and remedy in warning
    assert "are the 1000 outputs of" in warning


@pytest.mark.parametrize("kind", NONE)
def test_features_of_other_layers_are_not_warned_of(kind):
    assert not warn_of_classifier(*own_backbone(NONE[kind](), ModelConfig(), 3, 32))
