"""Tell what a network is from the names and shapes of its tensors alone.

Shapes: D feature; positions of a ViT 1 x (tokens + side^2) x D.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed

from moco.algorithm.encoder import build_head
from moco.checkpoints.matching import ABSENT, State

# Blocks per stage and their kind; then groups x their width at 64 planes, if not 1 x 64.
_RESNETS = {
    "2-2-2-2 basic": "resnet18",
    "3-4-6-3 basic": "resnet34",
    "2-2-2-2 bottleneck": "resnet26",
    "3-4-6-3 bottleneck": "resnet50",
    "3-4-23-3 bottleneck": "resnet101",
    "3-8-36-3 bottleneck": "resnet152",
    "3-24-36-3 bottleneck": "resnet200",
    "3-4-6-3 bottleneck 32x4": "resnext50_32x4d",
    "3-4-23-3 bottleneck 32x4": "resnext101_32x4d",
    "3-4-23-3 bottleneck 32x8": "resnext101_32x8d",
    "3-4-23-3 bottleneck 64x4": "resnext101_64x4d",
    "3-4-6-3 bottleneck 1x128": "wide_resnet50_2",
    "3-4-23-3 bottleneck 1x128": "wide_resnet101_2",
}
# Width x depth, from 2010.11929, table 1; the two smaller ones are DeiT's.
_VITS = {"192x12": "tiny", "384x12": "small", "768x12": "base", "1024x24": "large"}
_VITS["1280x32"] = "huge"


def resnet_shape(part: State) -> dict[str, Any]:
    """Return backbone, stem and width of a ResNet; empty if it is none."""
    kind, last = ("bottleneck", 3) if "layer4.0.conv3.weight" in part else ("basic", 2)
    names = ("conv1", "layer1.0.conv2", f"layer1.0.conv{last}", f"layer4.0.conv{last}")
    weights = [part.get(f"{name}.weight", ABSENT) for name in names]
    if any(weight.ndim != 4 or 0 in weight.shape for weight in weights):
        return {}
    stem, middle, first, final = weights
    expansion = 4 if kind == "bottleneck" else 1
    blocks = [{k.split(".")[1] for k in part if k.startswith(f"layer{n}.")} for n in (1, 2, 3, 4)]
    name = f"{'-'.join(str(len(block)) for block in blocks)} {kind}"
    groups = len(middle) // middle.shape[1] if kind == "bottleneck" else 1
    group_width = round(64 * expansion * len(middle) / max(groups, 1) / len(first))
    if (groups, group_width) != (1, 64):
        name += f" {groups}x{group_width}"
    return {
        "backbone": _RESNETS.get(name, ""),
        "stem": {3: "cifar", 4: "patch"}.get(stem.shape[-1], "imagenet"),
        "width": len(final) / expansion / 512,
    }


def vit_shape(part: State) -> dict[str, Any]:
    """Return the backbone of a ViT; empty if it is none."""
    patches = part.get("patch_embed.proj.weight", ABSENT)
    depth = len({name.split(".")[1] for name in part if name.startswith("blocks.")})
    if patches.ndim != 4 or f"{len(patches)}x{depth}" not in _VITS:
        return {}
    name = f"vit_{_VITS[f'{len(patches)}x{depth}']}_patch{patches.shape[-1]}_224"
    return {"backbone": name} if timm.is_model(name) else {}


def vit_image_size(part: State) -> int:
    """Return the image size of a ViT, from its positions; 0 if it has none."""
    patches = part.get("patch_embed.proj.weight", ABSENT)
    positions = part.get("pos_embed", ABSENT)
    if patches.ndim == 4 and positions.ndim == 3:
        for extra in (1, 0, 5):  # a class token, none, or four registers besides
            side = math.isqrt(max(0, positions.shape[1] - extra))
            if side and side * side == positions.shape[1] - extra:
                return side * patches.shape[-1]
    return 0


def fixed_positions(part: State) -> str:
    """Return whose fixed sine-cosine positions a ViT has: v3, mae, or empty for other ones.

    The first half of v3's follows rows, that of MAE's columns: v3 exchanges the axes.
    """
    positions = part.get("pos_embed", ABSENT)
    side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    if side < 2 or len(positions) != 1 or positions.shape[2] % 4 or positions.is_complex():
        return ""
    found = positions[0, 1:].float()
    v3 = build_sincos2d_pos_embed([side, side], found.shape[1], interleave_sin_cos=True)
    for name, wanted in (("v3", v3), ("mae", v3.roll(found.shape[1] // 2, 1))):
        if found.shape == wanted.shape and (found - wanted).norm() < 0.02 * wanted.norm():
            return name
    return ""


def count_channels(name: str, part: State) -> int:
    """Return the number of channels, from the first convolution of the timm model `name`."""
    details = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    first = getattr(details, "first_conv", None) or "conv1"
    name = f"{first if isinstance(first, str) else first[0]}.weight"
    # A stem of ours takes the place of timm's, whatever that has for names.
    weight = part.get(name, part.get("conv1.weight", ABSENT))
    return weight.shape[1] if weight.ndim == 4 else 3


def head_shape(head: State, queue: State) -> dict[str, Any]:
    """Describe a queue, and a head where it is one that we rebuild, by fields of `ModelConfig`."""
    found: dict[str, Any] = {}
    weights = [tensor for name, tensor in head.items() if name.endswith("weight")]
    weights = [tensor for tensor in weights if tensor.ndim == 2]
    widths = [tensor.shape[1] for tensor in weights[:1]] + [len(tensor) for tensor in weights]
    for kind in ("linear", "mlp", "mlp_bn", "mlp_bn_affine") if 2 <= len(widths) <= 9 else ():
        if kind == "linear" and len(widths) > 2:
            continue
        with torch.device("meta"):
            names = build_head(kind, widths).state_dict().keys()
        if {name for name in names if not name.endswith("num_batches_tracked")} == {
            name for name in head if not name.endswith("num_batches_tracked")
        }:
            hidden = {"head_layers": len(widths) - 1} if kind != "linear" else {}
            found = {"head": kind, "embedding_dim": widths[-1], **hidden}
            found["head_hidden_dim"] = widths[1] if len(widths) > 2 else 0
    keys = queue.get("keys", ABSENT)
    return found | ({"queue_size": len(keys)} if keys.ndim == 2 else {})
