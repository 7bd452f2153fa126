"""Encoders: a backbone with a projection head, and first layers for small images.

Every backbone comes from timm, whose ResNets have the names, state dict keys and arithmetic of
torchvision's. Weights start fresh: nothing is downloaded.
Shapes: N images per device, D feature, C embedding, H W pixels.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moco.algorithm.names import is_own, unknown_backbone
from moco.algorithm.own_backbone import own_backbone
from moco.algorithm.patches import combinations_of, combine_features, cut_into_patches
from moco.algorithm.vit import is_vit, shape_arguments, start_as_v3, vit_arguments
from moco.config import ModelConfig, UserError
from moco.log import reason_of

TORCHVISION_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
# Side, stride and padding of a ResNet's first convolution; max-pooling follows imagenet's alone.
STEMS = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1), "patch": (4, 2, 1)}


class Encoder(nn.Module):
    """Map N x channels x H x W images to N x C embeddings, not yet normalised.

    Attributes:
        backbone: Images to N x D features, the part that is kept after pretraining.
        head: Features to embeddings (1911.05722: linear; 2003.04297: one hidden layer;
            2104.02057: BatchNorm after each layer).
        feature_dim: D.
        patches, chosen: How images are cut and features averaged (2207.08220), if above 1; then
            each image has several embeddings, which stand together.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim
        self.patches = 1
        self.chosen: Tensor | None
        self.register_buffer("chosen", None, persistent=False)

    def cut_images(self, patches: int, combine: int) -> None:
        """Have images cut into `patches` along a side, and features of `combine` averaged."""
        if patches > 1:
            self.patches, self.chosen = patches, combinations_of(patches**2, combine)

    def forward(self, images: Tensor) -> Tensor:
        if self.patches == 1:
            return self.head(self.backbone(images))
        features = self.backbone(cut_into_patches(images, self.patches))
        return self.head(combine_features(features, self.chosen))


def build_encoder(
    config: ModelConfig, channels: int, image_size: int, own: nn.Module | None = None
) -> Encoder:
    """Build an encoder with fresh weights.

    Args:
        config: Names the backbone, its stem and width, and the head.
        channels: Of the images, any number.
        image_size: Side of the images in pixels.
        own: The user's module, where `config` names no backbone of timm's; it is copied.

    Raises:
        UserError: Unknown backbone, or a stem or width that it cannot take.
    """
    backbone, feature_dim = build_backbone(config, channels, image_size, own)
    hidden = config.head_hidden_dim or feature_dim
    hidden_widths = [] if config.head == "linear" else [hidden] * (config.head_layers - 1)
    head = build_head(config.head, [feature_dim, *hidden_widths, config.embedding_dim])
    return Encoder(backbone, head, feature_dim)


def build_head(kind: str, widths: list[int]) -> nn.Module:
    """Build a projection head.

    Args:
        kind: As the setting `model.head`.
        widths: Of its input, its hidden layers and its output.
    """
    if kind in ("mlp_bn", "mlp_bn_affine"):
        return mlp_with_batch_norm(widths, last_bn=True, affine=kind == "mlp_bn_affine")
    if kind == "linear":
        return nn.Linear(*widths)
    layers = [[nn.Linear(*pair), nn.ReLU(inplace=True)] for pair in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in layer][:-1])


def build_predictor(config: ModelConfig, feature_dim: int) -> nn.Module:
    """Build what maps N x C query embeddings to N x C predictions of keys; identity without one.

    Sources: arXiv:2104.02057, section 4.1; arXiv:2207.08220, of which the bottleneck is.
    """
    if config.predictor == "none":
        return nn.Identity()
    dim, narrow = config.embedding_dim, config.predictor == "bottleneck"
    hidden = max(dim // 4, 1) if narrow else config.head_hidden_dim or feature_dim
    return mlp_with_batch_norm([dim, hidden, dim], config.predictor_last_bn, affine=narrow)


def mlp_with_batch_norm(widths: list[int], last_bn: bool, affine: bool = False) -> nn.Sequential:
    """Build an MLP with BatchNorm and ReLU after every hidden layer.

    Args:
        widths: Of its input, its hidden layers and its output.
        last_bn: Whether BatchNorm follows the last layer.
        affine: Whether linear layers have biases, and that BatchNorm gain and bias.

    Sources: arXiv:2104.02057, appendix A; arXiv:2207.08220 with `affine`.
    """
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following, bias=affine), nn.BatchNorm1d(following)]
        layers.append(nn.ReLU(inplace=True))
    last = [nn.BatchNorm1d(widths[-1], affine=affine)] if last_bn else []
    return nn.Sequential(*layers[:-2], *last)


def build_backbone(
    config: ModelConfig, channels: int, image_size: int, own: nn.Module | None = None
) -> tuple[nn.Module, int]:
    """Build the feature extractor alone, and return it with its feature width D."""
    if is_own(config.backbone):
        _check_kind(config, is_resnet=False)
        network, feature_dim = own_backbone(own, config, channels, image_size)
        _spare_kernels(network)
        return network, feature_dim
    import timm  # this takes 2 s, so it is left to those who build a network

    if not timm.is_model(config.backbone):
        raise unknown_backbone(config.backbone, "model.backbone", timm.list_models())
    is_resnet = timm.models.is_model_in_modules(config.backbone, ["resnet"])
    _check_kind(config, is_resnet)
    try:
        backbone = timm.create_model(
            config.backbone,
            pretrained=False,
            num_classes=0,
            in_chans=channels,
            **timm_arguments(config, image_size),
        )
        if is_resnet:
            _set_stem(backbone, config, channels)
        elif is_vit(config.backbone):
            start_as_v3(backbone, config)
        if any(p.numel() == 0 for p in backbone.parameters()):
            raise ValueError("a layer has no channels left")
        _spare_kernels(backbone)
        return backbone, width_of_features(backbone)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        reason = reason_of(error)
        raise UserError(
            f"model.backbone {config.backbone!r} cannot be built with {_shape_in_words(config)} "
            f"and data.image_size {image_size} ({reason}): change one"
        ) from error


