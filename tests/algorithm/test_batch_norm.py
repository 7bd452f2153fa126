"""BatchNorm of an encoder: over groups, over one device, over all; nothing else changes."""

import copy

import pytest
import timm.layers
import torch
from test_encoder import config, pictures
from torch import nn
from torch.nn import functional

from moco.algorithm.batch_norm import SplitBatchNorm, set_batch_norm
from moco.algorithm.encoder import build_backbone, build_encoder
from moco.config import UserError


def norm_layer(channels: int = 6, kind: str = "split", groups: int = 4, **settings) -> nn.Module:
    layer = nn.BatchNorm2d(channels, **settings)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -1, 1)
    return set_batch_norm(nn.Sequential(layer), kind, groups)[0]


def maps(count: int = 8, channels: int = 6) -> torch.Tensor:
    return 1.0 + pictures(count, channels, 5) * torch.arange(1, count + 1)[:, None, None, None]


@pytest.fixture(params=["group by group", "fused"])
def way(request, monkeypatch):
    """Both ways to split: without a compiler, and what a compiler gets to see."""
    if request.param == "fused":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


FORMATS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@FORMATS
def test_split_equals_batch_norm_on_each_group(layout, way):
    torch.manual_seed(0)
    split = norm_layer().train()
    assert isinstance(split, SplitBatchNorm)
    plain = nn.BatchNorm2d(6)
    plain.load_state_dict(split.state_dict())
    given = maps().contiguous(memory_format=layout)
    out = split(given)
    assert out.is_contiguous(memory_format=layout)
    means, variances = [], []
    for group, part in zip(maps().chunk(4), out.chunk(4), strict=True):
        one = copy.deepcopy(plain)
        torch.testing.assert_close(part, one(group), atol=1e-5, rtol=1e-5)
        means.append(one.running_mean)
        variances.append(one.running_var)
    torch.testing.assert_close(split.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(split.running_var, torch.stack(variances).mean(0))
    whole = copy.deepcopy(plain)(maps())
    assert (out - whole).abs().max() > 0.1  # the groups do matter


class NamedNorm(nn.modules.batchnorm._BatchNorm):
    """Torch's BatchNorm of a class of the user's own."""

    def _check_input_dim(self, images): ...


class OwnNorm(nn.BatchNorm2d):
    """Normalises in a way of its own."""

    def forward(self, images):
        return super().forward(images) + 1


@pytest.mark.parametrize("kind", ["plain", "split"])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d, nn.SyncBatchNorm, NamedNorm, timm.layers.SyncBatchNormAct]
)
def test_every_batch_norm_of_an_own_backbone_is_of_one_device_and_its_groups(layer, kind):
    """SyncBatchNorm reached over devices and groups, through which keys leak."""
    network = nn.Sequential(nn.Conv2d(6, 6, 1), layer(6))
    names = network.state_dict().keys()
    set_batch_norm(network, kind, 4)
    assert network.state_dict().keys() == names
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in network.modules())
    images, other = maps(), maps()
    other[2:] += torch.randn_like(other[2:])
    with torch.no_grad():
        first, again = network(images)[:2], network(other)[:2]
    assert torch.equal(first, again) == (kind == "split")


def test_a_batch_norm_that_cannot_be_split_is_refused():
    set_batch_norm(OwnNorm(6), "plain", 4)
    with pytest.raises(UserError, match="the backbone's OwnNorm normalises in a way of its own"):
        set_batch_norm(nn.Sequential(OwnNorm(6)), "split", 4)

    class OwnSync(nn.SyncBatchNorm):
        def forward(self, images):
            return images

    with pytest.raises(UserError, match="the backbone's OwnSync normalises in a way of its own"):
        set_batch_norm(nn.Sequential(OwnSync(6)), "plain", 4)


def test_split_statistics_over_several_steps(way):
    split, manual = norm_layer(2, groups=2), torch.zeros(2)
    for step in range(5):
        batch = maps(4, 2) + step
        split(batch)
        manual = 0.9 * manual + 0.1 * batch.mean((0, 2, 3))
    torch.testing.assert_close(split.running_mean, manual)


def test_split_counts_a_step_once(way):
    split = norm_layer()
    for _ in range(3):
        split(maps())
    assert split.num_batches_tracked == 3


