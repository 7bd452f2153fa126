"""Growth: views that are small at first and grow while a run trains, in a few steps.

Small views cost little and teach what is coarse (arXiv:2212.05611); the last ones may stay below
the size of the images that are judged, whose contents crops enlarge (arXiv:1906.06423). The size is
a pure function of the optimiser step, so nothing about it is saved. It takes few values, since a
compiled encoder is one graph for each.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from moco.config import DataConfig


@dataclass(frozen=True)
class Growth:
    """The sizes of a run's views, in pixels, and the optimiser steps from which they hold."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    def size(self, step: int) -> int:
        """Return the side of the views of a step, counted from 0."""
        return self.sizes[bisect_right(self.starts, step) - 1]

    def in_words(self) -> str:
        """Say how large the views are, and from which step on."""
        later = zip(self.sizes[1:], self.starts[1:], strict=True)
        return ", ".join([f"{self.sizes[0]} px", *(f"{s} px from step {at}" for s, at in later)])

    def work(self, start: float, stop: float) -> float:
        """Return what the steps from `start` to `stop` cost, in steps with the last views.

        A step costs in proportion to the area of its views; a part of a step counts as such.
        """
        parts = zip(self.sizes, self.starts, (*self.starts[1:], math.inf), strict=True)
        return sum(
            (size / self.sizes[-1]) ** 2 * max(min(stop, end) - max(start, begin), 0)
            for size, begin, end in parts
        )


def growth(config: DataConfig, total_steps: int, unit: int) -> Growth:
    """Say how views grow from image_size_start to the last size, with one size between them.

    Args:
        total_steps: Of the run; the sizes before the last share image_size_share of them.
        unit: Pixels that the size between them is a multiple of.
    """
    sizes = view_sizes(config, unit)
    grown = total_steps * config.image_size_share / max(len(sizes) - 1, 1)
    return Growth(sizes, tuple(round(grown * number) for number in range(len(sizes))))


def view_sizes(config: DataConfig, unit: int) -> tuple[int, ...]:
    """Return the sizes that the views have in turn; `unit` as of `growth`."""
    first, last = config.image_size_start, config.view_side
    if not first:
        return (last,)
    between = round((first + last) / 2 / unit) * unit
    return (first, between, last) if first < between < last else (first, last)
