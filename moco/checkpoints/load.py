"""Load an encoder from any checkpoint: the one loader behind `--checkpoint` and `--init_from`.

It reads the file (`read`), translates its names (`layouts`), finds the network (`architecture`)
and fills it (`matching`). Shapes: N images, D feature, C embedding, K queue.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import adapt_input_conv
from torch import nn

from moco.algorithm.encoder import TORCHVISION_RESNETS, timm_arguments
from moco.algorithm.names import is_own
from moco.checkpoints.architecture import (
    Architecture,
    attention_heads,
    build,
    identify,
    look,
    named_heads,
)
from moco.checkpoints.layouts import Contents, read_contents
from moco.checkpoints.matching import Match, State, groups, match_state, shape_text, take
from moco.checkpoints.preparation import Preparation, preparation, pretrained_cfg
from moco.checkpoints.shapes import head_shape
from moco.config import ModelConfig, UserError

# Layouts whose checkpoints hold heads and a queue as ours do.
_WITH_HEADS = ("moco", "official", "official-v3", "openselfsup", "mmpretrain")


@dataclass
class Loaded:
    """An encoder from a file, and what was found out about it.

    Attributes:
        backbone: In eval mode; takes normalised images N x channels x H x W to features N x D. It
            has the attributes `transform`, a `Preparation`, and `pretrained_cfg`, as timm reads it.
        head: Takes features to embeddings N x C; None where the file has no linear or MLP head.
        model: Backbone, stem, width, head; the rest as in the file's settings or at its default.
        data: channels, image_size, mean and std (on a 0-1 scale) of the images that it expects;
            min_value and max_value where the files had more than 8 bits; exif, crop_pct and
            interpolation where the file says something unusual.
        layout: moco, official, official-v3, openselfsup, lightly, solo-learn, torchvision, timm,
            safetensors.
        encoder: query, key, or backbone where the file holds only one.
        report: One line that says what matched, what was left out and what is missing.
        variant: What `model` and `data` do not say: arguments for timm, and `stem_padding`.
        own: The module that was given in the place of a name, as it was; else None.
        config: Settings of the run that wrote the file, or empty.
    """

    backbone: nn.Module
    head: nn.Module | None
    model: ModelConfig
    data: dict[str, Any]
    layout: str
    encoder: str
    report: str
    epoch: int | None
    feature_dim: int
    variant: dict[str, Any] = field(default_factory=dict)
    own: nn.Module | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def preparation(self) -> Preparation:
        """Return how an image becomes the backbone's input."""
        return preparation(self.data)


def load_backbone(
    path: str | Path, encoder: Literal["query", "key"] = "query", **options: Any
) -> nn.Module:
    """Return a checkpoint's backbone in eval mode; arguments as for `load_encoder`.

    Its `transform` takes a PIL image, or a uint8 tensor, to the input of the backbone (see
    `moco.checkpoints.preparation`), and `timm.data.resolve_model_data_config` reads its
    `pretrained_cfg`.
    """
    return load_encoder(path, encoder, **options).backbone


def load_encoder(
    path: str | Path,
    encoder: Literal["query", "key"] = "query",
    allow_partial: bool = False,
    backbone: str | nn.Module = "",
    image_size: int = 0,
    stem_padding: int = 0,
    num_heads: int = 0,
) -> Loaded:
    """Load one encoder from a file of any layout; torch's random generator is not advanced.

    Args:
        path: Checkpoint of ours, of the official code, lightly or solo-learn; a state dict of
            torchvision or timm; safetensors; a directory as timm writes it.
        encoder: Which of two encoders.
        allow_partial: Accept a file that fits only in part; the report says what stays random.
        backbone: timm name, which replaces what the file says or shows; or a module of your own,
            a copy of which takes the weights.
        image_size: Side in pixels; a ViT's positions are resampled to it. 0: as in the file.
        stem_padding: Padding of a 3x3 stem, which no tensor shows. 0: as in the file.
        num_heads: Attention heads of a ViT, which no tensor shows. 0: as in the file.

    Raises:
        UserError: Unreadable or unsafe file, unknown architecture, nothing or only a part matched.
    """
    contents = read_contents(path)
    part = contents.backbone(encoder)
    told = {"stem_padding": stem_padding, "num_heads": num_heads}
    architecture = identify(contents, part, backbone, image_size, told)
    head_state = contents.take(f"{encoder}_encoder.head.")
    network, head, feature_dim, found = _fill(path, architecture, part, head_state, allow_partial)
    layout = contents.layout
    if (
        layout == "torchvision"
        and architecture.own is None
        and architecture.model.backbone not in TORCHVISION_RESNETS
    ):
        layout = "timm"
    loaded = Loaded(
        **vars(architecture),
        backbone=network.eval(),
        head=head,
        layout=layout,
        encoder="backbone" if contents.plain else encoder,
        report="",
        epoch=contents.epoch,
        feature_dim=feature_dim,
        config=contents.config,
    )
    loaded.report = _report(loaded, contents, found)
    _tell_of_images(loaded)
    return loaded


