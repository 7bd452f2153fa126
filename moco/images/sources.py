"""Sources: where images come from. Data sets and folders become uint8 images with a name each.

Small sets are held as arrays (`moco.images.datasets`); folders are lists of files, decoded when
read. What cannot be decoded raises `BadImage`.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images.datasets import ARRAYS, read_arrays
from moco.images.decode import decode, shown
from moco.images.folders import EXTENSIONS, check_root, expanded, is_dir, visible, walk

log = logging.getLogger("moco")


@dataclass
class ImageSource:
    """Images under a name.

    Attributes:
        name: For people, e.g. "cifar10 train".
        images: N C H W uint8 where they are held decoded, in memory or on a device, else None.
        paths: One per image where images are files, else empty.
        labels: N int64, or None when unlabelled.
        classes: Class names in the order of the labels; empty when unlabelled.
        channels: C of every image.
        max_value: Value in 16-bit files that becomes 255.
    """

    name: str
    images: Tensor | None
    paths: list[str]
    labels: Tensor | None
    classes: list[str]
    channels: int
    max_value: int

    def __len__(self) -> int:
        return len(self.paths) if self.images is None else len(self.images)

    def read(self, index: int) -> Tensor:
        """Return one image, C H W uint8, in its own size; raise BadImage as `decode` does."""
        if self.images is not None:
            return self.images[index]
        return decode(self.paths[index], self.channels, self.max_value)

    def rows(self, rows: Tensor) -> ImageSource:
        """Keep only some images: those at `rows`, in that order."""
        return replace(
            self,
            images=None if self.images is None else self.images[rows.to(self.images.device)],
            paths=[self.paths[row] for row in rows.tolist()] if self.paths else [],
            labels=None if self.labels is None else self.labels[rows],
        )


def open_source(data: DataConfig, split: Literal["train", "test"]) -> ImageSource | None:
    """Open one split; None when `test` is asked of a set that has no held-out split.

    The train split of stl10 is its unlabelled one. Uses the network only with `data.download`.

    Raises:
        UserError: The set is missing, empty, corrupt or laid out otherwise, or has other channels.
    """
    if data.dataset in ARRAYS:
        unlabelled = data.dataset == "stl10" and split == "train"
        return _open_arrays(data, "unlabeled" if unlabelled else split)
    train, test = _split_folders(data)
    if split == "train":
        return _open_folder(data, train)
    return test and _open_folder(data, test, _open_folder(data, train).classes)


def open_labelled(
    data: DataConfig, train: ImageSource | None = None
) -> tuple[ImageSource, ImageSource] | None:
    """Open the bank and the queries of an evaluation; None unless both exist and have labels.

    Args:
        data: As for `open_source`.
        train: The train split if it is open already, so that a large folder is not listed again.
            It becomes the bank, except with stl10, whose bank is its labelled train split.

    Raises:
        UserError: As `open_source`, or the queries have classes that the bank lacks.
    """
    if data.dataset == "stl10":
        return _open_arrays(data, "train"), _open_arrays(data, "test")
    bank = train or open_source(data, "train")
    if bank is None or bank.labels is None:
        return None
    if data.dataset in ("folder", "imagenet"):
        folder = _split_folders(data)[1]
        queries = _open_folder(data, folder, bank.classes) if folder else None
    else:
        queries = open_source(data, "test")
    return None if queries is None or queries.labels is None else (bank, queries)


def identify(source: ImageSource, root: str) -> dict[str, int]:
    """Return what tells one set of images from another: their count, and a checksum.

    Of files, the names below `root` in their order; of arrays, about a thousand images.
    """
    if source.paths:
        start = len(expanded(root))
        text = "\n".join(path[start:] for path in source.paths)
        return {"count": len(source), "crc32": crc32(os.fsencode(text))}
    some = source.images[:: max(1, len(source) // 1000)]
    return {"count": len(source), "crc32": crc32(some.contiguous().cpu().numpy())}


def _open_arrays(data: DataConfig, split: str) -> ImageSource:
    images, labels, classes = read_arrays(data, split)
    if labels is not None:
        labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    name = f"{data.dataset} {split}"
    return ImageSource(name, images, [], labels, classes, data.channels, data.max_value)


def _split_folders(data: DataConfig) -> tuple[str, str | None]:
    """Return the directories of the train and the held-out split, by their names below the root."""
    root = check_root(data.root)
    names = [entry.name for entry in os.scandir(root) if visible(entry.name) and is_dir(entry)]
    by_name = {name.lower(): os.path.join(root, name) for name in sorted(names)}
    train = by_name.get("train")
    if data.dataset == "imagenet":
        if train is None or "val" not in by_name:
            raise UserError(
                f"data.root {data.root!r} lacks train/ or val/: lay imagenet out as "
                "train/CLASS/*.JPEG and val/CLASS/*.JPEG; for another tree set data.dataset folder"
            )
        return train, by_name["val"]
    test = by_name.get("test") or by_name.get("val") or by_name.get("validation")
    # Among other folders `train` may be a class of images, unless one of them is a held-out split.
    if train and (test or len(names) == 1):
        return train, test
    return root, None


def _open_folder(data: DataConfig, top: str, classes: list[str] | None = None) -> ImageSource:
    """List a directory; the first-level subfolders are its labels, by `classes` where given."""
    paths = _list_images(data, top)
    start = len(os.path.join(top, ""))
    parts = [path[start:].split(os.sep, 1) for path in paths]
    names = {part[0] for part in parts}
    labelled = all(len(part) == 2 for part in parts)
    if data.dataset == "imagenet" and not labelled:
        raise UserError(
            f"data.root {data.root!r}: images lie directly in {shown(top)}, imagenet has them in "
            "one subfolder per class; for another tree set data.dataset folder"
        )
    source = ImageSource(
        f"folder {shown(top)}", None, paths, None, [], data.channels, data.max_value
    )
    if not labelled or classes == [] or (len(names) < 2 and not names <= set(classes or [])):
        return source
    classes = sorted(names) if classes is None else classes
    unknown = sorted(names - set(classes))
    if unknown:
        raise UserError(
            f"data.root {data.root!r}: {len(unknown)} class folders of {shown(top)} are not in the "
            f"train split ({', '.join(map(shown, unknown[:5]))}): give both the same class names"
        )
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[part[0]] for part in parts])
    return replace(source, labels=labels, classes=classes)


def _list_images(data: DataConfig, top: str) -> list[str]:
    paths, unread = walk(top)
    if unread:
        log.warning("%d folders cannot be read and are skipped, first %s", len(unread), unread[0])
    if not paths:
        where = f"{data.root!r}" if top == expanded(data.root) else f"{data.root!r}: {shown(top)}"
        skipped = f"; {len(unread)} of them cannot be read" if unread else ""
        raise UserError(
            f"data.root {where} holds no images (looked for {' '.join(EXTENSIONS)} in all "
            f"subfolders{skipped}): give the folder that holds them"
        )
    return paths
