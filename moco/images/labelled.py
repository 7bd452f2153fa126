"""Labelled images for evaluation: centre-cropped, every image once, or at random crops.

Shapes: N images of a batch, n of them on this rank, C channels, S side of a view, W devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from moco import distributed
from moco.config import DataConfig, normalisation, per_view
from moco.images import views
from moco.images.bad_files import BadFiles
from moco.images.decode import BadImage
from moco.images.draws import Crops, ViewRecipe, centre_crops, draw_crops, view_streams
from moco.images.sources import ImageSource
from moco.images.workers import as_it_is, fetched, worker_loader
from moco.random import permutation


class LabelledData:
    """Images for evaluation: a labelled bank and labelled queries, resized and centre-cropped.

    Args:
        config: Data settings of the run that made the encoder.
        bank, queries: Sources with labels.
        bank_images, query_images: Their decoded images if resident already.
    """

    def __init__(
        self,
        config: DataConfig,
        bank: ImageSource,
        queries: ImageSource,
        bank_images: Tensor | None = None,
        query_images: Tensor | None = None,
    ) -> None:
        self.config = config
        self.bank, self.queries = bank, queries
        self.bank_images, self.query_images = bank_images, query_images
        self.num_classes = len(bank.classes)

    def batches(
        self, split: str, device: torch.device, batch_size: int = 256
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of `bank` or `queries`: every W-th image, none twice, none left
        out.

        Yields:
            Images N x C x S x S, normalised, and labels N int64, on `device`.
        """
        source = self.bank if split == "bank" else self.queries
        images = self.bank_images if split == "bank" else self.query_images
        mine = torch.arange(distributed.rank(), len(source), distributed.world_size())
        mean, std = (torch.tensor(v, device=device) for v in normalisation(self.config))
        size = self.config.image_size
        for index, part in self._read(source, images, mine, batch_size):
            if not len(index):
                continue
            part = part.to(device, non_blocking=True)
            if part.shape[2:] != (size, size):
                boxes = centre_crops(len(part), *part.shape[2:], size, device)
                part = views.crop_and_resize(part, boxes, size)
            else:
                part = part.float() / 255
            yield views.normalise(part, mean, std), source.labels[index].to(device)

    def _read(
        self, source: ImageSource, images: Tensor | None, mine: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield indices and uint8 images, from memory or through workers, which cut to size."""
        if images is None:
            yield from _streamed(source, self.config, mine.split(batch_size), None)
            return
        for index in mine.split(batch_size):
            yield index, images[index.to(images.device)]


@dataclass
class Labelled:
    """Labelled images of one split.

    Attributes:
        source: Names, files and labels.
        images: M x C x H x W uint8 if they are resident, else None.
    """

    source: ImageSource
    images: Tensor | None

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, rows: Tensor) -> Labelled:
        """Keep only some images."""
        source, images = self.source, self.images
        part = replace(
            source,
            images=None if source.images is None else source.images[rows],
            paths=[source.paths[row] for row in rows.tolist()] if source.paths else [],
            labels=source.labels[rows],
        )
        return Labelled(part, None if images is None else images[rows.to(images.device)])


class RandomCrops:
    """Random resized crops of labelled images, mirrored or not: the linear protocol's augmentation.

    Args:
        config: Side, normalisation, and `flip` where images must not be mirrored; null is 0.5.
        images: The training images.
        crop_min: Smallest share of the area that a crop keeps.
        seed: Of order and crops.
    """

    def __init__(self, config: DataConfig, images: Labelled, crop_min: float, seed: int) -> None:
        self.config, self.images, self.seed = config, images, seed
        self.stream, _ = view_streams(seed, 0)
        self.labels = images.source.labels
        flip = 0.5 if config.flip is None else per_view(config.flip)[0]
        self.recipe = ViewRecipe(crop_min, flip, 0.0, (0.0, 0.0, 0.0, 0.0), 0.0, 0.0)

    def order(self, epoch: int) -> Tensor:
        """Return the order of the M images in an epoch."""
        return permutation(self.seed, "probe order", epoch, len(self.images))

    def batches(
        self, epoch: int, batches: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of each global batch of rows: every W-th.

        Yields:
            Images n x C x S x S, normalised, and their rows, n; n may be 0.
        """
        shares = [rows[distributed.rank() :: distributed.world_size()] for rows in batches]
        mean, std = (torch.tensor(v, device=device) for v in normalisation(self.config))
        draw = partial(draw_crops, self.recipe, self.stream, epoch)
        stored = self.images.images
        if stored is None:
            for rows, part in _streamed(self.images.source, self.config, shares, draw):
                part = part.to(device, non_blocking=True).float() / 255
                yield views.normalise(part, mean, std), rows
            return
        for rows in shares:
            part = stored[rows.to(stored.device)].to(device)
            boxes = draw(rows.to(device), *part.shape[2:])
            part = views.crop_and_resize(part, boxes, self.config.image_size)
            yield views.normalise(part, mean, std), rows


def _streamed(
    source: ImageSource, config: DataConfig, batches: Iterable[Tensor], draw: partial | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices and cuts, n C S S uint8, of each batch, made by workers.

    Files that cannot be read are left out and named in the log, so that n may be 0.
    """
    loader = worker_loader(
        _Cuts(source, config.image_size, draw),
        config,
        batch_sampler=[rows.tolist() for rows in batches],
        collate_fn=as_it_is,
    )
    bad = BadFiles(source, 1.0, None)
    for index, cuts, unread in fetched(loader, config.worker_timeout):
        bad.note(unread)
        yield index, cuts


class _Cuts(Dataset):
    """A cut of each streamed image: in the centre, or of a box from `draw_crops` in part."""

    def __init__(self, source: ImageSource, size: int, draw: partial | None) -> None:
        self.source, self.size, self.draw = source, size, draw

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """Return the indices of what could be read, its cuts, and (index, reason) of the rest."""
        read, cuts, bad = [], [], []
        for row in rows:
            try:
                image = self.source.read(row)
            except BadImage as error:
                bad.append((row, error.reason))
                continue
            read.append(row)
            cuts.append(views.cut(image, self._box(row, *image.shape[1:]), self.size))
        empty = torch.empty(0, self.source.channels, self.size, self.size, dtype=torch.uint8)
        return torch.tensor(read, dtype=torch.long), default_collate(cuts) if cuts else empty, bad

    def _box(self, row: int, height: int, width: int) -> Crops:
        if self.draw is None:
            return centre_crops(1, height, width, self.size, torch.device("cpu"))
        return self.draw(torch.tensor([row]), height, width)
