"""Aside: which images of a set a run is trained on, and which it leaves out to measure on them.

A run keeps the number that it has begun with, whatever else it is given to measure on later: the
order and the views of an image follow from its row among those that are trained on.
"""

from __future__ import annotations

import torch

from moco.config import DataConfig, RunConfig
from moco.images import sources
from moco.images.image_source import ImageSource

_FEWEST_HELD_OUT = 64  # fewer tell nothing


def part(
    source: ImageSource, data: DataConfig, run: RunConfig, begun_with: int | None
) -> tuple[ImageSource, ImageSource | None]:
    """Part all images of a training set into those that are trained on and those set aside.

    Args:
        source: All of them.
        begun_with: Images that the run has set aside; None for a new run, or where a run of an
            older version has not noted it.

    Returns:
        The images that are trained on, and those set aside or None.

    Raises: UserError, as `open_source` does.
    """
    if begun_with is None:
        is_measured = bool(run.knn_root) or sources.has_test_split(data)
        begun_with = 0 if is_measured else run.held_out
    return set_aside(source, begun_with, run.seed)


def set_aside(source: ImageSource, most: int, seed: int) -> tuple[ImageSource, ImageSource | None]:
    """Take some images out of a training set, to measure on: a tenth of it, and `most` at most.

    Which ones is a function of the seed and the number of images. Of a set that could spare only
    few none are taken.

    Returns:
        The images that are left, and those set aside or None.
    """
    count = min(most, len(source) // 10)
    if count < min(_FEWEST_HELD_OUT, most) or count == 0:
        return source, None
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    held, kept = (rows.sort().values for rows in (order[:count], order[count:]))
    return source.rows(kept), source.rows(held)
