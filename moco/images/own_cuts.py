"""Cuts for own views: workers make the user's views of streamed images, or hand whole images over.

Shapes: N images of a batch, C channels, S side of a view.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.config import DataConfig
from moco.images.decode import BadImage
from moco.images.image_source import ImageSource
from moco.images.own_views import OwnViews, first_image, made_view, said
from moco.random import combine, stream_id, uniform

_ATTEMPTS = 64  # other images that are tried in the place of one that gives no views


class OwnCuts(Dataset):
    """Both views of each streamed image as uint8, a function of (seed, epoch, index).

    Batched views get the whole image, as both. Another image takes the place of one that cannot be
    read, or of which a callable makes no view; see `moco.images.streamed.Cuts`.
    """

    def __init__(self, source: ImageSource, config: DataConfig, seed: int, own: OwnViews) -> None:
        self.source, self.config, self.seed, self.own = source, config, seed, own
        self.substitutes = stream_id(seed, "substitute")
        self.shape = first_image(source).shape if own.batched else None

    def __getitems__(
        self, batch: tuple[int, np.ndarray, int]
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """Make a batch, as `Cuts` does: N x 2 x C x height x width uint8, and the bad images."""
        (epoch, rows, _), bad = batch, []
        return torch.stack([self._one(epoch, row, bad) for row in rows.tolist()]), bad

    def _one(self, epoch: int, index: int, bad: list[tuple[int, str]]) -> Tensor:
        place = combine(epoch, torch.tensor([index]))
        others = uniform(self.substitutes, place, _ATTEMPTS)[0].tolist()
        for chosen in [index, *(int(other * len(self.source)) for other in others)]:
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
