"""Encoders: torchvision's networks key for key, stems and heads."""

import pytest
import torch
import torchvision
from torch import nn

from moco.algorithm.batch import Batch
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
