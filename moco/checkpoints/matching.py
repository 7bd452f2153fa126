"""Match a file's tensors with a network's, by name and shape, and say what came of it.

Below everything that reads checkpoints: state dicts and words about them, no files, no layouts.
Shapes: any; a state dict maps names to tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from moco.config import UserError

State = dict[str, Tensor]
ABSENT = torch.empty(0)  # stands for a tensor that is not there: no dimension of it fits


def take(state: State, prefix: str) -> State:
    """Return the tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@dataclass
class Match:
    """How a file's tensors meet a network's.

    Attributes:
        matched: Ready to load.
        faults: What keeps the match from being whole: kind, and names.
        classifier: Names of a classifier, which no backbone has.
        total: Tensors that the network needs.
        note: What was changed on the way.
    """

    matched: State
    faults: dict[str, list[str]]
    classifier: list[str]
    total: int
    note: str

    @property
    def whole(self) -> bool:
        """Tell whether there was something to match and all of it did."""
        return bool(self.matched) and not self.faults

    def check(self, path: str | Path, name: str, remedy: str, allow_partial: bool = False) -> None:
        """Raise UserError unless the match is whole, or partial and allowed."""
        if not self.matched:
            raise UserError(f"{path}: nothing in it fits {name} ({self.text()}): {remedy}")
        if self.faults and not allow_partial:
            raise UserError(f"{path} fits {name} only in part ({self.text()}): {remedy}")

    def text(self) -> str:
        """Say what matched and what did not."""
        faults = [f"{kind}: {some(names)}" for kind, names in self.faults.items()]
        missing = [] if "missing" in self.faults else ["missing: none"]
        note = [self.note] if self.note else []
        return "; ".join([f"matched {len(self.matched)} of {self.total}", *note, *faults, *missing])


def match_state(target: State, source: State, network: nn.Module | None = None) -> Match:
    """Match tensors by name and shape.

    Args:
        target: What is to be filled; gives shapes and dtypes, and is not changed.
        source: What a file offers.
        network: The owner of `target`: knows its classifier, and how a ViT's positions are
            resampled; without it they are not.
    """
    classifiers = ("fc.", "head.", "classifier.", *_classifiers(network))
    # Files of before torch 0.4.1 do not count batches; nothing else may be absent.
    needed = [n for n in target if n in source or not n.endswith("num_batches_tracked")]
    missing, unknown, misshapen = [n for n in needed if n not in source], [], []
    found = Match({}, {}, [], len(needed), "")
    for name, tensor in source.items():
        if name not in target:
            (found.classifier if name.startswith(classifiers) else unknown).append(name)
            continue
        goal = target[name]
        if name == "pos_embed" and network is not None and tensor.shape != goal.shape:
            tensor, found.note = _resample(tensor, goal, network)
        elif name.endswith(("running_mean", "running_var")):
            tensor = _merge_groups(tensor, goal)
        if tensor.shape == goal.shape:
            found.matched[name] = tensor.to(goal.dtype)
        else:
            misshapen.append(f"{name} ({shape_text(tensor)} for {shape_text(goal)})")
    faults = {"missing": missing, "unknown": unknown, "of other shape": misshapen}
    found.faults = {kind: names for kind, names in faults.items() if names}
    return found


def _classifiers(network: nn.Module | None) -> tuple[str, ...]:
    """Name the beginnings of what timm calls this network's classifier."""
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))


def _resample(positions: Tensor, goal: Tensor, network: nn.Module) -> tuple[Tensor, str]:
    """Bring a ViT's positions to another image size."""
    if positions.ndim != 3 or positions.shape[2] != goal.shape[2]:
        return positions, ""
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    grid = network.patch_embed.grid_size
    positions = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    return positions, f"positions resampled to {grid[0]}x{grid[1]}"


def _merge_groups(statistics: Tensor, goal: Tensor) -> Tensor:
    """Average the rows of lightly's split BatchNorm, which stores one per group."""
    if statistics.numel() > goal.numel() > 0 and statistics.numel() % goal.numel() == 0:
        return statistics.view(-1, goal.numel()).mean(0)
    return statistics


# Words


def shape_text(tensor: Tensor) -> str:
    """Write a shape as 64x3x7x7."""
    return "x".join(map(str, tensor.shape)) or "scalar"


def some(names: Iterable[str]) -> str:
    """List the first three names and count the rest."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"


def groups(names: Iterable[str]) -> str:
    """Sum names up by their beginnings."""
    depth = {True: 2, False: 1}
    counts = Counter(".".join(n.split(".")[: depth["_encoder." in n]]) for n in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def one_line(error: BaseException) -> str:
    """Put an error, whose text can be anything, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
