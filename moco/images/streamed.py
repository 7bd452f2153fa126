"""Streamed sets: workers decode each image of a batch and cut it twice, or make the user's views.

Shapes: N images per device, C channels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from moco.config import DataConfig
from moco.images.crops import cut
from moco.images.decode import BadImage, Decoded
from moco.images.draws import Crops, draw_crops, view_recipes, view_streams
from moco.images.image_source import ImageSource
from moco.images.own_views import OwnViews, first_image, made_view, said
from moco.images.shards import ShardSet
from moco.images.workers import PREFETCH
from moco.random import combine, stream_id, uniform

_AT_A_TIME = 16  # images that a worker holds decoded
_ATTEMPTS = 64  # other images that are tried in the place of one that cannot be read


class Cuts(Dataset):
    """Two cuts of each image as uint8, a function of (seed, epoch, index); see `stand_ins`."""

    def __init__(self, source: ImageSource, config: DataConfig, seed: int) -> None:
        self.source, self.size, self.recipes = source, config.view_side, view_recipes(config)
        self.seed, self.reduces = seed, config.reduce_jpegs
        self.streams = [view_streams(seed, view)[0] for view in (0, 1)]
        self._epoch, self._made = -1, 0

    def __getitems__(
        self, batch: tuple[int, np.ndarray, int]
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """Cut a batch, given by its epoch, the indices of N images, and S.

        Returns:
            N x 2 x C x S x S uint8, and (index, reason) of each image that could not be read.
        """
        epoch, rows, size = batch
        if isinstance(self.source.paths, ShardSet):
            self._fetch_early(self.source.paths, epoch, rows)
        pairs, bad = [], []
        for start in range(0, len(rows), _AT_A_TIME):
            pairs += self._some(epoch, rows[start : start + _AT_A_TIME].tolist(), size, bad)
        cuts = default_collate(pairs)  # N 2 S S C; in a worker it lies in shared memory at once
        return cuts.permute(0, 1, 4, 2, 3), bad

    def _fetch_early(self, shards: ShardSet, epoch: int, rows: np.ndarray) -> None:
        """Fetch the images of an epoch's first batches alone, while whole shards are on their way.

        So training begins after some images have come, however large the shards are.
        """
        self._made = self._made + 1 if epoch == self._epoch else 1
        self._epoch = epoch
        shards.fetch_alone(rows.tolist() if self._made <= PREFETCH else ())

    def _some(
        self, epoch: int, rows: list[int], size: int, bad: list[tuple[int, str]]
    ) -> list[Tensor]:
        """Cut as many as may lie decoded in memory; drawing their boxes together is cheaper."""
        images = [self._read(epoch, row, bad) for row in rows]
        sizes = torch.tensor([(image.height, image.width) for image in images])
        boxes = self._boxes(epoch, torch.tensor(rows), sizes)
        how = self.recipes[0].interpolation
        return [
            torch.stack(
                [
                    cut(image.pixels, b, size, row, how, image.reduction).permute(1, 2, 0)
                    for b in boxes
                ]
            )
            for row, image in enumerate(images)
        ]

    def _boxes(self, epoch: int, index: Tensor, sizes: Tensor) -> list[Crops]:
        """Draw the boxes of both views of N images; `sizes` is N x 2, height and width."""
        chains = zip(self.recipes, self.streams, strict=True)
        return [draw_crops(recipe, s, epoch, index, *sizes.unbind(1)) for recipe, s in chains]

    def _reduction(self, epoch: int, index: int, height: int, width: int) -> int:
        """Return the most by which an image may shrink while both boxes keep S pixels a side.

        Half the size is not worth it: its cuts take longer than the decoder saves.
        """
        if not self.reduces or min(height, width) < 4 * self.size:
            return 1
        boxes = self._boxes(epoch, torch.tensor([index]), torch.tensor([[height, width]]))
        shortest = min(int(side) for box in boxes for side in (box.height, box.width))
        return next(by for by in (8, 4, 1) if by == 1 or by * self.size <= shortest)

    def _read(self, epoch: int, index: int, bad: list[tuple[int, str]]) -> Decoded:
        """Read an image or the one that takes its place; add what cannot be read to `bad`."""
        reduction = partial(self._reduction, epoch, index)
        for chosen in stand_ins(self.source, self.seed, epoch, index):
            try:
                return self.source.read_reduced(chosen, reduction)
            except BadImage as error:
                bad.append((chosen, error.reason))
        grey = torch.full((self.source.channels, self.size, self.size), 128, dtype=torch.uint8)
        return Decoded(grey, self.size, self.size, 1)


class OwnCuts(Dataset):
    """Both views of each streamed image as uint8, a function of (seed, epoch, index).

    Batched views get the whole image, as both. An image of which a callable makes no view counts as
    one that cannot be read.
    """

    def __init__(self, source: ImageSource, config: DataConfig, seed: int, own: OwnViews) -> None:
        self.source, self.config, self.seed, self.own = source, config, seed, own
        self.shape = first_image(source).shape if own.batched else None

    def __getitems__(
        self, batch: tuple[int, np.ndarray, int]
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """Make a batch, as `Cuts` does: N x 2 x C x height x width uint8, and the bad images."""
        (epoch, rows, _), bad = batch, []
        return torch.stack([self._one(epoch, row, bad) for row in rows.tolist()]), bad

    def _one(self, epoch: int, index: int, bad: list[tuple[int, str]]) -> Tensor:
        for chosen in stand_ins(self.source, self.seed, epoch, index):
            try:
                return self._make(chosen, epoch, index)
            except BadImage as error:
                bad.append((chosen, error.reason))
        size = self.config.view_side
        shape = self.shape or (self.source.channels, size, size)
        return torch.full((2, *shape), 128, dtype=torch.uint8)

    def _make(self, chosen: int, epoch: int, index: int) -> Tensor:
        image = self.source.read(chosen)
        if self.shape is not None:
            if image.shape != self.shape:
                height, width = image.shape[1:]
                raise BadImage(
                    self.source.called(chosen),
                    f"has {height} x {width} pixels where the first has {self.shape[1]} x "
                    f"{self.shape[2]}: batched views need images of one size",
                )
            return image.expand(2, *image.shape)
        seeds = [stream_id(self.seed, f"own {epoch} {index} {number}") % 2**63 for number in (0, 1)]
        try:
            pair = zip(self.own.views, seeds, strict=True)
            return torch.stack([made_view(view, image, s, self.config) for view, s in pair])
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(self.source.called(chosen), said(error)) from error


def stand_ins(source: ImageSource, seed: int, epoch: int, index: int) -> Iterator[int]:
    """Yield an image, and then others one of which takes its place where it cannot be read.

    Where none of them can, most of the set is gone, as with storage that went away: grey then keeps
    all ranks in step until they have agreed to stop.
    """
    yield index
    near, place = source.around(index), combine(epoch, torch.tensor([index]))
    for other in uniform(stream_id(seed, "substitute"), place, _ATTEMPTS)[0].tolist():
        yield near[int(other * len(near))]
