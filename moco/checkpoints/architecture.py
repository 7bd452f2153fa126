"""Find out which network a file's tensors belong to, and build it with fresh weights.

The caller's arguments count most, then what the file says about itself, then the names and shapes
of its tensors (`shapes`), then defaults. What none of them tells is asked for.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import timm
import torch
from torch import nn

from moco.algorithm.encoder import build_backbone, build_encoder, timm_arguments, width_of_features
from moco.algorithm.names import OF_KNOWN
from moco.algorithm.own_backbone import own_name
from moco.checkpoints.layouts import Contents
from moco.checkpoints.matching import ABSENT, State, some, with_class
from moco.checkpoints.preparation import UNUSUAL, unusual
from moco.checkpoints.shapes import (
    count_channels,
    fixed_positions,
    head_shape,
    resnet_shape,
    vit_image_size,
    vit_shape,
)
from moco.config import DataConfig, ModelConfig, TrainConfig, UserError
from moco.pixels import normalisation

RANGE = ("min_value", "max_value")  # what became black and white in files of more than 8 bits
MOST = {"channels": 4096, "image_size": 8192, "width": 8, "stem_padding": 3, "num_heads": 1024}


@dataclasses.dataclass
class Architecture:
    """Everything needed to build a network; fields as in `moco.checkpoints.load.Loaded`."""

    model: ModelConfig
    data: dict[str, Any]
    variant: dict[str, Any]
    own: nn.Module | None = None


def identify(
    contents: Contents,
    part: State,
    backbone: str | nn.Module,
    image_size: int,
    told: dict[str, int],
) -> Architecture:
    """Find out the model, its images and its variant.

    Args:
        contents: The whole file.
        part: The backbone's tensors in it.
        backbone: timm name or module that replaces the file's; empty: the file's.
        image_size: Side in pixels that replaces the file's; 0: the file's.
        told: `stem_padding` and `num_heads` that replace the file's; 0: the file's.

    Raises:
        UserError: The file contradicts itself or tells too little; a size out of range.
    """
    model, said, variant, questions = look(contents, part)
    head_state = contents.take("query_encoder.head.") or contents.take("key_encoder.head.")
    head = head_shape(head_state, contents.take("queue."))
    own = backbone if isinstance(backbone, nn.Module) else None
    name = backbone if own is None else own_name(own)
    usual = {} if own is None else {name: getattr(ModelConfig(), name) for name in OF_KNOWN}
    model = dataclasses.replace(model, backbone=name or model.backbone, **head, **usual)
    if not model.backbone:
        raise UserError(
            f"{contents.path}: {some(part)} do not tell the architecture: "
            "give its timm name with --backbone"
        )
    told = {name: value for name, value in told.items() if value}
    for name, question in questions.items():
        if name not in told:
            raise UserError(f"{contents.path} ({contents.layout} layout) does not {question}")
    channels = said.get("channels") or count_channels(model.backbone, part)
    default = vit_image_size(part) or (224 if model.stem == "imagenet" else 32)
    sizes = {"channels": channels, "image_size": image_size or said.get("image_size") or default}
    _check_sizes(contents, sizes | {"width": model.width}, model, told)
    given = {name: said.get(name, []) for name in ("mean", "std")}
    sizes |= {name: said[name] for name in (*RANGE, *UNUSUAL) if name in said}
    mean, std = normalisation(DataConfig(channels=channels, **given))
    variant |= told
    if variant.get("stem_padding") == 1:
        del variant["stem_padding"]  # as `build_backbone` pads
    return Architecture(model, sizes | {"mean": mean, "std": std}, variant, own)


def look(
    contents: Contents, part: State
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return model, images and variant as a file says or shows them, and what it leaves open, to
    ask; an empty backbone means that its tensors do not tell.

    Raises:
        UserError: The file describes itself and makes no sense.
    """
    try:
        if said := _said(contents, part):
            return *said, {}
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{contents.path} describes itself wrongly: {with_class(error)}") from None
    model = _seen(contents, part)
    known, questions = dict(contents.facts), {}
    width = part.get("pos_embed", ABSENT).shape[-1:]
    if width in ((192,), (384,)) and "num_heads" not in known:
        kind = fixed_positions(part)
        if kind == "v3":
            known["num_heads"] = 12  # as in v3's ViT-S, and in solo-learn's ViT-Ti; timm: 6 and 3
        elif kind == "mae":
            questions["num_heads"] = (
                "tell the attention heads of its ViT, and its fixed positions come with several "
                "numbers: give --num_heads, such as 12 (solo-learn, MAE-Lite), or timm's 6 or 3"
            )
    if model.stem == "cifar" and "stem_padding" not in known:
        questions["stem_padding"] = (
            "tell how its 3x3 stem pads: give --stem_padding 2 for solo-learn, 1 for most other "
            "code"
        )
    return model, {}, known, questions


