"""Load an encoder from any checkpoint: the one loader behind `--checkpoint` and `--init_from`.

It reads the file (`read`), translates its names (`layouts`), finds the network (`architecture`)
and fills it (`matching`). Shapes: N images, D feature, C embedding, K queue.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moco.algorithm.encoder import TORCHVISION_RESNETS
from moco.checkpoints.architecture import build, identify
from moco.checkpoints.layouts import Contents, recognise
from moco.checkpoints.matching import Match, State, groups, match_state, shape_text, take
from moco.checkpoints.read import read_state
from moco.config import ModelConfig, UserError


@dataclass
class Loaded:
    """An encoder from a file, and what was found out about it.

    Attributes:
        backbone: In eval mode; takes normalised images N x channels x H x W to features N x D.
        head: Takes features to embeddings N x C; None where the file has no linear or MLP head.
        model: Backbone, stem, width, head; the rest as in the file's settings or at its default.
        data: channels, image_size, mean and std (on a 0-1 scale) of the images that it expects.
        layout: moco, official, official-v3, lightly, solo-learn, torchvision, timm, safetensors.
        encoder: query, key, or backbone where the file holds only one.
        report: One line that says what matched, what was left out and what is missing.
        variant: What `model` and `data` do not say: arguments for timm, and `stem_padding`.
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
    config: dict[str, Any] = field(default_factory=dict)


def load_backbone(
    path: str | Path,
    encoder: Literal["query", "key"] = "query",
    allow_partial: bool = False,
    backbone: str = "",
    image_size: int = 0,
) -> nn.Module:
    """Return a checkpoint's backbone in eval mode; arguments as for `load_encoder`."""
    return load_encoder(path, encoder, allow_partial, backbone, image_size).backbone


def load_encoder(
    path: str | Path,
    encoder: Literal["query", "key"] = "query",
    allow_partial: bool = False,
    backbone: str = "",
    image_size: int = 0,
) -> Loaded:
    """Load one encoder from a file of any layout; torch's random generator is not advanced.

    Args:
        path: Checkpoint of ours, of the official code, lightly or solo-learn; a state dict of
            torchvision or timm; safetensors; a directory as timm writes it.
        encoder: Which of two encoders.
        allow_partial: Accept a file that fits only in part; the report says what stays random.
        backbone: timm name, which replaces what the file says or shows.
        image_size: Side in pixels; a ViT's positions are resampled to it. 0: as in the file.

    Raises:
        UserError: Unreadable or unsafe file, unknown architecture, nothing or only a part matched.
    """
    contents = read_contents(path)
    part = contents.backbone(encoder)
    architecture = identify(contents, part, backbone, image_size)
    with torch.random.fork_rng(devices=[]):
        head_state = contents.take(f"{encoder}_encoder.head.")
        network, head, feature_dim = build(architecture, head_state)
    found = match_state(network.state_dict(), part, network)
    name = architecture.model.backbone
    found.check(path, name, "take another --backbone, or --allow_partial", allow_partial)
    network.load_state_dict(found.matched, strict=False)
    loaded = Loaded(
        **vars(architecture),
        backbone=network.eval(),
        head=head,
        layout=_layout_name(contents, name),
        encoder="backbone" if contents.plain else encoder,
        report="",
        epoch=contents.epoch,
        feature_dim=feature_dim,
        config=contents.config,
    )
    loaded.report = _report(loaded, contents, found)
    return loaded


def restore_pretraining(path: str | Path, module_state: State) -> tuple[State, str]:
    """Fill a fresh MoCo module's state dict with everything in a file that fits.

    A checkpoint of ours or of the official code gives both encoders and, where their shapes agree,
    the heads and the queue. Another layout gives its backbone to both. The rest stays fresh.

    Args:
        path: As for `load_encoder`.
        module_state: State dict of a module just built; it is not changed.

    Returns:
        The filled state dict, and one line that says what came from the file and what did not.

    Raises:
        UserError: As for `load_encoder`.
    """
    contents = read_contents(path)
    contents.backbone("query")  # raises where the file has none
    if "num_heads" in contents.variant():
        raise UserError(f"{path} is v3's ViT-S of 12 attention heads, timm's has 6: take another")
    both = contents.layout in ("moco", "official", "official-v3")
    both = both and bool(contents.take("key_encoder.backbone."))
    state = dict(module_state)
    for side in ("query", "key"):
        prefix = f"{side}_encoder.backbone."
        found = match_state(take(state, prefix), contents.backbone(side if both else "query"))
        found.check(path, "model.backbone", "set model.backbone, stem and width as in the file")
        state |= {prefix + name: tensor.clone() for name, tensor in found.matched.items()}
    origin = "both encoders" if both else "query encoder, key encoder = its copy"
    notes = [f"{contents.layout} layout, backbone: {origin}, each {found.text()}"]
    if contents.variant():
        notes.append(f"the file's {contents.variant()} is not kept")
    notes.append(_restore_heads_and_queue(contents, state))
    return state, "; ".join(notes)


def _restore_heads_and_queue(contents: Contents, state: State) -> str:
    """Fill heads and queue in place; the keys in a queue only mean something to their own heads."""
    for side in ("query", "key"):
        prefix = f"{side}_encoder.head."
        found = match_state(take(state, prefix), contents.take(prefix))
        if contents.layout not in ("moco", "official") or not found.whole:
            return f"heads and queue stay fresh, the file's {side} head: {found.text()}"
    heads = {name: value for name, value in contents.state.items() if "_encoder.head." in name}
    state |= {name: value.to(state[name].dtype).clone() for name, value in heads.items()}
    queue = contents.take("queue.")
    found = match_state(take(state, "queue."), queue)
    if not found.whole:
        return f"heads; the queue stays fresh, the file's: {found.text()}"
    state |= {f"queue.{name}": value.clone() for name, value in found.matched.items()}
    return f"heads; queue of {shape_text(queue['keys'])}"


def read_contents(path: str | Path) -> Contents:
    """Read a file with its tensors under our names; raises as `read_state` and `recognise` do."""
    return recognise(read_state(path), path)


def _layout_name(contents: Contents, backbone: str) -> str:
    """Return the layout, where torchvision becomes timm for networks that it does not have."""
    ambiguous = contents.layout == "torchvision"
    return "timm" if ambiguous and backbone not in TORCHVISION_RESNETS else contents.layout


def _report(loaded: Loaded, contents: Contents, found: Match) -> str:
    side = "key" if loaded.encoder == "key" else "query"
    used = f"{side}_encoder." if loaded.head else f"{side}_encoder.backbone."
    left_out = [name for name in contents.state if not name.startswith(used)] + contents.others
    left_out += [f"classifier.{name}" for name in found.classifier]
    return f"{_describe(loaded)}: {found.text()}; left out: {groups(left_out)}"


def _describe(loaded: Loaded) -> str:
    model, data = loaded.model, loaded.data
    stem = f", {model.stem} stem" if hasattr(loaded.backbone, "conv1") else ""
    width = f", width {model.width:g}" if model.width != 1 else ""
    epoch = "" if loaded.epoch is None else f", epoch {loaded.epoch}"
    images = f"{data['channels']} channels, {data['image_size']} px"
    encoder = loaded.encoder + ("" if loaded.encoder == "backbone" else " encoder")
    return f"{loaded.layout} layout{epoch}, {encoder}, {model.backbone}{stem}{width}, {images}"
