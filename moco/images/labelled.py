"""Labelled images for evaluation: centre-cropped, every image once, or at random crops.

Shapes: M images of a split, N images of a batch, n of them on this rank, C channels, S side of a
view, W devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from moco import distributed
from moco.config.data import DataConfig, per_view
from moco.images import views
from moco.images.bad_files import BadFiles
from moco.images.crops import crop_and_resize, cut
from moco.images.decode import BadImage
from moco.images.draws import Crops, ViewRecipe, centre_crops, draw_crops, view_streams
from moco.images.image_source import ImageSource
from moco.images.resident import make_resident
from moco.images.workers import as_it_is, fetched, worker_loader
from moco.pixels import normalisation
from moco.random import permutation

Draw = Callable[[Tensor, int, int], Crops]  # of rows whose images have one height and width


class LabelledData:
    """Labelled images of one split, resident or streamed.

    Args:
        source: The images.
        config: Data settings of the run that made the encoder.
        bad: Counts the files that cannot be read while they are streamed; by default they are told
            in the log alone.
        left_out: Images that could not be read before, which the source no longer lists.
    """

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        bad: BadFiles | None = None,
        left_out: int = 0,
    ) -> None:
        self.source, self.config = source, config
        self.bad = bad or BadFiles(source, config.max_bad_fraction, None)
        self._left_out = left_out

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_read(self) -> int:
        """Count the images without those that could not be read so far."""
        return len(self) - len(self.bad.found)

    @property
    def num_unread(self) -> int:
        """Count the images that could not be read so far."""
        return self._left_out + len(self.bad.found)

    def rows(self, rows: Tensor, left_out: int = 0) -> LabelledData:
        """Keep only some images, beside which `left_out` could not be read."""
        part = self.source.rows(rows)
        bad = BadFiles(part, self.bad.most, self.bad.report_path)
        return LabelledData(part, self.config, bad, left_out)

    def readable(self, device: torch.device) -> LabelledData:
        """Keep the images that can be read; each of a streamed set is read once to know them."""
        if self.source.images is not None:
            return self
        for _ in self.batches(device):
            pass
        kept = [row for row in range(len(self)) if row not in self.bad.found]
        return self.rows(torch.tensor(kept), self.num_unread)

    def labels(self, rows: Tensor) -> Tensor:
        """Return the labels of some images, on the device of their rows."""
        return self.source.labels[rows.cpu()].to(rows.device)

    def batches(
        self, device: torch.device, batch_size: int = 256
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share, centre-cropped: every W-th image that can be read, none twice.

        After the last one all ranks agree on what cannot be read.

        Yields:
            Images N x C x S x S, normalised, on `device`, and their rows, N int64.
        """
        stored = self.source.images
        place = "cpu" if stored is None else stored.device
        rank, world = distributed.rank(), distributed.world_size()
        mine = torch.arange(rank, len(self), world, device=place)
        for images, rows in self.cut(mine.split(batch_size), device):
            if len(rows):
                yield images, rows
        self.bad.agree()

    def cut(
        self, batches: Iterable[Tensor], device: torch.device, draw: Draw | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the crops that `draw` chooses, by default the centres, of each batch of rows.

        A rank may do so alone; where all do, `bad.agree` tells them what cannot be read.

        Yields:
            Images n x C x S x S, normalised, on `device`, and their rows, n; n may be 0.

        Raises:
            UserError: More files than `data.max_bad_fraction` allows cannot be read.
        """
        mean, std = (torch.tensor(v, device=device) for v in normalisation(self.config))
        size, stored = self.config.image_size, self.source.images
        choose = draw or partial(_centres, size)
        if stored is None:
            for rows, cuts in self._streamed(batches, choose, device.type == "cuda"):
                images = cuts.to(device, non_blocking=True).float() / 255
                yield _prepared(images, mean, std), rows
            return
        for rows in batches:
            images = stored[rows.to(stored.device)].to(device)
            if draw is None and images.shape[2:] == (size, size):
                images = images.float() / 255
            else:
                boxes = choose(rows.to(device), *images.shape[2:])
                images = crop_and_resize(images, boxes, size)
            yield _prepared(images, mean, std), rows

    def _streamed(
        self, batches: Iterable[Tensor], draw: Draw, pinned: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows and cuts, n C S S uint8, of each batch, made by workers."""
        loader = worker_loader(
            _Cuts(self.source, self.config.image_size, draw),
            self.config,
            batch_sampler=[rows.tolist() for rows in batches],
            pin_memory=pinned,
            collate_fn=as_it_is,
        )
        for rows, cuts, unread in fetched(loader, self.config.worker_timeout):
            self.bad.note(unread)
            yield rows, cuts


def open_data(
    source: ImageSource, config: DataConfig, device: torch.device, report_path: str | None
) -> LabelledData:
    """Decode what is to be resident.

    Args:
        report_path: Takes the names of unreadable files.
    """
    kept, _ = make_resident(source, config, device, report_path)
    bad = BadFiles(kept, config.max_bad_fraction, report_path)
    return LabelledData(kept, config, bad, len(source) - len(kept))


class RandomCrops:
    """Random resized crops of labelled images, mirrored or not: the linear protocol's augmentation.

    Args:
        images: The training images; their settings tell the side, the normalisation, and by `flip`
            whether images must not be mirrored; null is 0.5.
        crop_min: Smallest share of the area that a crop keeps.
    """

    def __init__(self, images: LabelledData, crop_min: float, seed: int) -> None:
        self.images, self.seed = images, seed
        self.stream, _ = view_streams(seed, 0)
        flip = 0.5 if images.config.flip is None else per_view(images.config.flip)[0]
        self.recipe = ViewRecipe(crop_min, flip, 0.0, (0.0, 0.0, 0.0, 0.0), 0.0, 0.0)

    def order(self, epoch: int) -> Tensor:
        """Return the order of the M images in an epoch."""
        return permutation(self.seed, "probe order", epoch, len(self.images))

    def batches(
        self, epoch: int, batches: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of each global batch of rows, every W-th, as `cut` does.

        Ranks give equally many batches: after the last one all agree on what cannot be read.
        """
        shares = [rows[distributed.rank() :: distributed.world_size()] for rows in batches]
        draw = partial(draw_crops, self.recipe, self.stream, epoch)
        yield from self.images.cut(shares, device, draw)
        self.images.bad.agree()


class _Cuts(Dataset):
    """The crop of each streamed image that `draw` chooses."""

    def __init__(self, source: ImageSource, size: int, draw: Draw) -> None:
        self.source, self.size, self.draw = source, size, draw

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """Return the rows of what could be read, its cuts, and (row, reason) of the rest."""
        read, cuts, bad = [], [], []
        for row in rows:
            try:
                image = self.source.read(row)
            except BadImage as error:
                bad.append((row, error.reason))
                continue
            read.append(row)
            box = self.draw(torch.tensor([row]), *image.shape[1:])
            cuts.append(cut(image, box, self.size))
        empty = torch.empty(0, self.source.channels, self.size, self.size, dtype=torch.uint8)
        return torch.tensor(read, dtype=torch.long), default_collate(cuts) if cuts else empty, bad


def _prepared(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images of 0 to 1, laid out as convolutions are fastest on a CPU."""
    images = views.normalise(images, mean, std)
    return images.contiguous(memory_format=torch.channels_last)


def _centres(size: int, rows: Tensor, height: int, width: int) -> Crops:
    if len(rows) == 1 and rows.device.type == "cpu":
        return _centre(size, height, width)
    return centre_crops(len(rows), height, width, size, rows.device)


@lru_cache(256)
def _centre(size: int, height: int, width: int) -> Crops:
    """Make the box of one streamed image: most sets have few sizes."""
    return centre_crops(1, height, width, size, torch.device("cpu"))
