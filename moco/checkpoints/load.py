"""Load an encoder from any checkpoint, to judge it, export it or compute features.

It reads the file (`read`), translates its names (`layouts`), finds the network (`architecture`)
and fills it (`matching`). Shapes: N images, D feature, C embedding, K queue.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moco.algorithm.encoder import TORCHVISION_RESNETS, timm_arguments
from moco.checkpoints.architecture import (
    Architecture,
    build,
    decisions,
    identify,
    is_begun_from_weights,
)
from moco.checkpoints.layouts import Contents, read_contents
from moco.checkpoints.matching import Match, State, groups, match_state
from moco.checkpoints.preparation import Preparation, preparation, pretrained_cfg
from moco.checkpoints.read import tensors_beside
from moco.checkpoints.shapes import head_shape
from moco.config import ModelConfig, UserError


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
        layout: moco, official, official-v3, openselfsup, mmpretrain, lightly, solo-learn,
            torchvision, timm, safetensors.
        encoder: query, key, or backbone where the file holds only one.
        report: One line that says what matched, what was left out and what is missing.
        variant: What `model` and `data` do not say: arguments for timm, and `stem_padding`.
        own: The module that was given in the place of a name, as it was; else None.
        config: Settings of the run that wrote the file, or empty.
        images: What tells the images of that run from others, or empty.
        held_out: How many of them it has set aside.
        is_begun: Whether that run began from weights that were there before.
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
    images: dict[str, Any] = field(default_factory=dict)
    held_out: int = 0
    is_begun: bool = False

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
    contents = read_contents(path, backbone if isinstance(backbone, nn.Module) else None)
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
        images=contents.raw.get("images") or {},
        held_out=decisions(contents).get("held_out") or 0,
        is_begun=is_begun_from_weights(contents),
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


def _report(loaded: Loaded, contents: Contents, found: Match) -> str:
    """Say on one line what was loaded, what matched, what was left out and what is missing."""
    model, data = loaded.model, loaded.data
    side = "key" if loaded.encoder == "key" else "query"
    used = f"{side}_encoder." if loaded.head else f"{side}_encoder.backbone."
    left_out = [name for name in contents.state if not name.startswith(used)]
    left_out += [*contents.others, *found.left_out, *tensors_beside(contents.raw)]
    about = [
        f"{loaded.layout} layout",
        "" if loaded.epoch is None else f"epoch {loaded.epoch}",
        loaded.encoder + ("" if loaded.encoder == "backbone" else " encoder"),
        model.backbone + (f", {model.stem} stem" if hasattr(loaded.backbone, "conv1") else ""),
        f"width {model.width:g}" if model.width != 1 else "",
        f"{data['channels']} channels, {data['image_size']} px",
    ]
    return f"{', '.join(filter(None, about))}: {found.text()}; left out: {groups(left_out)}"
