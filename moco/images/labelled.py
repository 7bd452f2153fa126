"""Labelled images for evaluation: resized, centre-cropped, every image once.

Shapes: N images of a batch, C channels, S side of a view, W devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco import distributed
from moco.config import DataConfig, normalisation
from moco.images import views
from moco.images.bad_files import BadFiles
from moco.images.decode import BadImage
from moco.images.draws import ViewRecipe, centre_crops, crop_stream, draw_crops
from moco.images.sources import ImageSource
from moco.images.workers import fetched, worker_loader
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
        for index, part in self._read(source, images, mine, batch_size):
            size = self.config.image_size
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
        """Yield indices and uint8 images, from memory or through workers, which cut to size.

        Streamed files that cannot be read are left out and named in the log.
        """
        if images is not None:
            for index in mine.split(batch_size):
                yield index, images[index.to(images.device)]
            return
        loader = worker_loader(
            _CentreCuts(source, self.config.image_size),
            self.config,
            batch_size=batch_size,
            sampler=mine.tolist(),
            collate_fn=_collate_whole,
        )
        bad = BadFiles(source, 1.0, None)
        for part in fetched(loader, self.config.worker_timeout):
            bad.note([(index, reason) for index, _, reason in part if reason])
            good = [(index, image) for index, image, reason in part if not reason]
            if good:
                yield torch.tensor([i for i, _ in good]), torch.stack([x for _, x in good])


class _CentreCuts(Dataset):
    """Evaluation cuts of streamed images: index, C x S x S uint8, and why it could not be read."""

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            image = self.source.read(index)
        except BadImage as error:
            return index, None, error.reason
        box = centre_crops(1, *image.shape[1:], self.size, torch.device("cpu"))
        return index, views.cut(image, box, self.size), ""


def _collate_whole(items: list) -> list:
    return items


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
    """Random resized crops, mirrored or not, of labelled images: the augmentation of the linear
    protocol.

    Args:
        config: Side, normalisation, and `flip` where images must not be mirrored; null is 0.5.
        images: The training images.
        crop_min: Smallest share of the area that a crop keeps.
        seed: Of order and crops.
    """

    def __init__(self, config: DataConfig, images: Labelled, crop_min: float, seed: int) -> None:
        self.config, self.images, self.seed = config, images, seed
        self.stream = crop_stream(seed, 0)
        self.labels = images.source.labels
        flip = 0.5 if config.flip is None else config.flip
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
        size = self.config.image_size
        for rows, part in zip(shares, self._cuts(epoch, shares), strict=True):
            if self.images.images is None:
                part = part.to(device, non_blocking=True).float() / 255
            else:
                stored = self.images.images
                part = stored[rows.to(stored.device)].to(device)
                boxes = draw_crops(
                    self.recipe, self.stream, epoch, rows.to(device), *part.shape[2:]
                )
                part = views.crop_and_resize(part, boxes, size)
            yield views.normalise(part, mean, std), rows

    def _cuts(self, epoch: int, shares: list[Tensor]) -> Iterator[Tensor]:
        """Have workers cut streamed images; for resident ones there is nothing to do here."""
        if self.images.images is not None:
            yield from shares
            return
        source = self.images.source
        dataset = _Cuts(source, self.recipe, self.stream, epoch, self.config.image_size)
        filled = [rows.tolist() for rows in shares if len(rows)]
        loader = worker_loader(dataset, self.config, batch_sampler=filled)
        cuts = fetched(loader, self.config.worker_timeout)
        side = self.config.image_size
        for rows in shares:
            empty = torch.empty(0, source.channels, side, side, dtype=torch.uint8)
            yield next(cuts) if len(rows) else empty


class _Cuts(Dataset):
    """One random cut of a streamed image, C x S x S uint8; runs in workers."""

    def __init__(
        self, source: ImageSource, recipe: ViewRecipe, stream: int, epoch: int, size: int
    ) -> None:
        self.source, self.recipe = source, recipe
        self.stream, self.epoch, self.size = stream, epoch, size

    def __getitem__(self, row: int) -> Tensor:
        image = self.source.read(row)
        place = torch.tensor([row])
        box = draw_crops(self.recipe, self.stream, self.epoch, place, *image.shape[1:])
        return views.cut(image, box, self.size)
