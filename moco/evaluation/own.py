"""Own subjects: what an evaluation is given in Python besides its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

from torch import nn

from moco.config import DataConfig, UserError
from moco.images import sources
from moco.images.image_source import ImageSource
from moco.images.own import open_own, open_pair

Pair = tuple[ImageSource, ImageSource]  # training and test images


@dataclass(frozen=True)
class Given:
    """Images and a network of the user's own; None: as the settings say.

    Attributes:
        images: Training and test images with their labels, as `moco.images.own.open_pair` takes;
            where no labels are read, images as `moco.images.own.open_own` takes.
        backbone: The module whose weights the checkpoint holds.
        column: Of the images where items are dictionaries.
    """

    images: Any = None
    backbone: nn.Module | None = None
    column: str = ""

    def open_labelled(self, data: DataConfig) -> Pair:
        """Open training and test images; raise UserError where there are no labels or no split."""
        if self.images is not None:
            return open_pair(self.images, data, self.column)
        pair = sources.open_labelled(data)
        if pair is None:
            raise UserError(
                f"{data.dataset} {data.root} has no labelled train and test images: give a folder "
                "with train/CLASS/ and test/CLASS/ (or val/CLASS/) of two classes or more, or a "
                "table with data.labels"
            )
        return pair

    def open_plain(self, data: DataConfig) -> ImageSource | None:
        """Open images that need no labels; None where Python gives none."""
        return None if self.images is None else open_own(self.images, data, self.column)


NOTHING = Given()


def identity(part: ImageSource) -> str:
    """Return what tells labelled images of Python's own from others, or from other labels."""
    labels = None if part.labels is None else crc32(part.labels.numpy().tobytes())
    return f"{sources.identify(part, '')} {part.classes} {labels}"
