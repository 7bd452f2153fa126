"""Starting a run from other weights fits them as loading does: one road for both."""

import dataclasses

import pytest
import timm
import torch
from networks import SMALL, distance, images, module_state, prefixed, torchvision_resnet
from test_load import mlp
from torch import nn

from moco.algorithm.encoder import build_encoder
from moco.checkpoints.load import load_encoder, restore_pretraining
from moco.checkpoints.matching import take
from moco.config import ModelConfig, UserError

IMAGENET = dataclasses.replace(SMALL, stem="imagenet")


def fresh_module(model: ModelConfig, channels: int = 3, size: int = 32):
    """Return a fresh encoder and a module's state dict made of it."""
    encoder = build_encoder(model, channels, size)
    state = prefixed("query_encoder.", encoder.state_dict())
    return encoder, state | prefixed("key_encoder.", encoder.state_dict())


def start(path, model: ModelConfig, channels: int = 3, size: int = 32, **options):
    """Start a run's encoder from a file; returns it and the report."""
    encoder, fresh = fresh_module(model, channels, size)
    state, report = restore_pretraining(path, fresh, encoder.backbone, **options)
    encoder.load_state_dict(take(state, "query_encoder."))
    return encoder.eval(), report


# OpenSelfSup and mmselfsup before 1.0


@pytest.mark.parametrize(("neck", "head"), [("mlp", mlp()), ("fc", nn.Linear(128, 16))])
def test_openselfsup_gives_both_encoders_heads_and_queue(tmp_path, neck, head):
    query, key = torchvision_resnet(0), torchvision_resnet(1)
    state = prefixed("encoder_q.0.", query.state_dict())
    state |= prefixed("backbone.", query.state_dict())  # the same module under a second name
    state |= prefixed(f"encoder_q.1.{neck}.", head.state_dict())
    state |= prefixed("encoder_k.0.", key.state_dict())
    state |= prefixed(f"encoder_k.1.{neck}.", head.state_dict())
    queue = nn.functional.normalize(torch.randn(16, 64), dim=0)
    state |= {"queue": queue, "queue_ptr": torch.tensor([5])}
    torch.save({"meta": {"epoch": 200}, "state_dict": state}, tmp_path / "a.pth")
    loaded = load_encoder(tmp_path / "a.pth")
    assert loaded.layout == "openselfsup" and loaded.model.queue_size == 64
    together = nn.Sequential(query, head).eval()
    assert distance(together, lambda x: loaded.head(loaded.backbone(x)), images()) < 1e-5
    other = load_encoder(tmp_path / "a.pth", "key")
    assert distance(key, other.backbone, images()) < 1e-5
    model = dataclasses.replace(IMAGENET, head="mlp" if neck == "mlp" else "linear")
    fresh, _, _ = module_state(model, seed=7)
    filled, report = restore_pretraining(tmp_path / "a.pth", fresh)
    assert "openselfsup layout, backbone: both encoders" in report and "queue of 64x16" in report
    assert torch.equal(filled["queue.keys"], queue.T)


# What loading fits, starting fits as well


def test_positions_are_resampled_to_the_runs_image_size(tmp_path):
    network = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    encoder, report = start(tmp_path / "a.pth", ModelConfig(backbone="test_vit"), size=96)
    assert "positions resampled to 6x6" in report
    loaded = load_encoder(tmp_path / "a.pth", backbone="test_vit", image_size=96)
    assert distance(loaded.backbone, encoder.backbone, images(3, 96)) == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_rgb_weights_are_fitted_to_other_channels_as_timm_does(tmp_path, channels):
    network = torchvision_resnet()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    encoder, report = start(tmp_path / "a.pth", IMAGENET, channels)
    assert f"first convolution fitted from 3 channels to {channels}" in report
    wanted = timm.models.adapt_input_conv(channels, network.conv1.weight)
    assert torch.equal(encoder.backbone.conv1.weight, wanted)
    grey = images(1)
    if channels == 1:  # the same images in grey give the same features
        colour = grey.repeat(1, 3, 1, 1)
        assert distance(lambda x: network(colour), encoder.backbone, grey) < 1e-5


def test_harmless_extras_are_left_out_on_both_roads(tmp_path):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    state = network.state_dict() | {"mask_token": torch.zeros(1, 1, 64)}
    torch.save(state, tmp_path / "a.pth")
    assert (
        "left out: mask_token (1)" in load_encoder(tmp_path / "a.pth", backbone="test_vit").report
    )
    _, report = start(tmp_path / "a.pth", ModelConfig(backbone="test_vit"))
    assert "missing: none" in report


def test_a_part_is_taken_only_where_that_is_allowed(tmp_path):
    state = dict(torchvision_resnet().state_dict())
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="only in part.*or give --allow_partial"):
        start(tmp_path / "a.pth", IMAGENET)
    encoder, report = start(tmp_path / "a.pth", IMAGENET, allow_partial=True)
    assert "missing: layer2.0.conv1.weight" in report
    assert torch.equal(encoder.backbone.conv1.weight, state["conv1.weight"])
