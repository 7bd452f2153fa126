"""Labelled images for evaluation: resized, centre-cropped, every image once.

Shapes: N images of a batch, C channels, S side of a view, W devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moco import distributed
from moco.config import DataConfig, normalisation
from moco.images import views
from moco.images.bad_files import BadFiles
from moco.images.decode import BadImage
from moco.images.draws import centre_crops
from moco.images.sources import ImageSource
from moco.images.workers import fetched, ignore_signals, worker_count


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
        loader = DataLoader(
            _CentreCuts(source, self.config.image_size),
            batch_size,
            sampler=mine.tolist(),
            num_workers=worker_count(self.config),
            collate_fn=_collate_whole,
            worker_init_fn=ignore_signals,
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
