"""Faults of torch's CPU kernels that a network is kept away from."""

import copy

import pytest
import timm
import torch
from processes import finish, start
from torch import nn
from torch.nn.functional import conv2d

from moco.algorithm.encoder import build_backbone
from moco.config import ModelConfig

STRIDED_STEM = """
import timm
import torch
from moco.algorithm.encoder import build_backbone
from moco.config import ModelConfig
network, _ = build_backbone(ModelConfig(backbone="repvgg_a0"), 3, 32)
network.to(memory_format=torch.channels_last)
images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
for _ in range(2):
    network(images).sum().backward()
print(sum(float(p.grad.abs().sum()) for p in network.parameters()) > 0)
"""


def test_strided_stems_of_one_pixel_train_in_channels_last_on_a_cpu(tmp_path):
    """Without more, torch 2.14.1 ends the process in the first backward pass."""
    script = tmp_path / "strided.py"
    script.write_text(STRIDED_STEM)
    code, out, err = finish(start(script=script))
    assert (code, out) == (0, "True\n"), err


def test_strided_stems_of_one_pixel_compute_what_they_did():
    theirs = timm.create_model("repvgg_a0", num_classes=0).eval()
    ours, _ = build_backbone(ModelConfig(backbone="repvgg_a0"), 3, 32)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(ours).eval()(images), theirs(images))


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_a_strided_convolution_over_one_pixel_has_its_gradient_in_bf16(form):
    """On a CPU that multiplies bf16, torch 2.11 to 2.15 return what lay in memory."""
    backbone, _ = build_backbone(ModelConfig("resnet18", width=0.25), 3, 16)
    layer = backbone.layer4[0].conv1.to(memory_format=form)
    assert layer.stride == (2, 2)
    for seed in range(10):
        maps = torch.randn(
            8, layer.in_channels, 1, 1, generator=torch.Generator().manual_seed(seed)
        )
        layer.zero_grad()
        left = [torch.full_like(layer.weight, float("nan"), dtype=torch.bfloat16)] * 8
        del left
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(maps)
        out.float().square().sum().backward()
        weight = nn.Parameter(layer.weight.detach().clone())
        expected = conv2d(maps, weight, stride=2, padding=1)
        expected.square().sum().backward()
        assert out.shape == expected.shape
        torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
        apart = (layer.weight.grad - weight.grad).abs().max() / weight.grad.abs().max()
        assert apart < 0.05


def test_maps_of_one_pixel_are_padded_in_training_alone():
    """An export knows nothing of it, and fp32 needs none of it."""
    backbone, _ = build_backbone(ModelConfig("resnet18", width=0.25), 3, 16)
    layer, seen = backbone.layer4[0].conv1, []
    layer.register_forward_hook(lambda layer, inputs, out: seen.append(tuple(inputs[0].shape[2:])))
    pixel, maps = torch.randn(4, layer.in_channels, 1, 1), torch.randn(4, layer.in_channels, 3, 3)
    layer(pixel)
    with torch.autocast("cpu", torch.bfloat16):
        layer(pixel), layer(maps)
        layer.eval()(pixel)
    assert seen == [(1, 1), (2, 2), (3, 3), (1, 1)]