def _check_sizes(
    contents: Contents, sizes: dict[str, Any], model: ModelConfig, told: dict[str, int]
) -> None:
    """Raise UserError for sizes that no network here has, before anything is built with them."""
    for name, value in (sizes | told).items():
        if not 0 < value <= MOST.get(name, value):
            raise UserError(
                f"{contents.path}: {name} is {value}: at most {MOST[name]} is possible, and above 0"
            )
    if "stem_padding" in told and model.stem != "cifar":
        raise UserError(f"{contents.path} has no 3x3 stem: leave --stem_padding out")


def build(architecture: Architecture, with_head: bool) -> tuple[nn.Module, nn.Module | None, int]:
    """Build the backbone and, if asked for, the head with fresh weights; return them and D.

    Raises:
        UserError: timm does not take these arguments.
    """
    model, data, variant = architecture.model, architecture.data, architecture.variant
    head, images = None, (data["channels"], data["image_size"])
    if with_head:
        encoder = build_encoder(model, *images, architecture.own)
        network, head, feature_dim = encoder.backbone, encoder.head, encoder.feature_dim
    else:
        network, feature_dim = build_backbone(model, *images, architecture.own)
    if any(not name.startswith("stem_") for name in variant):
        arguments = constructor_arguments(architecture)
        try:
            network = timm.create_model(model.backbone, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            reason = f"{model.backbone} does not take {arguments}: {with_class(error)}"
            raise UserError(reason) from None
        feature_dim = width_of_features(network)
    if model.stem == "cifar" and "stem_padding" in variant:
        network.conv1.padding = (int(variant["stem_padding"]),) * 2
    if model.stem != "imagenet" and not variant.get("stem_relu", True):
        network.act1 = nn.Identity()
    return network, head, feature_dim


def constructor_arguments(architecture: Any) -> dict[str, Any]:
    """Return what timm's constructor is told besides the name of an `Architecture` or `Loaded`."""
    data, variant = architecture.data, architecture.variant
    arguments = {"num_classes": 0, "in_chans": data["channels"]}
    arguments |= timm_arguments(architecture.model, data["image_size"])
    return arguments | {name: v for name, v in variant.items() if not name.startswith("stem_")}


def attention_heads(network: nn.Module | None) -> int:
    """Return the heads of a transformer's first block; 0 where there is none."""
    attention = getattr(next(iter(getattr(network, "blocks", [])), None), "attn", None)
    return getattr(attention, "num_heads", 0)


def named_heads(model: ModelConfig) -> int:
    """Return the attention heads that a model's settings or its name tell; 0 if they tell none."""
    if model.num_heads or not timm.is_model(model.backbone):
        return model.num_heads
    with torch.device("meta"):  # only the shape is asked for
        return attention_heads(timm.create_model(model.backbone, pretrained=False))


def decisions(contents: Contents) -> dict[str, Any]:
    """Return what the run of a file has decided; empty in files of others."""
    decided = contents.raw.get("decided")
    return decided if isinstance(decided, dict) else {}


def is_begun_from_weights(contents: Contents) -> bool:
    """Tell whether the run of a file began from weights that were there before (`--init_from`).

    Its reading of kNN stores that, also where no labels are read.
    """
    states = contents.raw.get("callbacks")
    states = states.get("KNNMonitor") if isinstance(states, dict) else None
    return isinstance(states, dict) and states.get("is_loaded") is True


def _said(
    contents: Contents, part: State
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]] | None:
    """Return what a run's settings, the note of our exports, or timm's config say, if any."""
    if contents.layout == "moco" and "model" in contents.config:
        stored = TrainConfig.from_dict(contents.config)
        known = decisions(contents)
        ends = {name: known[name] for name in RANGE if known.get(name)}
        # Evaluation resizes bilinearly; the setting is that of the views in training.
        told = vars(stored.data) | ends | {"interpolation": "bilinear"}
        data = _data(told, stored.data.channels, stored.data.image_size)
        return stored.model, data, {}
    if isinstance(contents.raw.get("moco"), dict):
        note = contents.raw["moco"]
        names = {name: str(note[name]) for name in ("backbone", "stem")}
        model = ModelConfig(**names, width=float(note["width"]))
        data = _data(note | _preparation(note), note["channels"], note["image_size"])
        return model, data, _safe(note["variant"], part)
    if isinstance(contents.raw.get("timm"), dict):
        note = contents.raw["timm"]
        details, arguments = note.get("pretrained_cfg", {}), note.get("model_args", {})
        size = details.get("input_size", (3, 224, 224))
        # The config may keep the size of the first training; the positions show the last.
        image_size = arguments.get("img_size") or vit_image_size(part) or size[-1]
        image_size = image_size[-1] if isinstance(image_size, list) else image_size
        own = note.get("moco", {})
        own = own | _preparation(own)
        data = _data(details | own, arguments.get("in_chans", size[0]), image_size)
        return ModelConfig(backbone=note["architecture"]), data, _safe(arguments, part)
    return None


