"""The image source: uint8 images under a name, however they are kept.

What cannot be decoded raises `BadImage`.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from moco.images.decode import Decoded, Header, decode_reduced, read_header
from moco.images.items import Items
from moco.images.scaling import PLAIN, Reading
from moco.images.shards import ShardSet


@dataclass
class ImageSource:
    """Images under a name.

    Attributes:
        name: For people, e.g. "cifar10 train".
        images: N C H W uint8 where they are held decoded, in memory or on a device, else None.
        paths: One per image where images are files or lie in shards, else empty.
        labels: N int64, or None when unlabelled.
        classes: Class names in the order of the labels; empty when unlabelled.
        channels: C of every image.
        items: What the images are read from where they are neither held nor files, else None.
        reading: Which values become 0 and 255, where files or items have more than 8 bits.
        places: Which images of the array or the items these are, in their order; None: all.
    """

    name: str
    images: Tensor | None
    paths: Sequence[str]
    labels: Tensor | None
    classes: list[str]
    channels: int
    reading: Reading = PLAIN
    items: Items | None = None
    places: Tensor | None = None

    def __len__(self) -> int:
        if self.images is not None:
            return len(self.images)
        if self.items is not None:
            return len(self.items if self.places is None else self.places)
        return len(self.paths)

    def called(self, index: int) -> str:
        """Return what an image is called: the path of a file, or its place."""
        if self.paths:
            return self.paths[index]
        place = self.place(index)
        return f"image {place}" if self.items is None else self.items.name(place)

    def place(self, index: int) -> int:
        """Return where an image that is no file stands in what it was given in."""
        return index if self.places is None else int(self.places[index])

    @property
    def readers(self) -> int:
        """Return how many threads may read at a time; data of the user's own knows one."""
        return 32 if self.items is None else 1

    def header(self, index: int) -> Header:
        """Return what an image that is not held says of itself; raise BadImage as `decode` does."""
        if self.items is not None:
            return self.items.header(self.place(index), self.channels, self.reading)
        return read_header(self.paths[index], self.channels, self.reading)

    def read(self, index: int) -> Tensor:
        """Return an image on the CPU, C H W uint8 in its size; raise BadImage as `decode` does."""
        return self.read_reduced(index, None).pixels

    def read_reduced(self, index: int, reduction: Callable[[int, int], int] | None) -> Decoded:
        """Return one image with no more pixels than are needed, as `decode_reduced` does."""
        if self.images is not None:
            return Decoded(self.images[index].cpu(), *self.images.shape[2:], 1)
        if self.items is not None:
            image = self.items.read(self.place(index), self.channels, self.reading)
            return Decoded(image, *image.shape[1:], 1)
        return decode_reduced(self.paths[index], self.channels, self.reading, reduction)

    def content(self, index: int) -> bytes:
        """Return what tells an item from others, in whatever range it is read."""
        assert self.items is not None
        return self.items.content(self.place(index), self.channels)

    @property
    def is_sharded(self) -> bool:
        """Tell whether the images lie in shards, and are streamed in an order of their own."""
        return isinstance(self.paths, ShardSet)

    def around(self, index: int) -> range:
        """Return the images of which one may stand for another: its shard's, or all."""
        return self.paths.around(index) if self.is_sharded else range(len(self))

    def rows(self, rows: Tensor) -> ImageSource:
        """Keep only some images: those at `rows`, in that order."""
        paths = self.paths
        if paths:
            chosen = rows.tolist()
            paths = paths.rows(chosen) if self.is_sharded else [paths[row] for row in chosen]
        return replace(
            self,
            images=None if self.images is None else self.images[rows.to(self.images.device)],
            paths=paths,
            places=rows.cpu() if self.places is None else self.places[rows.cpu()],
            labels=None if self.labels is None else self.labels[rows],
        )
