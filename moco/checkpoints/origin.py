"""Origin: what a file says of its network and images to a run that starts from its weights."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from moco.algorithm.names import is_own
from moco.algorithm.vit import is_vit, published_width
from moco.checkpoints.architecture import RANGE, look
from moco.checkpoints.layouts import read_contents
from moco.checkpoints.matching import State
from moco.checkpoints.shapes import fixed_positions
from moco.config import ModelConfig, UserError

# Settings that say which network a backbone is; those of a ViT have no `auto`.
OF_VIT = ("patch_size", "depth", "num_heads", "positions")
NETWORK = ("backbone", "stem", "width", *OF_VIT)
# Arguments that `restore_pretraining` compares with the run's network.
_COMPARED = ("stem_padding", "stem_relu", "num_heads")
# Arguments of timm's that change no feature of an image.
_NO_FUNCTION = re.compile(".*drop.*|dynamic_img_(size|pad)|strict_img_size")


@dataclass
class Origin:
    """What a file says.

    Attributes:
        path: Of the file.
        network: Values of the settings NETWORK; empty where the file does not tell its network.
        pixels: `mean` and `std` on a 0-1 scale, `min_value` and `max_value`, those that it tells.
        problem: Why a run cannot build its network from this alone, or empty.
        remedy: What the user can do then.
    """

    path: str | Path
    network: dict[str, Any] = field(default_factory=dict)
    pixels: dict[str, list[float]] = field(default_factory=dict)
    problem: str = ""
    remedy: str = "name the network with model.backbone, model.stem and model.width"

    def settings(self, asked: ModelConfig) -> dict[str, Any]:
        """Return what the file gives to settings of the network that the user leaves open.

        Raises:
            UserError: The backbone is `auto` and the file does not say enough.
        """
        if asked.backbone == "auto":
            if self.problem and not ("attention heads" in self.problem and asked.num_heads):
                raise UserError(f"{self.path} {self.problem}: {self.remedy}")
        elif asked.backbone != self.network.get("backbone"):
            return {}
        usual, found = ModelConfig(), {}
        for name, value in self.network.items():
            now = getattr(asked, name)
            is_open = now == "auto" or (name in OF_VIT and now == getattr(usual, name))
            if is_open and value != now:
                found[f"model.{name}"] = value
        return found


def describe(path: str | Path, own: nn.Module | None = None) -> Origin:
    """Say what network a file's weights are of, and how its images are to be normalised.

    Args:
        path: Of the file.
        own: The module of the user's own that gets its weights; it says which names are its.

    Raises:
        UserError: As for `moco.checkpoints.load.load_encoder`.
    """
    contents = read_contents(path, own)
    part = contents.backbone("query")
    model, said, known, questions = look(contents, part)
    for name in NETWORK:
        value, usual = getattr(model, name), getattr(ModelConfig(), name)
        if not isinstance(value, int | float if isinstance(usual, int | float) else str):
            raise UserError(f"{path} describes itself wrongly: {name} is {value!r}")
    pixels = {name: said[name] for name in ("mean", "std", *RANGE) if said.get(name)}
    origin = Origin(path, pixels=pixels)
    if is_own(model.backbone):
        origin.problem = f"is of {model.backbone}, a module that only Python has"
        origin.remedy = "give it to moco.pretrain(images, backbone=module, init_from=FILE)"
    elif not timm.is_model(model.backbone):
        origin.problem = "does not tell its network"
    else:
        model, beyond = translated(model, known, part)
        origin.network = {name: getattr(model, name) for name in NETWORK}
        if beyond:
            what = ", ".join(f"{name} {value}" for name, value in beyond.items())
            origin.problem = f"is of a network with {what}, which no setting of a run has"
            origin.remedy = "give --model.backbone to start from its weights all the same"
        elif questions:
            words = {"num_heads": "attention heads", "stem_padding": "padding of a 3x3 stem"}
            missing = " and ".join(words.get(name, name) for name in questions)
            remedy = ", which model.num_heads sets" if "num_heads" in questions else ""
            origin.problem = f"does not tell its {missing}{remedy}"
    return origin


def translated(
    model: ModelConfig, known: dict[str, Any], part: State
) -> tuple[ModelConfig, dict[str, Any]]:
    """Put the arguments of timm's constructor into our settings; return what has none."""
    beyond = dict(known)
    if is_vit(model.backbone):
        given = {name: beyond.pop(name) for name in OF_VIT if name in beyond}
        if width := beyond.pop("embed_dim", None):
            given["width"] = width / published_width(model.backbone)
        if fixed_positions(part) == "v3":
            given["positions"] = "sincos"
        model = dataclasses.replace(model, **given)
    return model, {
        name: value
        for name, value in beyond.items()
        if name not in _COMPARED and not _NO_FUNCTION.fullmatch(name)
    }
