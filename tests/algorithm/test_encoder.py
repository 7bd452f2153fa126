"""Encoders: torchvision's networks key for key, stems, heads, and BatchNorm over groups."""

import copy

import pytest
import timm.layers
import torch
import torchvision
from torch import nn
from torch.nn import functional

from moco.algorithm.batch import Batch
from moco.algorithm.batch_norm import SplitBatchNorm, set_batch_norm
from moco.algorithm.encoder import TORCHVISION_RESNETS, build_backbone, build_encoder
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig, UserError


def config(backbone: str = "resnet18", **settings) -> ModelConfig:
    return ModelConfig(backbone=backbone, **{"embedding_dim": 8, **settings})


def pictures(count: int = 8, channels: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(count, channels, 1, 1, generator=generator)
    return spread + torch.randn(count, channels, size, size, generator=generator)


# Backbones


@pytest.mark.parametrize("name", TORCHVISION_RESNETS)
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, feature_dim = build_backbone(config(name), 3, 224)
        theirs = torchvision.models.get_model(name)
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert list(ours.state_dict()) == list(expected)
    assert feature_dim == theirs.fc.in_features


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions_with_the_same_weights(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name)
    ours, _ = build_backbone(config(name), 3, 64)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "fc." not in k})
    theirs.fc = nn.Identity()
    for training in (True, False):  # the first pass also moves the running statistics
        ours.train(training), theirs.train(training)
        with torch.no_grad():
            a, b = ours(pictures(2, size=64)), theirs(pictures(2, size=64))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert a.abs().mean() > 1e-3


def test_fresh_weights_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    ours, _ = build_backbone(config("resnet18"), 3, 64)
    theirs = torchvision.models.resnet18().state_dict()
    for name, value in ours.state_dict().items():
        expected = theirs[name].float()
        if value.dim() > 1:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.1), name
            assert abs(value.mean()) < 5 * value.std() / value.numel() ** 0.5, name
        else:
            torch.testing.assert_close(value.float(), expected, msg=name)


def test_the_residual_branch_is_not_zero_at_the_start():
    backbone, _ = build_backbone(config("resnet50"), 3, 64)
    last = [m.bn3.weight for m in backbone.modules() if hasattr(m, "bn3")]
    assert len(last) == 16 and all((w == 1).all() for w in last)


STEMS = {"imagenet": (1, (7, 2)), "cifar": (4, (3, 1)), "patch": (2, (4, 2))}


@pytest.mark.parametrize("stem, grid, first", [(name, *shape) for name, shape in STEMS.items()])
def test_stems(stem, grid, first):
    backbone, _ = build_backbone(config(stem=stem), 3, 32)
    conv = backbone.conv1
    assert (conv.kernel_size[0], conv.stride[0]) == first
    assert conv.bias is None
    maps = []
    backbone.layer4.register_forward_hook(lambda module, given, out: maps.append(out))
    backbone(pictures(2))
    assert maps[0].shape == (2, 512, grid, grid)


@pytest.mark.parametrize("size", [8, 9, 28, 31, 32])
def test_a_patch_stem_is_convolution_norm_and_relu(size):
    torch.manual_seed(0)
    backbone, _ = build_backbone(config("resnet10t", stem="patch", width=0.375), 3, size)
    layers = nn.Sequential(
        nn.Conv2d(3, 24, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
    )
    layers[0].weight, layers[1].bias = backbone.conv1.weight, backbone.bn1.bias
    nn.init.normal_(layers[1].bias)
    found = []
    backbone.layer1.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    given = pictures(2, size=size).requires_grad_()
    wanted = layers(given)
    assert torch.isfinite(backbone(given)).all()
    torch.testing.assert_close(found[0], wanted)
    wanted.sum().backward()  # each pixel is seen, those of the last row and column too
    assert (given.grad.abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("stem", ["patched", "auto"])
def test_a_stem_that_there_is_not_is_refused(stem):
    with pytest.raises(UserError, match=f"model.stem {stem}.*the stems are imagenet, cifar, patch"):
        build_backbone(config(stem=stem), 3, 32)


@pytest.mark.parametrize("settings", [{"stem": "cifar"}, {"stem": "patch"}, {"width": 2.0}])
def test_a_replaced_stem_starts_as_the_published_one(settings):
    """Normal with variance 2 over the fan out (1512.03385's reference code and torchvision)."""
    torch.manual_seed(0)
    weight = build_backbone(config(**settings), 3, 32)[0].conv1.weight
    out, _, height, width = weight.shape
    assert weight.std().item() == pytest.approx((2 / (out * height * width)) ** 0.5, rel=0.06)


@pytest.mark.parametrize(
    "stem, kernel, pool", [("imagenet", 7, True), ("cifar", 3, False), ("patch", 4, False)]
)
@pytest.mark.parametrize("width, feature_dim", [(0.25, 128), (0.5, 256), (2, 1024)])
def test_widths_scale_every_layer(width, feature_dim, stem, kernel, pool):
    with torch.device("meta"):
        backbone, found = build_backbone(config(width=width, stem=stem), 3, 32)
    assert found == feature_dim
    assert backbone.conv1.kernel_size == (kernel, kernel)
    assert backbone.conv1.out_channels == 64 * width
    assert isinstance(backbone.maxpool, nn.Identity) != pool
    assert backbone.layer1[0].conv1.weight.shape[0] == 64 * width
    assert backbone(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, feature_dim)


def test_width_of_a_bottleneck_network():
    backbone, feature_dim = build_backbone(config("resnet50", width=0.25, stem="cifar"), 3, 32)
    assert feature_dim == 512 and backbone(pictures(2)).shape == (2, 512)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels(channels, stem):
    encoder = build_encoder(config(width=0.25, stem=stem), channels, 32)
    assert encoder.backbone.conv1.in_channels == channels
    assert encoder(pictures(2, channels)).shape == (2, 8)


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet10t",
        "efficientnet_lite0",
        "convnext_atto",
        "regnetx_002",
        "mobilenetv3_small_050",  # its last layer, after the pooling, is wider than its feature map
        "ghostnet_050",
        "lcnet_050",
    ],
)
def test_timm_backbones_by_name(backbone):
    encoder = build_encoder(config(backbone), 3, 32).eval()
    assert encoder.backbone(pictures(2)).shape == (2, encoder.feature_dim)
    assert encoder(pictures(2)).shape == (2, 8)


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 48)])
def test_a_vit_by_name_at_another_image_size(channels, size):
    encoder = build_encoder(config("vit_tiny_patch16_224"), channels, size)
    assert encoder.feature_dim == 192
    assert encoder(pictures(2, channels, size)).shape == (2, 8)