def _tell_of_images(loaded: Loaded) -> None:
    """Give a backbone its `transform`, and in timm's `pretrained_cfg` what its file says."""
    network, own = loaded.backbone, loaded.own is not None
    fixed = own or "img_size" in timm_arguments(loaded.model, loaded.data["image_size"])
    known = {} if own else getattr(network, "pretrained_cfg", {})
    network.pretrained_cfg = pretrained_cfg(known, loaded.data, fixed)
    network.default_cfg = network.pretrained_cfg  # timm's older name
    network.transform = loaded.preparation


def _fill(
    path: str | Path, architecture: Architecture, part: State, head_state: State, partly: bool
) -> tuple[nn.Module, nn.Module | None, int, Match]:
    """Build a network and its head, and load a file's tensors into them."""
    name = architecture.model.backbone
    with torch.random.fork_rng(devices=[]):
        with nullcontext() if architecture.own is not None else torch.device("meta"):
            # The shapes must fit before memory is taken for them; an own module is there already.
            blueprint, _, _ = build(architecture, False)
        found = match_state(blueprint.state_dict(), part, blueprint)
        found.check(path, name, "take another --backbone, or --allow_partial", partly)
        if found.absent > 2**31:
            raise UserError(f"{path}: {name} needs {found.absent} numbers more than it holds")
        network, head, feature_dim = build(architecture, "head" in head_shape(head_state, {}))
    network.load_state_dict(found.matched, strict=False)
    if head is not None:
        found_head = match_state(head.state_dict(), head_state)
        head = head.eval() if found_head.whole else None
        if head is not None:
            head.load_state_dict(found_head.matched)
    return network, head, feature_dim, found


def restore_pretraining(
    path: str | Path,
    module_state: State,
    backbone: nn.Module | None = None,
    allow_partial: bool = False,
) -> tuple[State, str]:
    """Fill a fresh MoCo module's state dict with everything in a file that fits.

    A checkpoint of ours, of the official code or of OpenSelfSup gives both encoders and, where
    their shapes agree, the heads and the queue. Another layout gives its backbone to both. The rest
    stays fresh.

    Args:
        path: As for `load_encoder`.
        module_state: State dict of a module just built; it is not changed.
        backbone: Its backbone. A ViT's positions and the RGB weights of a first convolution are
            fitted to it.
        allow_partial: Accept a file that fits only in part, or whose network a run cannot build.

    Returns:
        The filled state dict, and one line that says what came from the file and what did not.

    Raises:
        UserError: As for `load_encoder`.
    """
    contents = read_contents(path)
    notes = [_refuse_variant(contents, backbone, allow_partial)]
    both = contents.layout in _WITH_HEADS
    both = both and bool(contents.take("key_encoder.backbone."))
    state = dict(module_state)
    for side in ("query", "key"):
        prefix = f"{side}_encoder.backbone."
        part, adapted = _to_channels(contents.backbone(side if both else "query"), backbone)
        found = match_state(take(state, prefix), part, backbone)
        remedy = "set model.backbone, stem and width as in the file, or give --allow_partial"
        found.check(path, "model.backbone", remedy, allow_partial)
        state |= {prefix + name: tensor.clone() for name, tensor in found.matched.items()}
    origin = "both encoders" if both else "query encoder, key encoder = its copy"
    notes += [f"{contents.layout} layout, backbone: {origin}, each {found.text()}", adapted]
    notes.append(_restore_heads_and_queue(contents, state))
    return state, "; ".join(filter(None, notes))


