"""Pairs: the second view is cut from another image that shows the same thing.

Groups come from a regular expression on the path, a table, or a function. The partner of an image
is a function of (seed, epoch, image): nothing about it is saved.
Shapes: M images in the set, N images of a batch, G groups.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Hashable
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.checks import pattern_of_pairs
from moco.config import DataConfig, UserError
from moco.images.folders import expanded
from moco.images.formats import escaped, shown
from moco.images.image_source import ImageSource
from moco.images.tables import read_table
from moco.random import combine, stream_id, uniform

log = logging.getLogger("moco")
Naming = Callable[[Any], Hashable]  # of a path, or of the place of an item


class Partners:
    """Chooses the partner of each image among the others of its group; alone, it is its own.

    Args:
        groups: M int64, the number of each image's group.

    Attributes:
        checksum: Of the groups.
    """

    def __init__(self, groups: Tensor, seed: int) -> None:
        self.checksum = crc32(groups.numpy().tobytes())
        self.stream = stream_id(seed, "partner")
        self.order = groups.argsort(stable=True)  # M, group by group
        self.size = torch.bincount(groups)[groups]  # M
        starts = torch.bincount(groups).cumsum(0) - torch.bincount(groups)
        self.start = starts[groups]  # M, where the group of an image begins in `order`
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(groups))
        self.within = place - self.start  # M, the image's own place in its group

    def __call__(self, epoch: int, index: Tensor) -> Tensor:
        """Return the partners of N images, on their device."""
        size, within = self.size[index], self.within[index]
        drawn = uniform(self.stream, combine(epoch, index), 1)[:, 0].double()
        step = 1 + (drawn * (size - 1)).long().clamp(max=(size - 2).clamp(min=0))
        return self.order[self.start[index] + (within + step) % size]

    def to(self, device: torch.device) -> Partners:
        """Return a copy on a device; workers have their own, since none may touch a GPU."""
        moved = copy.copy(self)
        for name in ("order", "size", "start", "within"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


class PairedCuts(Dataset):
    """First views of the images of a batch, and second views of their partners.

    Args:
        cuts: Makes both views of each image of a batch, as `moco.images.streamed.Cuts` does.
    """

    def __init__(self, cuts: Any, partners: Partners) -> None:
        self.cuts, self.partners = cuts, partners

    def __getitems__(
        self, batch: tuple[int, np.ndarray, int]
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """Return N x 2 x C x S x S uint8, and what could not be read; each image is read once."""
        epoch, rows, size = batch
        index = torch.from_numpy(np.asarray(rows))
        both = torch.cat([index, self.partners(epoch, index)])
        each, place = both.unique(return_inverse=True)
        crops, bad = self.cuts.__getitems__((epoch, each.numpy(), size))
        first, second = place.chunk(2)
        return torch.stack([crops[first, 0], crops[second, 1]], 1), bad


def find_partners(
    source: ImageSource, config: DataConfig, seed: int, own: Naming | None = None
) -> Partners | None:
    """Group the images as `data.pairs` says; None where it is empty.

    Args:
        source: The images that can be read.
        own: The user's function, which names what an image shows; None stands for nothing.

    Raises:
        UserError: No two images belong together, or the setting does not fit the images.
    """
    if not config.pairs:
        return None
    names = _names(source, config, own)
    numbers: dict[Hashable, int] = {}
    keys = [("alone", row) if name is None else ("named", name) for row, name in enumerate(names)]
    groups = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    sizes = torch.bincount(groups)
    paired = int(sizes[sizes > 1].sum())
    if paired == 0:
        raise UserError(
            f"data.pairs {config.pairs!r} finds no two of {len(source)} images that show the same "
            f"thing (first {shown(source.called(0))}: {names[0]!r}): give names that images share"
        )
    log.info("pairs: %d of %d images have a partner, in %d groups; the others are their own",
             paired, len(source), int((sizes > 1).sum()))  # fmt: skip
    return Partners(groups, seed)


def _names(source: ImageSource, config: DataConfig, own: Naming | None) -> list[Hashable]:
    """Return what each image shows, or None."""
    if config.pairs == "own":
        if own is None:
            raise UserError(
                "data.pairs is own, a function of the user's: give it in Python, as in "
                "moco.pretrain(images, pairs=function, resume=RUN)"
            )
        places = map(source.place, range(len(source)))
        return [_named(own, each) for each in source.paths or places]
    if not source.paths:
        raise UserError(
            f"data.pairs {config.pairs!r} reads paths, and {source.name} has none: give a function "
            "of the place of an image, as in moco.pretrain(images, pairs=function)"
        )
    root = _top(source, config)
    if config.pairs.lower().endswith(".csv"):
        try:
            return list(read_table(config.pairs, may_split=False).labels(source.paths))
        except UserError as error:
            raise UserError(str(error).replace("data.labels", "data.pairs")) from None
    pattern = pattern_of_pairs(config.pairs)
    below = (os.path.relpath(path, root).replace(os.sep, "/") for path in source.paths)
    found = (pattern.search(path) for path in below)
    return [match and match.groups() for match in found]


def _top(source: ImageSource, config: DataConfig) -> str:
    if config.root:
        return expanded(config.root)
    return os.path.commonpath({os.path.dirname(path) for path in source.paths})


def _named(own: Naming, image: Any) -> Hashable:
    try:
        name = own(image)
        hash(name)
        return name
    except Exception as error:
        reason = f"{type(error).__name__}: {escaped(str(error))}"
        raise UserError(f"pairs raised {reason} for {shown(str(image))}") from error
