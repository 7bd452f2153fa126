"""Streamed sets: workers decode each image of a batch and cut it twice, to uint8.

Shapes: N images per device, C channels, S side of a view.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from moco.config import DataConfig
from moco.images import views
from moco.images.decode import BadImage
from moco.images.draws import draw_crops, view_recipes, view_streams
from moco.images.sources import ImageSource
from moco.random import combine, stream_id, uniform

_AT_A_TIME = 16  # images that a worker holds decoded
_ATTEMPTS = 64  # other images that are tried in the place of one that cannot be read


class Cuts(Dataset):
    """Two cuts of each image, a function of (seed, epoch, index).

    Another image, by the same function, takes the place of one that cannot be read.
    """

    def __init__(self, source: ImageSource, config: DataConfig, seed: int) -> None:
        self.source, self.size, self.recipes = source, config.image_size, view_recipes(config)
        self.streams = [view_streams(seed, view)[0] for view in (0, 1)]
        self.substitutes = stream_id(seed, "substitute")

    def __getitems__(
        self, batch: tuple[int, np.ndarray, int]
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """Cut a batch, given by its epoch, the indices of N images, and S.

        Returns:
            N x 2 x C x S x S uint8, and (index, reason) of each image that could not be read.
        """
        epoch, rows, size = batch
        pairs, bad = [], []
        for start in range(0, len(rows), _AT_A_TIME):
            pairs += self._some(epoch, rows[start : start + _AT_A_TIME].tolist(), size, bad)
        cuts = default_collate(pairs)  # N 2 S S C; in a worker it lies in shared memory at once
        return cuts.permute(0, 1, 4, 2, 3), bad

    def _some(
        self, epoch: int, rows: list[int], size: int, bad: list[tuple[int, str]]
    ) -> list[Tensor]:
        """Cut as many as may lie decoded in memory; drawing their boxes together is cheaper."""
        index = torch.tensor(rows)
        images = [self._read(epoch, row, bad) for row in rows]
        sizes = torch.tensor([image.shape[1:] for image in images]).unbind(1)
        chains = zip(self.recipes, self.streams, strict=True)
        boxes = [draw_crops(recipe, s, epoch, index, *sizes) for recipe, s in chains]
        how = self.recipes[0].interpolation
        return [
            torch.stack([views.cut(image, b, size, row, how).permute(1, 2, 0) for b in boxes])
            for row, image in enumerate(images)
        ]

    def _read(self, epoch: int, index: int, bad: list[tuple[int, str]]) -> Tensor:
        """Read an image or the one that takes its place; add what cannot be read to `bad`."""
        try:
            return self.source.read(index)
        except BadImage as error:
            bad.append((index, error.reason))
        place = combine(epoch, torch.tensor([index]))
        for other in uniform(self.substitutes, place, _ATTEMPTS)[0].tolist():
            chosen = int(other * len(self.source))
            try:
                return self.source.read(chosen)
            except BadImage as error:
                bad.append((chosen, error.reason))
        # Then most of the set is gone, as with storage that went away: grey keeps all ranks in
        # step until they have agreed to stop.
        return torch.full((self.source.channels, self.size, self.size), 128, dtype=torch.uint8)
