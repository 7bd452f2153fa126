"""Pixels: how images are normalised, and the square of them that evaluation and exports take.

Images and checkpoints share it. This room needs no torch.
"""

from __future__ import annotations

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