def _refuse_variant(contents: Contents, network: nn.Module | None, allowed: bool) -> str:
    """Refuse a file of another network than the run's, or return a note about it."""
    model, _, known, questions = look(contents, contents.backbone("query"))
    heads = attention_heads(network)
    if is_own(model.backbone):  # names and shapes of its tensors are compared, and nothing else
        return ""
    if heads and not {"num_heads"} & {*known, *questions} and (own := named_heads(model)):
        known["num_heads"] = own
    if heads and known.get("num_heads", heads) != heads:
        wanted = known["num_heads"]
        if not allowed:
            raise UserError(
                f"{contents.path} is of a ViT with {wanted} attention heads, and the run's has "
                f"{heads}: set model.num_heads {wanted}, or give --allow_partial to start from its "
                "weights all the same"
            )
    elif heads:
        known.pop("num_heads", None)
    reasons = {"num_heads": "{} attention heads", "stem_relu": "no ReLU after its first BatchNorm"}
    reasons["stem_padding"] = "a stem that pads by {}"
    if known.get("stem_padding") == 1:
        del known["stem_padding"]  # as in a run
    found = [text.format(known[name]) for name, text in reasons.items() if name in known]
    if found and not allowed:
        raise UserError(
            f"{contents.path} is of a network with {' and '.join(found)}, which no run here "
            "builds: take another, or give --allow_partial to start from its weights all the same"
        )
    unclear = [f"the file does not tell its {name}" for name in questions]
    return "; ".join([*(f"not kept: {text}" for text in found), *unclear])


def _to_channels(part: State, network: nn.Module | None) -> tuple[State, str]:
    """Fit the RGB weights of a first convolution to other channels, as timm does."""
    first = getattr(network, "pretrained_cfg", {}).get("first_conv")
    name = f"{first[0] if isinstance(first, list | tuple) else first}.weight"
    goal = {} if network is None else network.state_dict()
    if name not in part or name not in goal or part[name].shape[1:2] != (3,):
        return part, ""
    channels, weight = goal[name].shape[1], part[name]
    if channels == 3 or weight.ndim != 4 or not weight.is_floating_point():
        return part, ""
    fitted = adapt_input_conv(channels, weight)
    return part | {name: fitted}, f"first convolution fitted from 3 channels to {channels}"


def _restore_heads_and_queue(contents: Contents, state: State) -> str:
    """Fill heads, predictor and queues in place; all mean something only to their own heads."""
    prefixes = ("query_encoder.head.", "key_encoder.head.", "predictor.", "queue.", "second_queue.")
    found = {p: match_state(take(state, p), contents.take(p)) for p in prefixes}
    for side in ("query", "key"):
        head = found[f"{side}_encoder.head."]
        if not contents.take(f"{side}_encoder.head."):
            return f"heads and queue stay fresh, the file has no {side} head"
        if contents.layout not in _WITH_HEADS or not head.whole:
            return f"heads and queue stay fresh, the file's {side} head: {head.text()}"
    for prefix in [prefix for prefix in prefixes if found[prefix].whole]:
        state |= {prefix + name: t.clone() for name, t in found[prefix].matched.items()}
    said = ["heads"]
    for prefix in prefixes[2:]:
        name = prefix[:-1].replace("_", " ")
        if not take(state, prefix):
            said += [f"left out: the file's {name}"] if contents.take(prefix) else []
            continue
        keys = state.get(f"{prefix}keys")
        shape = "" if keys is None else f" of {shape_text(keys)}"
        fresh = f"the {name} stays fresh, the file's: {found[prefix].text()}"
        said.append(f"{name}{shape}" if found[prefix].whole else fresh)
    return "; ".join(said)


def _report(loaded: Loaded, contents: Contents, found: Match) -> str:
    """Say on one line what was loaded, what matched, what was left out and what is missing."""
    model, data = loaded.model, loaded.data
    side = "key" if loaded.encoder == "key" else "query"
    used = f"{side}_encoder." if loaded.head else f"{side}_encoder.backbone."
    left_out = [name for name in contents.state if not name.startswith(used)]
    left_out += [*contents.others, *found.left_out]
    about = [
        f"{loaded.layout} layout",
        "" if loaded.epoch is None else f"epoch {loaded.epoch}",
        loaded.encoder + ("" if loaded.encoder == "backbone" else " encoder"),
        model.backbone + (f", {model.stem} stem" if hasattr(loaded.backbone, "conv1") else ""),
        f"width {model.width:g}" if model.width != 1 else "",
        f"{data['channels']} channels, {data['image_size']} px",
    ]
    return f"{', '.join(filter(None, about))}: {found.text()}; left out: {groups(left_out)}"
