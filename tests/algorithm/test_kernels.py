"""Faults of torch's CPU kernels that a network is kept away from."""

import copy
import pickle

import pytest
import timm
import torch
from processes import finish, start
from torch import nn
from torch.nn.functional import conv2d

from moco.algorithm.encoder import _spare_kernels, build_backbone, in_float32
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig

STRIDED_STEM = """
import timm
import torch
from moco.algorithm.encoder import _spare_kernels, build_backbone, in_float32
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig
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


# Channels, kernel, stride and padding of a convolution, and the side of what it sees.
SINGLE = [
    (32, 3, 2, 1, 1),
    (32, 5, 2, 2, 1),
    (32, 2, 2, 1, 1),
    (32, 3, 3, 1, 2),
    (16, 4, 4, 0, 4),
    (8, 8, 8, 0, 8),
]


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", SINGLE, ids=str)
def test_a_strided_convolution_to_one_pixel_is_right_in_bf16(shape, form):
    """On a CPU that multiplies bf16, torch 2.11 to 2.15 get some of these wrong without a word."""
    channels, kernel, stride, padding, side = shape
    layer = nn.Conv2d(channels, 64, kernel, stride, padding, bias=False)
    network = nn.Sequential(layer).to(memory_format=form)
    names, weight = list(network.state_dict()), nn.Parameter(layer.weight.detach().clone())
    _spare_kernels(network)
    _spare_kernels(network)  # of a part of a network that was built by us
    assert list(network.state_dict()) == names and len(layer._forward_hooks) == 1
    pickle.loads(pickle.dumps(network))  # as workers get it
    for seed in range(8):
        torch.manual_seed(seed)
        maps = torch.randn(16, channels, side, side)
        network.zero_grad()
        weight.grad = None
        left = [torch.full_like(weight, float("nan"), dtype=torch.bfloat16)] * 8
        del left
        with torch.autocast("cpu", torch.bfloat16):
            out = network(maps)
        out.float().square().sum().backward()
        expected = conv2d(maps, weight, stride=stride, padding=padding)
        expected.square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.01 * expected.norm()
        assert (layer.weight.grad - weight.grad).norm() < 0.01 * weight.grad.norm()


def test_only_results_of_one_pixel_are_computed_in_float32(monkeypatch):
    network, seen = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1)), []
    _spare_kernels(network)
    forward = nn.Conv2d._conv_forward

    def watch(layer, maps, *given):
        seen.append((tuple(maps.shape[2:]), torch.is_autocast_enabled("cpu")))
        return forward(layer, maps, *given)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", watch)
    for side in (1, 2, 3):
        with torch.autocast("cpu", torch.bfloat16):
            network(torch.randn(2, 3, side, side))
    network(torch.randn(2, 3, 1, 1))
    single = [((side, side), is_bf16) for side in (1, 2) for is_bf16 in (True, False)]
    assert seen == [*single, ((3, 3), True), ((1, 1), False)]


def test_a_network_of_the_users_own_is_spared_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 16, 8, 8)

        def forward(self, images):
            return self.layer(images).flatten(1)

    module = MoCo(
        ModelConfig("own:Net", queue_size=8, key_bn="plain"), OptimConfig(), 3, 8, backbone=Net()
    )
    for encoder in (module.query_encoder, module.key_encoder):
        assert [*encoder.backbone.layer._forward_hooks.values()] == [in_float32]