def _data(source: dict[str, Any], channels: Any, image_size: Any) -> dict[str, Any]:
    data = {"channels": int(channels), "image_size": int(image_size)}
    for name in ("mean", "std"):
        if len(source.get(name) or ()) == data["channels"]:
            data[name] = [float(value) for value in source[name]]
    for name in RANGE:
        value = source.get(name, "auto")
        values = value if isinstance(value, list) else [value]
        if value != "auto" and len(values) in (1, data["channels"]):
            data[name] = [float(each) for each in values]
    return data | unusual(source)


def _preparation(note: dict[str, Any]) -> dict[str, Any]:
    """Return what a note of ours says of the images, which older exports do not have."""
    return note.get("preparation", {})


# Arguments of timm's constructor that a file may not set: sources of weights, and our own choices.
_NOT_SHAPE = re.compile(
    ".*(pretrained|checkpoint|cache|features_only|scriptable|exportable|no_jit).*"
    "|device|dtype|num_classes|in_chans|img_size|zero_init_last"
)


def _safe(arguments: dict[str, Any], part: State) -> dict[str, Any]:
    """Return those arguments of a model's constructor that only shape the network.

    Raises:
        ValueError: A number is larger than anything in the tensors.
    """
    plain = {n: v for n, v in arguments.items() if isinstance(v, bool | int | float | str | list)}
    widest = max(1024, *(size for tensor in part.values() for size in tensor.shape))
    for name, value in plain.items():
        most = len(part) if re.search("depth|layers|blocks", name) else widest
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(v, int | float) and not v <= most for v in numbers):
            raise ValueError(f"{name} is {value}")
    return {name: value for name, value in plain.items() if not _NOT_SHAPE.fullmatch(name)}


def is_named(contents: Contents) -> bool:
    """Tell whether a file names its network, which else is found out from its tensors."""
    said = (contents.config.get("model"), contents.raw.get("moco"), contents.raw.get("timm"))
    return any(isinstance(each, dict) for each in said) or bool(_of_arch(contents))


def _of_arch(contents: Contents) -> str:
    """Return the timm name of what a file calls `arch`; empty where that is none."""
    arch, found = contents.raw.get("arch"), ""
    for name in (arch, f"{arch}_patch16_224"):  # the second is what v3 calls vit_small, vit_base
        if isinstance(arch, str) and timm.is_model(name):
            found = name
    return found


def _seen(contents: Contents, part: State) -> ModelConfig:
    """Describe a model by its `arch` and tensors; an empty backbone means that they do not tell."""
    shape = {"backbone": ""} | (resnet_shape(part) or vit_shape(part))
    return ModelConfig(**shape | ({"backbone": name} if (name := _of_arch(contents)) else {}))