# What a user is told


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(UserError, match=r"model\.backbone 'resnet5O'.*'resnet50\w*'"):
        build_backbone(config("resnet5O"), 3, 32)
    with pytest.raises(UserError, match=r"model\.backbone 'zzzz'.*timm\.list_models"):
        build_backbone(config("zzzz"), 3, 32)
    with pytest.raises(UserError, match=r"model\.backbone ''"):
        build_backbone(config(""), 3, 32)


@pytest.mark.parametrize(
    ("backbone", "name", "value"),
    [
        ("vit_tiny_patch16_224", "stem", "patch"),
        ("convnext_atto", "stem", "cifar"),
        ("convnext_atto", "width", 0.5),
        ("vit_tiny_patch16_224", "zero_init_residual", True),
        ("resnet18", "patch_size", 4),
        ("resnet18", "positions", "sincos"),
        ("convnext_atto", "freeze_patch_embed", True),
    ],
)
def test_settings_of_another_kind_of_network_are_refused(backbone, name, value):
    with pytest.raises(UserError, match=rf"model\.{name} {value} needs a .*{backbone}"):
        build_backbone(config(backbone, **{name: value}), 3, 32)


@pytest.mark.parametrize(
    "backbone, settings",
    [
        ("resnet50_gn", {"stem": "cifar"}),  # GroupNorm counts its channels under another name
        ("resnext50_32x4d", {"width": 0.1}),  # leaves less than one channel a group
    ],
)
def test_odd_resnets_work_or_are_refused(backbone, settings):
    try:
        encoder = build_encoder(config(backbone, **settings), 3, 32)
    except UserError:
        return
    assert encoder(pictures(2)).shape == (2, 8)


# Heads


def test_heads():
    linear = build_encoder(config(head="linear", width=0.25), 3, 32)
    assert isinstance(linear.head, nn.Linear)
    assert (linear.head.in_features, linear.head.out_features) == (128, 8)
    mlp = build_encoder(config(head="mlp", width=0.25), 3, 32)
    assert [type(layer) for layer in mlp.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert mlp.head[0].weight.shape == (128, 128) and mlp.head[2].weight.shape == (8, 128)
    wide = build_encoder(config(head="mlp", width=0.25, head_hidden_dim=40), 3, 32)
    assert wide.head[0].weight.shape == (40, 128) and wide.head[2].weight.shape == (8, 40)


def test_an_encoder_is_head_after_backbone():
    encoder = build_encoder(config(width=0.25), 3, 32).eval()
    with torch.no_grad():
        expected = encoder.head(encoder.backbone(pictures(2)))
        assert torch.equal(encoder(pictures(2)), expected)
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"backbone", "head"}


# BatchNorm


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


def test_a_vit_that_cannot_be_built_is_refused_with_the_settings_of_vits():
    with pytest.raises(UserError) as refused:
        build_backbone(config("vit_tiny_patch16_224", width=0.3, num_heads=5, depth=1), 3, 32)
    for words in ("model.width 0.3 (57 channels)", "model.num_heads 5", "model.depth 1"):
        assert words in str(refused.value)
    assert "model.stem" not in str(refused.value)


class WithThreeAxes(nn.Module):
    """A backbone with weights of three spatial axes, as lambda networks of timm have."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv3d(1, 4, (8, 1, 1))

    def forward(self, images):
        maps = self.deep(self.flat(images)[:, None])
        return maps.mean((2, 3, 4))


def test_a_network_with_weights_of_three_axes_trains():
    model = ModelConfig(backbone="own:WithThreeAxes", queue_size=8, key_bn="plain")
    module = MoCo(model, OptimConfig(), 3, 16, backbone=WithThreeAxes())
    for encoder in (module.query_encoder, module.key_encoder):
        assert encoder.backbone.flat.weight.is_contiguous(memory_format=torch.channels_last)
        assert encoder.backbone.deep.weight.is_contiguous()
    views = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    module.training_step(Batch(views[:1], views[1:], None), 0).backward()
    assert module.query_encoder.backbone.deep.weight.grad.isfinite().all()
