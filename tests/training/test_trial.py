"""The trial before the first step: what a backbone cannot take is one line, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import run_tiny, tried
from steps import MODEL
from torch import nn

from moco.algorithm.encoder import Encoder, build_encoder
from moco.config import DataConfig, ModelConfig, TrainConfig, UserError
from moco.training.trial import check_encoder

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture(autouse=True)
def anew():
    """Forget the networks that other tests have tried."""
    tried.clear()


def settings(backbone: str, size: int) -> TrainConfig:
    model = ModelConfig(backbone=backbone, bn_splits=2, embedding_dim=8)
    return TrainConfig(model=model, data=DataConfig(image_size=size))


@pytest.mark.parametrize(
    ("backbone", "size", "words"),
    [
        ("densenet121", 16, "cannot take images of data.image_size 16 (Given input size: (512x1x1"),
        ("vit_tiny_patch16_224", 30, "the last 14 rows and columns would never reach it: take 16 "),
        ("vit_tiny_patch16_224", 12, "would never reach it: take 16"),
        ("swin_tiny_patch4_window7_224", 30, "take 28 or 32"),
    ],
)
def test_a_size_that_a_backbone_cannot_take_is_one_line(backbone, size, words):
    config = settings(backbone, size)
    with pytest.raises(UserError) as error:
        check_encoder(build_encoder(config.model, 3, size), config)
    assert words in str(error.value) and f"data.image_size {size}" in str(error.value)
    assert backbone in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [4, 8, 9, 28, 31])
def test_views_of_any_size_go_through_a_patch_stem(size):
    config = settings("resnet10t", size)
    config.model.stem = "patch"
    check_encoder(build_encoder(config.model, 3, size), config)


class Own(nn.Module):
    """Has a weight whose norm is followed by a buffer, and BatchNorm."""

    def __init__(self, follow):
        super().__init__()
        conv = nn.Conv2d(3, 8, 3)
        conv = nn.utils.parametrizations.spectral_norm(conv) if follow else conv
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize(("chunks", "follow"), [(2, True), (1, True), (2, False)])
def test_what_changes_in_each_pass_goes_in_no_chunks(chunks, follow):
    config = settings("own:Own", 16)
    config.data.chunks = chunks
    encoder = build_encoder(config.model, 3, 16, Own(follow))
    if chunks == 2 and follow:
        with pytest.raises(UserError, match=r"changes its .*spectral_norm does.* set it to 1$"):
            check_encoder(encoder, config)
    else:
        check_encoder(encoder, config)


class Cached(nn.Module):
    """Makes a buffer for each size of images, when it meets the first one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        name = f"mask_{len(images)}"
        if name not in self._buffers:
            self.register_buffer(name, images.new_ones(()))
        return self.layers(images * getattr(self, name))


def test_a_backbone_may_make_buffers_by_need():
    config = settings("own:Cached", 16)
    config.data.chunks = 2
    check_encoder(build_encoder(config.model, 3, 16, Cached()), config)


def test_a_run_is_refused_before_it_makes_a_directory(images):
    vit = ["--model.backbone", "test_vit", "--model.stem", "imagenet", "--model.width", "1"]
    with pytest.raises(UserError, match="data.image_size 20 is no multiple of the 16 pixels"):
        run_tiny(images, *vit, "--data.image_size", "20")
    assert not Path("run").exists()


def test_a_trial_leaves_weights_statistics_and_random_numbers_as_they_are():
    config = settings("resnet10t", 32)
    encoder = build_encoder(config.model, 3, 32).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    drawn = torch.random.get_rng_state()
    check_encoder(encoder, config)
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    assert torch.random.get_rng_state().equal(drawn) and not encoder.training
    assert all(p.grad is None and p.device.type == "cpu" for p in encoder.parameters())


class Asks(nn.Flatten):
    """A layer that looks at its numbers, which the meta device has not."""

    def forward(self, images):
        return super().forward(images) * (1 if float(images.sum()) == 0 else 2)


def test_a_network_that_only_real_tensors_can_try_is_tried_with_them():
    config = TrainConfig(model=MODEL, data=DataConfig(image_size=4))
    check_encoder(Encoder(Asks(), nn.Linear(48, 2), 48), config)
    with pytest.raises(UserError, match="mat1 and mat2"):
        check_encoder(Encoder(Asks(), nn.Linear(49, 2), 49), config)
