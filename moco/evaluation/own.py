"""Own subjects: what an evaluation is given in Python besides its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moco.config import DataConfig
from moco.images import sources
from moco.images.image_source import ImageSource
from moco.images.own import open_own, open_pair


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

    def open_labelled(self, data: DataConfig) -> tuple[ImageSource, ImageSource] | None:
        """Open training and test images as `moco.images.sources.open_labelled` does."""
        if self.images is None:
            return sources.open_labelled(data)
        return open_pair(self.images, data, self.column)

    def open_plain(self, data: DataConfig) -> ImageSource | None:
        """Open images that need no labels; None where Python gives none."""
        return None if self.images is None else open_own(self.images, data, self.column)


NOTHING = Given()
