"""How a setting is declared, the two errors that a person reads, and bounds that settings share."""

from __future__ import annotations

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
