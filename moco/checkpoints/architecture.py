"""Find out which network a file's tensors belong to, and build it with fresh weights.

The caller's arguments count most, then what the file says about itself, then the names and shapes
of its tensors, then defaults. Shapes: D feature; positions of a ViT 1 x (tokens + side^2) x D.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import timm
from torch import nn

from moco.algorithm.encoder import build_backbone, build_encoder
from moco.checkpoints.layouts import Contents
from moco.checkpoints.matching import ABSENT, State, match_state, one_line, some
from moco.config import DataConfig, ModelConfig, UserError, normalisation


@dataclasses.dataclass
class Architecture:
    """Everything needed to build a network; fields as in `moco.checkpoints.load.Loaded`."""

    model: ModelConfig
    data: dict[str, Any]
    variant: dict[str, Any]


def identify(contents: Contents, part: State, backbone: str, image_size: int) -> Architecture:
    """Find out the model, its images and its variant.

    Args:
        contents: The whole file.
        part: The backbone's tensors in it.
        backbone: timm name that replaces the file's; empty: the file's.
        image_size: Side in pixels that replaces the file's; 0: the file's.

    Raises:
        UserError: The file contradicts itself or tells too little; a negative size.
    """
    try:
        model, said, variant = _said(contents)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{contents.path} describes itself wrongly: {one_line(error)}") from None
    model = model or _seen(contents, part)
    model = dataclasses.replace(model, backbone=backbone or model.backbone, **_head(contents))
    if not model.backbone:
        raise UserError(
            f"{contents.path}: {some(part)} do not tell the architecture: "
            "give its timm name with --backbone"
        )
    if image_size < 0:
        raise UserError(f"image_size is {image_size}: give pixels, or 0 for the file's own")
    channels = said.get("channels") or _channels(model.backbone, part)
    mean, std = normalisation(DataConfig(channels=channels))
    data = {"channels": channels, "mean": mean, "std": std} | said
    # timm's config may keep the size of the first training; the positions show the last.
    default = said.get("image_size") or (32 if model.stem == "cifar" else 224)
    data["image_size"] = image_size or _vit_image_size(part) or default
    return Architecture(model, data, contents.variant() | variant)


def build(architecture: Architecture, head_state: State) -> tuple[nn.Module, nn.Module | None, int]:
    """Build the backbone with fresh weights and the head with the file's; return them and D.

    Raises:
        UserError: timm does not take these arguments.
    """
    model, data, variant = architecture.model, architecture.data, architecture.variant
    head = None
    if _head_kind(head_state):
        encoder = build_encoder(model, data["channels"], data["image_size"])
        network, feature_dim = encoder.backbone, encoder.feature_dim
        found = match_state(encoder.head.state_dict(), head_state)
        if found.whole:
            head = encoder.head.eval()
            head.load_state_dict(found.matched)
    else:
        network, feature_dim = build_backbone(model, data["channels"], data["image_size"])
    arguments = {name: value for name, value in variant.items() if name != "stem_padding"}
    if arguments:
        network = _rebuild(network, architecture, arguments)
    if "stem_padding" in variant:
        network.conv1.padding = (int(variant["stem_padding"]),) * 2
    return network, head, feature_dim


def _rebuild(
    network: nn.Module, architecture: Architecture, arguments: dict[str, Any]
) -> nn.Module:
    """Build a network with arguments that only timm's constructor takes."""
    name, data = architecture.model.backbone, architecture.data
    if has_fixed_size(network):
        arguments = arguments | {"img_size": data["image_size"]}
    try:
        return timm.create_model(name, num_classes=0, in_chans=data["channels"], **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{name} does not take {arguments}: {one_line(error)}") from None


def has_fixed_size(network: nn.Module) -> bool:
    """Tell whether a network, such as a ViT, is built for one image size."""
    return bool(getattr(getattr(network, "patch_embed", None), "img_size", None))


def _said(contents: Contents) -> tuple[ModelConfig | None, dict[str, Any], dict[str, Any]]:
    """Return what a run's settings, the note of our exports, or timm's config say."""
    if "model" in contents.config:
        model = _known_fields(ModelConfig, contents.config["model"])
        data = _known_fields(DataConfig, contents.config["data"])
        mean, std = normalisation(data)
        return model, _data({"mean": mean, "std": std}, data.channels, data.image_size), {}
    if isinstance(contents.raw.get("moco"), dict):
        note = contents.raw["moco"]
        names = {name: str(note[name]) for name in ("backbone", "stem")}
        model = ModelConfig(**names, width=float(note["width"]))
        return model, _data(note, note["channels"], note["image_size"]), _safe(note["variant"])
    if isinstance(contents.raw.get("timm"), dict):
        note = contents.raw["timm"]
        details, arguments = note.get("pretrained_cfg", {}), note.get("model_args", {})
        size = details.get("input_size", (3, 224, 224))
        data = _data(details, arguments.get("in_chans", size[0]), size[-1])
        return ModelConfig(backbone=note["architecture"]), data, _safe(arguments)
    return None, {}, {}


def _known_fields(kind: type, values: dict[str, Any]) -> Any:
    """Make a group of settings; names of other versions of this program are ignored."""
    names = {item.name for item in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def _data(source: dict[str, Any], channels: Any, image_size: Any) -> dict[str, Any]:
    data = {"channels": int(channels), "image_size": int(image_size)}
    for name in ("mean", "std"):
        if len(source.get(name) or ()) == data["channels"]:
            data[name] = [float(value) for value in source[name]]
    return data


# Arguments of timm's constructor that a file may not set: sources of weights, and our own choices.
_NOT_SHAPE = re.compile(
    ".*(pretrained|checkpoint|cache|features_only|scriptable|exportable|no_jit).*"
    "|device|dtype|num_classes|in_chans|img_size|zero_init_last"
)


def _safe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of a model's constructor that only shape the network."""
    plain = (bool, int, float, str, list)
    pairs = ((k, v) for k, v in arguments.items() if isinstance(v, plain))
    return {name: value for name, value in pairs if not _NOT_SHAPE.fullmatch(name)}


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
_VITS = {
    "192x12": "tiny",
    "384x12": "small",
    "768x12": "base",
    "1024x24": "large",
    "1280x32": "huge",
}
# `arch` in files of v3 to the name of the same network in timm.
_V3_VITS = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}


def _seen(contents: Contents, part: State) -> ModelConfig:
    """Describe a model by its `arch` and tensors; an empty backbone means that they do not tell."""
    shape = resnet_shape(part) or _vit_shape(part)
    arch = contents.raw.get("arch")
    if isinstance(arch, str) and timm.is_model(_V3_VITS.get(arch, arch)):
        shape["backbone"] = _V3_VITS.get(arch, arch)
    return ModelConfig(**{"backbone": ""} | shape)


def resnet_shape(part: State) -> dict[str, Any]:
    """Return backbone, stem and width of a ResNet, from its shapes; empty if it is none."""
    kind, last = ("bottleneck", 3) if "layer4.0.conv3.weight" in part else ("basic", 2)
    names = ("conv1", "layer1.0.conv2", f"layer1.0.conv{last}", f"layer4.0.conv{last}")
    weights = [part.get(f"{name}.weight", ABSENT) for name in names]
    if any(weight.ndim != 4 for weight in weights):
        return {}
    stem, middle, first, final = weights
    expansion = 4 if kind == "bottleneck" else 1
    blocks = [{k.split(".")[1] for k in part if k.startswith(f"layer{n}.")} for n in (1, 2, 3, 4)]
    name = f"{'-'.join(str(len(block)) for block in blocks)} {kind}"
    groups = len(middle) // middle.shape[1] if kind == "bottleneck" else 1
    group_width = round(64 * expansion * len(middle) / groups / len(first))
    if (groups, group_width) != (1, 64):
        name += f" {groups}x{group_width}"
    return {
        "backbone": _RESNETS.get(name, ""),
        "stem": "cifar" if stem.shape[-1] == 3 else "imagenet",
        "width": len(final) / expansion / 512,
    }


def _vit_shape(part: State) -> dict[str, Any]:
    """Return the name of a ViT, from its shapes; empty if it is none."""
    patches = part.get("patch_embed.proj.weight", ABSENT)
    depth = len({name.split(".")[1] for name in part if name.startswith("blocks.")})
    if patches.ndim != 4 or f"{len(patches)}x{depth}" not in _VITS:
        return {}
    name = f"vit_{_VITS[f'{len(patches)}x{depth}']}_patch{patches.shape[-1]}_224"
    return {"backbone": name} if timm.is_model(name) else {}


def _vit_image_size(part: State) -> int:
    """Return the image size of a ViT, from its positions; 0 if it has none."""
    patches = part.get("patch_embed.proj.weight", ABSENT)
    positions = part.get("pos_embed", ABSENT)
    if patches.ndim == 4 and positions.ndim == 3:
        for extra in (1, 0, 5):  # a class token, none, or four registers besides
            side = math.isqrt(max(0, positions.shape[1] - extra))
            if side and side * side == positions.shape[1] - extra:
                return side * patches.shape[-1]
    return 0


def _channels(name: str, part: State) -> int:
    """Return the number of channels, from the first convolution."""
    details = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    first = getattr(details, "first_conv", None) or "conv1"
    weight = part.get(f"{first if isinstance(first, str) else first[0]}.weight", ABSENT)
    return weight.shape[1] if weight.ndim == 4 else 3


def _head(contents: Contents) -> dict[str, Any]:
    """Describe the head and the queue of a file by fields of `ModelConfig`."""
    head = contents.take("query_encoder.head.")
    weights = [head[name] for name in ("weight", "0.weight", "2.weight") if name in head]
    found: dict[str, Any] = {}
    if _head_kind(head):
        found = {"head": _head_kind(head), "embedding_dim": len(weights[-1])}
        found["head_hidden_dim"] = len(weights[0]) if len(weights) == 2 else 0
    keys = contents.state.get("queue.keys", ABSENT)
    return found | ({"queue_size": len(keys)} if keys.ndim == 2 else {})


def _head_kind(head: State) -> str:
    """Return linear or mlp; empty where the file has no head that we can rebuild."""
    names = {"weight bias": "linear", "0.weight 0.bias 2.weight 2.bias": "mlp"}
    kinds = [kind for text, kind in names.items() if set(text.split()) == set(head)]
    return kinds[0] if kinds and all(t.ndim == 2 for n, t in head.items() if "weight" in n) else ""