@FORMATS
def test_split_gradients_equal_those_of_each_group(layout, way):
    torch.manual_seed(0)
    split = norm_layer().train()
    plain = nn.BatchNorm2d(6)
    plain.load_state_dict(split.state_dict())
    weights = torch.randn(8, 6, 5, 5)
    given = maps().contiguous(memory_format=layout).requires_grad_()
    (split(given) * weights).sum().backward()
    expected = maps().requires_grad_()
    parts = [copy.deepcopy(plain)(group) for group in expected.chunk(4)]
    (torch.cat(parts) * weights).sum().backward()
    torch.testing.assert_close(given.grad, expected.grad, atol=1e-5, rtol=1e-4)
    total = [torch.zeros(6), torch.zeros(6)]
    for group, weight in zip(maps().chunk(4), weights.chunk(4), strict=True):
        one = copy.deepcopy(plain)
        (one(group) * weight).sum().backward()
        total = [t + p.grad for t, p in zip(total, (one.weight, one.bias), strict=True)]
    torch.testing.assert_close(split.weight.grad, total[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(split.bias.grad, total[1], atol=1e-4, rtol=1e-4)


@FORMATS
def test_split_in_eval_mode_is_plain(layout):
    split = norm_layer()
    split(maps())
    split.eval()
    plain = nn.BatchNorm2d(6)
    plain.load_state_dict(split.state_dict())
    plain.eval()
    given = maps(7).contiguous(memory_format=layout)  # no multiple of the groups
    torch.testing.assert_close(split(given), plain(given))


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}])
def test_split_of_other_batch_norms(settings, way):
    split, plain = norm_layer(**settings), nn.BatchNorm2d(6, **settings)
    plain.load_state_dict(split.state_dict())
    expected = torch.cat([copy.deepcopy(plain)(group) for group in maps().chunk(4)])
    torch.testing.assert_close(split(maps()), expected, atol=1e-5, rtol=1e-5)


@FORMATS
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0", "tinynet_e"])
def test_split_of_a_network_equals_the_network_on_each_group(backbone, layout, way):
    """Also for timm's layers that carry their activation along (BatchNormAct2d)."""
    torch.manual_seed(0)
    width = 0.25 if backbone == "resnet18" else 1.0
    # In fp64: deep layers normalise few values, which makes much of a rounding error.
    plain = build_backbone(config(backbone, width=width), 3, 32)[0].double().train()
    split = set_batch_norm(copy.deepcopy(plain), "split", 2).to(memory_format=layout)
    assert list(split.state_dict()) == list(plain.state_dict())
    given = pictures(8).double()
    with torch.no_grad():
        expected = torch.cat([copy.deepcopy(plain)(group) for group in given.chunk(2)])
        whole = copy.deepcopy(plain)(given)
        out = split(given.contiguous(memory_format=layout))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert (out - whole).abs().max() > 1e-2
    plain.load_state_dict(split.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(split.eval()(given), plain.eval()(given), atol=1e-6, rtol=1e-6)


def test_split_leaves_no_batch_norm_out():
    for backbone in ("resnet18", "efficientnet_lite0", "mobilenetv3_small_050"):
        with torch.device("meta"):
            network, _ = build_backbone(config(backbone), 3, 32)
        set_batch_norm(network, "split", 2)
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(getattr(m, "num_splits", 0) == 2 for m in norms)


def test_split_keeps_the_keys_groups_apart():
    """The leak that shuffling closes: another image of the group changes an embedding."""
    encoder = set_batch_norm(build_encoder(config(width=0.25), 3, 32), "split", 4).train()
    batch = pictures(8)
    changed = batch.clone()
    changed[1] = changed[1].flip(0) * 3
    with torch.no_grad():
        moved = (encoder(batch) - encoder(changed)).abs().amax(1) > 1e-6
    assert moved.tolist() == [True, True] + [False] * 6


def test_plain_changes_nothing_and_sync_converts():
    encoder = build_encoder(config(width=0.25), 3, 32)
    kinds = [type(m) for m in encoder.modules()]
    assert [type(m) for m in set_batch_norm(encoder, "plain", 4).modules()] == kinds
    keys = list(encoder.state_dict())
    synced = set_batch_norm(encoder, "sync", 4)
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert list(synced.state_dict()) == keys


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0", "densenet121", "resnetv2_18"])
def test_sync_changes_no_feature(backbone):
    """Layers of timm hold their activation; torch's own converter loses it."""
    torch.manual_seed(0)
    network = build_backbone(config(backbone), 3, 32)[0].eval()
    with torch.no_grad():
        expected = network(pictures(2))
        assert set_batch_norm(network, "sync", 2)(pictures(2)).equal(expected)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5)])
def test_split_of_a_heads_batch_norm(shape, way):
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(6)
    given = torch.randn(shape) * torch.arange(8).view(8, *[1] * (len(shape) - 1))
    split = set_batch_norm(copy.deepcopy(plain), "split", 2)
    expected = torch.cat([copy.deepcopy(plain)(group) for group in given.chunk(2)])
    torch.testing.assert_close(split(given), expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain(given)).abs().max() > 0.1


def test_a_split_batch_norm_is_the_functional_one():
    """Against torch.nn.functional rather than a module of ours, with the default momentum."""
    split = norm_layer(3, groups=2)
    batch = maps(4, 3)
    expected = [
        functional.batch_norm(half, None, None, split.weight, split.bias, training=True)
        for half in batch.chunk(2)
    ]
    torch.testing.assert_close(split(batch), torch.cat(expected), atol=1e-5, rtol=1e-5)
