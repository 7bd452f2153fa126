"""Vision transformers as MoCo v3 trains them: timm's, with v3's first weights and positions.

Shapes: D width, P side of a patch, side^2 patches in an image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moco.algorithm.names import is_own
from moco.config import ModelConfig


def is_vit(name: str) -> bool:
    """Say whether a timm name is one of its plain vision transformers."""
    from timm.models import is_model_in_modules

    return not is_own(name) and is_model_in_modules(name, ["vision_transformer"])


def vit_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Choose what timm's constructor is told of a ViT beyond its name."""
    # Xavier's weights of timm treat query, key and value apart; the class token starts at 1e-6.
    first_weights = {"weight_init": "moco"} if config.vit_init == "xavier" else {}
    return {"img_size": image_size} | shape_arguments(config) | first_weights


def published_width(name: str) -> int:
    """Return D of the ViT that timm knows by a name."""
    import timm

    with torch.device("meta"):  # only its width is asked for
        return timm.create_model(name, pretrained=False).embed_dim


def shape_arguments(config: ModelConfig) -> dict[str, int]:
    """Return in timm's words how the shape of a ViT differs from the one of its name."""
    given = {"patch_size": config.patch_size, "depth": config.depth, "num_heads": config.num_heads}
    arguments = {name: value for name, value in given.items() if value}
    if config.width != 1:
        arguments["embed_dim"] = max(4, int(published_width(config.backbone) * config.width))
    return arguments


def side_of_patches(backbone: nn.Module) -> int:
    """Return the pixels of a patch that a backbone cuts images into; 1 where it cuts none."""
    from timm.layers import PatchEmbed

    sides = [m.patch_size[0] for m in backbone.modules() if isinstance(m, PatchEmbed)]
    return max(sides, default=1)


def take_any_size(backbone: nn.Module) -> None:
    """Have a ViT take images of other sizes than its own, at which it resamples its positions."""
    from timm.layers import Format
    from timm.models import VisionTransformer

    if isinstance(backbone, VisionTransformer) and not backbone.dynamic_img_size:
        backbone.dynamic_img_size = True  # what timm's constructor does when it is told so
        embed = backbone.patch_embed
        embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC


@torch.no_grad()
def start_as_v3(vit: nn.Module, config: ModelConfig) -> None:
    """Put in v3's first weights of the patch projection and its positions, where asked for.

    Source: arXiv:2104.02057, section 4.2 (frozen projection) and appendix A.
    """
    from timm.layers import build_sincos2d_pos_embed

    projection = vit.patch_embed.proj
    if config.vit_init == "xavier":
        fan_in, fan_out = projection.weight[0].numel(), len(projection.weight)
        bound = math.sqrt(6 / (fan_in + fan_out))
        nn.init.uniform_(projection.weight, -bound, bound)
        if projection.bias is not None:  # CLIP's ViTs have none
            nn.init.zeros_(projection.bias)
    if config.freeze_patch_embed:
        projection.requires_grad_(False)
    if config.positions == "sincos":
        grid = vit.patch_embed.grid_size
        patches = build_sincos2d_pos_embed(grid, vit.embed_dim, interleave_sin_cos=True)
        others = vit.pos_embed.shape[1] - len(patches)  # the class token's and registers', 0
        vit.pos_embed.copy_(torch.cat([patches.new_zeros(others, vit.embed_dim), patches])[None])
        vit.pos_embed.requires_grad_(False)