def lay_channels_last(module: nn.Module) -> None:
    """Lay out weights of convolutions as they are fastest, on every device and in every precision.

    `Module.to` would refuse a network that has weights of three spatial axes as well.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def width_of_features(backbone: nn.Module) -> int:
    """Return D of one of timm's networks; some widen their features after pooling."""
    return getattr(backbone, "head_hidden_size", backbone.num_features)


def _shape_in_words(config: ModelConfig) -> str:
    """Name the settings that shape a backbone of this kind, with their values."""
    if not is_vit(config.backbone):
        return f"model.stem {config.stem}, model.width {config.width:g}"
    names = ("patch_size", "depth", "num_heads", "positions")
    channels = shape_arguments(config).get("embed_dim")
    width = f"model.width {config.width:g}" + (f" ({channels} channels)" if channels else "")
    return ", ".join([width, *(f"model.{name} {getattr(config, name)}" for name in names)])


def _check_kind(config: ModelConfig, is_resnet: bool) -> None:
    """Raise UserError for a setting of ResNets or of ViTs that this backbone does not have."""
    vit, usual = is_vit(config.backbone), ModelConfig()
    kinds = {
        "a ResNet": (is_resnet, ("stem", "zero_init_residual")),
        "a ResNet or ViT": (is_resnet or vit, ("width",)),
        "a ViT": (
            vit,
            ("patch_size", "depth", "num_heads", "positions", "vit_init", "freeze_patch_embed"),
        ),
    }
    for kind, (is_one, names) in kinds.items():
        for name in names:
            if not is_one and getattr(config, name) != getattr(usual, name):
                raise UserError(
                    f"model.{name} {getattr(config, name)} needs {kind}, and model.backbone "
                    f"{config.backbone!r} is none: take model.{name} {getattr(usual, name)}"
                )


def timm_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Choose what timm's constructor is told beyond the name and the number of channels."""
    from timm.models import get_pretrained_cfg, is_model_in_modules

    if is_model_in_modules(config.backbone, ["resnet"]):
        # torchvision, v1 and v2 do not zero the last BatchNorm of a block; timm would.
        arguments: dict[str, Any] = {"zero_init_last": config.zero_init_residual}
        if config.width != 1:
            arguments["channels"] = tuple(
                max(8, int(c * config.width)) for c in (64, 128, 256, 512)
            )
            # timm takes a width of the stem only for deep stems; `_set_stem` replaces it.
            arguments |= {"stem_type": "deep", "stem_width": max(4, int(32 * config.width))}
        return arguments
    if is_vit(config.backbone):
        return vit_arguments(config, image_size)
    default = get_pretrained_cfg(config.backbone)
    fixed = default is not None and default.fixed_input_size
    return {"img_size": image_size} if fixed else {}


def _spare_kernels(backbone: nn.Module) -> None:
    """Keep strided convolutions away from faults of torch's CPU kernels; results are the same.

    In channels-last format the backward pass of strided 1x1 convolutions of fewer than 8 channels
    writes beyond its memory and aborts the process (torch 2.14.1): they skip pixels first. In bf16,
    where the result has a single pixel, the kernels return what lay in memory as the gradient of
    the weights, or, where a kernel covers the map, a wrong result (2.11 to 2.15, CPUs that multiply
    bf16): that is computed in float32.
    """
    for layer in backbone.modules():
        if not isinstance(layer, nn.Conv2d) or layer.stride == (1, 1):
            continue
        if (layer.kernel_size, layer.padding) == ((1, 1), (0, 0)) and layer.in_channels < 8:
            layer.register_forward_pre_hook(partial(_skip_pixels, stride=layer.stride))
            layer.stride = (1, 1)
        elif not hasattr(layer, "is_spared"):
            layer.is_spared = True
            layer.register_forward_hook(in_float32)


def in_float32(layer: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> Tensor | None:
    """Compute a result of a single pixel again, in float32, where a CPU computes in bf16."""
    is_bf16 = out.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not inputs or not is_bf16 or min(out.shape[-2:]) > 1:
        return None
    with torch.autocast("cpu", enabled=False):
        return layer.forward(inputs[0].float()).to(out.dtype)


def _skip_pixels(layer: nn.Module, inputs: tuple[Tensor], stride: tuple[int, int]) -> tuple[Tensor]:
    return (inputs[0][..., :: stride[0], :: stride[1]],)


def _set_stem(backbone: nn.Module, config: ModelConfig, channels: int) -> None:
    """Replace the first convolution where another stem or width is asked for."""
    if config.stem == "imagenet" and config.width == 1:
        return
    if config.stem not in STEMS:
        raise ValueError(f"the stems are {', '.join(STEMS)}")
    last = [m for m in backbone.conv1.modules() if isinstance(m, nn.Conv2d)][-1]
    width = last.out_channels
    backbone.conv1 = nn.Conv2d(channels, width, *STEMS[config.stem], bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    if config.stem != "imagenet":
        backbone.maxpool = nn.Identity()
