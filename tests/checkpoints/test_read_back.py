"""Networks come back as they were trained: ours of any architecture, and lightly's own ResNet."""

import copy
import dataclasses

import pytest
import timm
import torch
from networks import distance, images, prefixed, randomise, torchvision_resnet
from test_load import STAGES, numbered
from torch import nn

from moco.algorithm.encoder import build_encoder
from moco.checkpoints.load import load_encoder
from moco.checkpoints.start import restore_pretraining
from moco.config import DataConfig, ModelConfig, TrainConfig, UserError

# Names with `.shortcut.` in them, fixed sizes that no position shows, and sizes of other multiples.
NETWORKS = {
    "ghostnet_100": 64,
    "gernet_s": 64,
    "seresnext26ts": 64,
    "eca_halonext26ts": 256,
    "botnet26t_256": 64,
    "test_coatnet": 64,
    "test_maxvit": 96,
    "efficientformer_l1": 224,
    "crossvit_9_240": 240,
    "levit_128s": 64,
    "mobilevit_xxs": 64,
    "swin_s3_tiny_224": 64,
    "deit_tiny_distilled_patch16_224": 48,
    "test_vit2": 80,
    "resnet18d": 64,
}


@pytest.mark.parametrize("name", [name for name in NETWORKS if timm.is_model(name)])
def test_every_network_that_trains_reads_back(tmp_path, name):
    size, model = NETWORKS[name], ModelConfig(backbone=name, queue_size=8, embedding_dim=8)
    encoder = randomise(build_encoder(model, 3, size))
    state = prefixed("query_encoder.", encoder.state_dict())
    config = TrainConfig(model=model, data=DataConfig(image_size=size))
    content = {"state_dict": state, "config": dataclasses.asdict(config)}
    torch.save(content, tmp_path / "last.ckpt")
    loaded = load_encoder(tmp_path / "last.ckpt")
    assert loaded.data["image_size"] == size and "missing: none" in loaded.report
    assert distance(encoder, lambda x: loaded.head(loaded.backbone(x)), images(3, size)) == 0


# lightly's ResNetGenerator (lightly/models/resnet.py): its first ReLU is a function, so that the
# nn.Sequential of its children, which the tutorial trains, has none.


def lightly_tutorial(with_relu: bool) -> tuple[nn.Module, dict]:
    network = copy.deepcopy(torchvision_resnet(4, 1))
    nn.init.zeros_(network.bn1.bias)  # so that the ReLU cuts half of the numbers off
    children = ["conv1", "bn1", *(["relu"] if with_relu else []), *STAGES]
    parts = [getattr(network, child) for child in children]
    layers = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    state = prefixed("backbone.", numbered(network, children))
    return layers, {name.replace("downsample", "shortcut"): v for name, v in state.items()}


@pytest.mark.parametrize("with_relu", [False, True])
def test_lightlys_tutorial_is_built_without_the_relu_that_it_lost(tmp_path, with_relu):
    network, state = lightly_tutorial(with_relu)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    loaded = load_encoder(tmp_path / "a.ckpt")
    assert loaded.layout == "lightly"
    assert distance(network, loaded.backbone, images()) < 2e-6
    other, _ = lightly_tutorial(not with_relu)
    assert distance(network, other, images()) > 2e-5  # 1.6e-4 and more in five draws


def test_lightlys_own_resnet_as_a_whole_has_its_relu(tmp_path):
    network = torchvision_resnet(4, 1)
    state = prefixed("backbone.", network.state_dict())
    state = {name.replace("downsample", "shortcut"): value for name, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert distance(network, load_encoder(tmp_path / "a.ckpt").backbone, images()) < 1e-5


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_numbered_network_with_a_patch_stem_reads_back(tmp_path, gap):
    """Of children with and without tensors; what stood in the gap decides on the ReLU alone."""
    network, without = copy.deepcopy(torchvision_resnet()), ["relu", "maxpool"][:gap]
    network.conv1 = nn.Conv2d(3, 16, 4, stride=2, padding=1, bias=False)
    network.maxpool = nn.Identity()
    nn.init.zeros_(network.bn1.bias)  # so that the ReLU cuts half of the numbers off
    children = ["conv1", "bn1", *without, *STAGES]
    parts = [getattr(network, child) for child in children]
    layers = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.save(prefixed("backbone.", numbered(network, children)), tmp_path / "a.ckpt")
    loaded = load_encoder(tmp_path / "a.ckpt")
    assert (loaded.model.stem, loaded.data["image_size"]) == ("patch", 32)
    assert distance(layers, loaded.backbone, images()) < 2e-6


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_gaps_that_fit_no_resnet_are_refused_with_the_reason(tmp_path, gap):
    children = ["conv1", "bn1", *["none"] * gap, *STAGES]
    state = prefixed("backbone.", numbered(torchvision_resnet(), children))
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"between the children 1 and {2 + gap} of its nn.Seq"):
        load_encoder(tmp_path / "a.ckpt")


def test_a_run_does_not_start_from_a_network_that_it_cannot_build(tmp_path):
    _, state = lightly_tutorial(False)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    model = ModelConfig(backbone="resnet18", stem="cifar", width=0.25)
    encoder = build_encoder(model, 3, 32)
    fresh = prefixed("query_encoder.", encoder.state_dict())
    fresh |= prefixed("key_encoder.", encoder.state_dict())
    with pytest.raises(UserError, match="with no ReLU after its first BatchNorm"):
        restore_pretraining(tmp_path / "a.ckpt", fresh, encoder.backbone)
    filled, report = restore_pretraining(tmp_path / "a.ckpt", fresh, encoder.backbone, True)
    assert "not kept: no ReLU" in report
    name = "backbone.layer1.0.conv1.weight"
    assert torch.equal(filled[f"query_encoder.{name}"], state["backbone.2.0.conv1.weight"])
    assert torch.equal(filled[f"key_encoder.{name}"], filled[f"query_encoder.{name}"])
