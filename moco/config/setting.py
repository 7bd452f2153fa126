"""How a setting is declared, both errors that a person reads, shared bounds, and misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal


class UserError(ValueError):
    """Input is wrong. The message says what, where, and how to mend it; scripts exit with 2."""


class RunError(RuntimeError):
    """A run cannot go on although its input is right: a worker died, memory or numbers overflowed.

    The message says what happened and how to go on; scripts print it and exit with 1. Rank 0 prints
    it for all ranks, unless it is `local` to the rank that raised it.
    """

    def __init__(self, message: str, local: bool = False) -> None:
        super().__init__(message)
        self.local = local


Auto = Literal["auto"]  # left to `moco.training.autoconfigure`

# Bounds of what is counted: no run or evaluation comes near them, and none of them overflows.
MOST_EPOCHS, MOST_STEPS, MOST_ROWS = 1_000_000, 1_000_000_000, 1_000_000
MOST_VALUE = 1e39  # of a pixel: beyond all 32-bit floats
LEAST_VIEW = 4  # pixels a side


def nearest_name(name: str, names: Sequence[str], separator: str) -> str:
    """Return the name that is spelt most like another, with or without its group; or nothing."""
    leaves: dict[str, str] = {}
    for full in names:
        leaves.setdefault(full.rpartition(separator)[2], full)
    leaf = name.rpartition(separator)[2]
    if leaf in leaves:
        return leaves[leaf]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    near = near or [leaves[each] for each in difflib.get_close_matches(leaf, leaves, n=1)]
    return near[0] if near else ""


def setting(
    default: Any,
    meaning: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare a field: its default, its meaning, and the range that `check` enforces.

    A field whose default is MISSING must be given.
    """
    limits = {"above": above, "at_least": at_least, "at_most": at_most}
    metadata = {"meaning": meaning, **{k: v for k, v in limits.items() if v is not None}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
