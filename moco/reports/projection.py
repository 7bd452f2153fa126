"""Projection: M features as points of a plane, near one another where the features are.

t-SNE (van der Maaten and Hinton 2008) of unit vectors: scikit-learn's, and openTSNE's for many
points, whose time grows in proportion to their number. This room needs no torch.
Shapes: M images, D feature, P main directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from moco.reports.layout import tsne
from moco.reports.table import unit

_DIRECTIONS, _SEED = 50, 0
Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]


def project(blocks: Blocks, count: int) -> np.ndarray:
    """Return a point for each image, M x 2 float32, the same at each call.

    Args:
        blocks: Yields a number and n x D vectors, from which that row on.
        count: M. Few images, or images without any difference, lie on a line or at one point.
    """
    points = _main_directions(blocks, count)
    if len(points) < 4 or not points[:, 0].std() > 0:
        return points[:, :2].copy()
    return tsne(points, _SEED, "leave out --map")


def _main_directions(blocks: Blocks, count: int) -> np.ndarray:
    """Return the share of each unit vector along the main directions, M x P, in two passes."""
    total, square = 0.0, 0.0
    for _, block in blocks():
        rows = unit(block).astype(np.float64)
        total, square = total + rows.sum(0), square + rows.T @ rows
    mean = total / count
    spread, directions = np.linalg.eigh(square / count - np.outer(mean, mean))
    kept = directions[:, ::-1][:, :_DIRECTIONS].astype(np.float32)
    kept = kept[:, spread[::-1][:_DIRECTIONS] > 1e-9]  # what is left is rounding
    points = np.zeros((count, max(2, kept.shape[1])), np.float32)
    for start, block in blocks():
        rows = unit(block) - mean.astype(np.float32)
        points[start : start + len(rows), : kept.shape[1]] = rows @ kept
    return points
