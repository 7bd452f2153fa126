"""Scaling: how the values of a file become 0 to 255, upright. Shapes: C bands, H W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_PIXELS = 178_956_970  # where Pillow refuses too: 0.5 GB as RGB, above it a decompression bomb


@dataclass(frozen=True)
class Reading:
    """How the files of a set are read; 8-bit files need no range and are taken as they are.

    Attributes:
        low, high: The values that become 0 and 255, one for all channels or one each.
        turn: Whether pictures are turned upright as their EXIF orientation says.
        max_pixels: Larger images are refused.
        windowed: Whether a DICOM file's own window stands in the place of `low` and `high`.
        reason: Where `low` and `high` come from, for the log; empty where nothing needs them.
    """

    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (65535.0,)
    turn: bool = False
    max_pixels: int = MAX_PIXELS
    windowed: bool = False
    reason: str = ""

    def __str__(self) -> str:
        """Say in one line which values become what, and why."""
        low, high = numbers(self.low), numbers(self.high)
        return f"values: {low} becomes 0 and {high} becomes 255 ({self.reason})"


PLAIN = Reading()


def numbers(ends: Sequence[float]) -> str:
    """Write one number, or several as the command line takes them."""
    words = [f"{end:.10g}" for end in ends]
    return words[0] if len(words) == 1 else f"[{','.join(words)}]"


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn C H W as a tag of TIFF or EXIF says, 1 to 8."""
    if orientation > 4:
        values = values.transpose(0, 2, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1]
    return values
