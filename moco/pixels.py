"""Pixels: how values become 0 to 255, how images are normalised, and which square is taken.

Images and checkpoints share it. This room needs no torch.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import numpy as np

from moco.config import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalisation(data: DataConfig) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, on a 0-1 scale."""
    rgb = data.channels == 3
    mean = data.mean or (list(IMAGENET_MEAN) if rgb else [0.5] * data.channels)
    std = data.std or (list(IMAGENET_STD) if rgb else [0.25] * data.channels)
    return mean, std


CENTRE_SHARE = 0.875  # of the short side: 224 of 256, as in the published evaluations


def centre_box(
    height: int, width: int, size: int, share: float = CENTRE_SHARE
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the square that evaluation cuts out of an image.

    An image none of whose sides is above `size`, that of the views, is taken whole.
    """
    if max(height, width) <= size:
        return 0, 0, height, width
    side = max(1, round(min(height, width) * share))
    return (height - side) // 2, (width - side) // 2, side, side


def to_uint8(values: np.ndarray, low: tuple[float, ...], high: tuple[float, ...]) -> np.ndarray:
    """Scale low..high to 0..255, rounded and clipped; NaN, a usual mark of no data, gives 0.

    Args:
        values: C H W, or N C H W. Those of 8 bits stay as they are, and true becomes 255.
        low, high: One number for all bands, or C.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"holds values of type {values.dtype}")
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    bottom, top = (np.array(ends, dtype=np.float64)[:, None, None] for ends in (low, high))
    if not {len(low), len(high)} <= {1, values.shape[-3]}:
        raise ValueError(
            f"has {values.shape[-3]} bands, data.min_value and data.max_value have others"
        )
    wide = values.astype(np.float64)
    if values.dtype.kind == "f":
        wide = np.where(np.isnan(wide), bottom, wide)
    return np.rint((np.clip(wide, bottom, top) - bottom) * (255 / (top - bottom))).astype(np.uint8)


def scaled(
    values: np.ndarray, channels: int, low: tuple[float, ...], high: tuple[float, ...]
) -> np.ndarray:
    """Scale as `to_uint8` does; grey values with a range for each channel become that many."""
    several = max(len(low), len(high)) > 1
    if several and values.shape[-3] == 1 and values.dtype != np.uint8:
        values = np.repeat(values, channels, axis=-3)
    return to_uint8(values, low, high)
