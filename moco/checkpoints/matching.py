"""Match a file's tensors with a network's by name and shape, and report what fits and what not.

This room knows state dicts (names to tensors), but neither files nor layouts.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from moco.config import UserError
from moco.log import reason_of

State = dict[str, Tensor]
ABSENT = torch.empty(0)  # stands for a missing tensor: every check of its shape fails
# The token of masked pixels, tables that code computes by itself, and counts of a profiler and of
# torch's AveragedModel.
_EXTRAS = ("mask_token", "relative_position_index", "attn_mask", "total_ops", "total_params")
_EXTRAS += ("n_averaged",)


def take(state: State, prefix: str) -> State:
    """Return the tensors under a prefix, which their names then lack."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def checksum(network: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class Match:
    """The result of matching a file's tensors with a network's.

    Attributes:
        matched: Tensors ready to load.
        faults: Kind of fault to the names that have it; a whole match has none.
        left_out: Names of what no backbone needs: a classifier, which gets that prefix, and what
            training or older code leaves in a file.
        total: Number of tensors that the network needs.
        note: How tensors were changed to fit.
        absent: Count of the numbers that the network needs and the file lacks.
    """

    matched: State
    faults: dict[str, list[str]]
    left_out: list[str]
    total: int
    note: str = ""
    absent: int = 0

    @property
    def whole(self) -> bool:
        """Tell whether there are tensors and all of them fit."""
        return bool(self.matched) and not self.faults

    def check(self, path: str | Path, name: str, remedy: str, allow_partial: bool = False) -> None:
        """Raise UserError unless the match is whole, or partial where that is allowed."""
        if not self.matched:
            raise UserError(f"{path}: nothing in it fits {name} ({self.text()}): {remedy}")
        if self.faults and not allow_partial:
            raise UserError(f"{path} fits {name} only in part ({self.text()}): {remedy}")

    def text(self) -> str:
        """Say what matched and what did not, on one line."""
        faults = [f"{kind}: {some(names)}" for kind, names in self.faults.items()]
        missing = [] if "missing" in self.faults else ["missing: none"]
        note = [self.note] if self.note else []
        return "; ".join([f"matched {len(self.matched)} of {self.total}", *note, *faults, *missing])


def match_state(target: State, source: State, network: nn.Module | None = None) -> Match:
    """Match tensors by name and shape.

    Args:
        target: State dict that is to be filled; gives shapes and dtypes, and is not changed.
        source: State dict of the file.
        network: The owner of `target`, which knows the name of its classifier. A ViT's positions
            are resampled only where it is given.
    """
    own = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    own = [f"{name}." for name in ([own] if isinstance(own, str) else own)]
    classifiers = ("fc.", "head.", "classifier.", *own)
    # Files from before torch 0.4.1 do not count batches; nothing else may be absent.
    needed = [n for n in target if n in source or not n.endswith("num_batches_tracked")]
    kinds = ("missing", "unknown", "of other shape", "no floating-point numbers")
    missing, unknown, misshapen, no_weights = faults = [[] for _ in kinds]
    missing += [name for name in needed if name not in source]
    found = Match({}, {}, [], len(needed))
    for name, tensor in source.items():
        goal = target.get(name)
        if goal is None and name.startswith(classifiers):
            found.left_out.append(f"classifier.{name}")
        elif goal is None:
            (found.left_out if name.endswith(_EXTRAS) else unknown).append(name)
        if goal is None:
            continue
        if tensor.is_complex() or (goal.is_floating_point() and not tensor.is_floating_point()):
            no_weights.append(f"{name} ({tensor.dtype})")
            continue
        if name == "pos_embed" and network is not None and tensor.shape != goal.shape:
            tensor, found.note = _resample(tensor, goal, network)
        repeats = tensor.numel() / max(goal.numel(), 1)
        if name.endswith(("running_mean", "running_var")) and repeats > 1 and repeats % 1 == 0:
            tensor = tensor.reshape(-1, *goal.shape).mean(0)  # lightly's split BatchNorm: per group
        if tensor.shape == goal.shape:
            found.matched[name] = tensor.to(goal.dtype)
        else:
            misshapen.append(f"{name} ({shape_text(tensor)} for {shape_text(goal)})")
    found.absent = sum(t.numel() for name, t in target.items() if name not in found.matched)
    found.faults = {kind: names for kind, names in zip(kinds, faults, strict=True) if names}
    return found


def _resample(positions: Tensor, goal: Tensor, network: nn.Module) -> tuple[Tensor, str]:
    """Resample a ViT's square grid of positions to the image size of `network`."""
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    tokens = getattr(network, "num_prefix_tokens", 0)
    tokens = 0 if getattr(network, "no_embed_class", False) else tokens
    count = positions.shape[1] - tokens if positions.shape[::2] == goal.shape[::2] else 0
    if grid is None or count < 1 or math.isqrt(count) ** 2 != count:
        return positions, ""
    positions = resample_abs_pos_embed(positions, grid, num_prefix_tokens=tokens)
    return positions, f"positions resampled to {grid[0]}x{grid[1]}"


def shape_text(tensor: Tensor) -> str:
    """Write a shape as 64x3x7x7."""
    return "x".join(map(str, tensor.shape)) or "scalar"


def some(names: Iterable[str]) -> str:
    """List the first three names and count the rest."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"


def groups(names: Iterable[str]) -> str:
    """Count names by their first parts."""
    counts = Counter(".".join(n.split(".")[: 2 if "_encoder." in n else 1]) for n in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def with_class(error: BaseException) -> str:
    """Return an error's class and text on one line."""
    return f"{type(error).__name__}: {reason_of(error)}"
