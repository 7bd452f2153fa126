"""Sources: where images come from. Data sets and folders become uint8 images with a name each.

Small sets are held as arrays (`moco.images.datasets`); folders are lists of files, decoded when
read. What cannot be decoded raises `BadImage`.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from typing import Literal
from zlib import crc32

import numpy as np
import torch

from moco.config import DataConfig, UserError
from moco.images.datasets import ARRAYS, read_arrays, refuse_own
from moco.images.decode import BadImage
from moco.images.folders import expanded, list_images
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.indexing import open_shards
from moco.images.labels import by_folder, read_list, twins
from moco.images.shards import lies_elsewhere
from moco.images.splits import split_folders
from moco.images.tables import read_table
from moco.images.values import choose_channels, sample, settle

log = logging.getLogger("moco")
_SUMMED = 16  # items that tell one set from another
SHARDED = ("shards", "parquet")


def open_source(data: DataConfig, split: Literal["train", "test"]) -> ImageSource | None:
    """Open one split; None when `test` is asked of a set that has no held-out split.

    The train split of stl10 is its unlabelled one. Uses the network only with `data.download`.

    Raises:
        UserError: The set is missing, empty, corrupt or laid out otherwise, or has other channels.
    """
    refuse_own(data)
    if data.dataset in ARRAYS:
        unlabelled = data.dataset == "stl10" and split == "train"
        return _open_arrays(data, "unlabeled" if unlabelled else split)
    if data.dataset in SHARDED:
        return _open_shards(data, None if split == "train" else _open_shards(data))
    train, test = split_folders(data, say=split == "train")
    if split == "train":
        return _open_folder(data, train)
    return test and _open_folder(data, test, _open_folder(data, train))


def open_labelled(
    data: DataConfig, train: ImageSource | None = None
) -> tuple[ImageSource, ImageSource] | None:
    """Open the bank and the queries of an evaluation; None unless both exist and have labels.

    Args:
        train: The train split if it is open already, so that a large folder is not listed again.
            It becomes the bank, except with stl10, whose bank is its labelled train split.

    Raises:
        UserError: As `open_source`, or the queries have classes that the bank lacks.
    """
    if data.dataset == "stl10":
        return _open_arrays(data, "train"), _open_arrays(data, "test")
    if data.dataset == "own" and train is not None:
        return None
    if data.dataset in SHARDED:
        return _label_shards(data, train or open_source(data, "train"))
    if data.dataset not in ("folder", "imagenet"):
        return train or open_source(data, "train"), open_source(data, "test")
    train = train or open_source(data, "train")
    bank = train if train.labels is not None else _labelled_part(data, train)
    folder = split_folders(data)[1]
    if bank is None or folder is None:
        return None
    queries = _open_folder(data, folder, bank)
    return None if queries is None or queries.labels is None else (bank, queries)


def has_test_split(data: DataConfig) -> bool:
    """Tell whether a set has held-out images of its own, or must not be listed as a whole.

    Raises: UserError, as `open_source` does.
    """
    if data.dataset == "own":
        return False
    if data.dataset in (*ARRAYS, *SHARDED):
        return True
    train, test = split_folders(data)
    if test and test == train:  # a table names what is held out, which may not be there
        return bool(read_table(data.labels).held_out(list_images(data, train)))
    return test is not None


def shared_classes(bank: ImageSource, queries: ImageSource) -> tuple[ImageSource, ImageSource]:
    """Keep the images of classes that both have; say what is left out.

    Raises:
        UserError: They share fewer than two classes.
    """
    pair = (bank, queries)
    counts = [torch.bincount(part.labels, minlength=len(bank.classes)) for part in pair]
    is_shared = (counts[0] > 0) & (counts[1] > 0)
    if is_shared.all():
        return pair
    names = [name for name, kept in zip(bank.classes, is_shared.tolist(), strict=True) if not kept]
    few = f"{', '.join(map(shown, names[:3]))}{' and so on' if len(names) > 3 else ''}"
    if is_shared.sum() < 2:
        raise UserError(
            f"{bank.name} and {queries.name} share {int(is_shared.sum())} classes (only in one: "
            f"{few}): both need images of two classes or more"
        )
    log.info("classes of one split alone are left out: %s (%d images)", few,
             sum(int(count[~is_shared].sum()) for count in counts))  # fmt: skip
    number = is_shared.cumsum(0) - 1
    classes = [name for name, kept in zip(bank.classes, is_shared.tolist(), strict=True) if kept]
    kept = [part.rows(is_shared[part.labels].nonzero()[:, 0]) for part in pair]
    return tuple(replace(p, labels=number[p.labels], classes=classes) for p in kept)


def identify(source: ImageSource, root: str) -> dict[str, int]:
    """Return what tells one set of images from another: their count, and a checksum.

    Of files, the names below `root` in their order; of arrays, about a thousand images; of items,
    those of a few.
    """
    if source.is_sharded:
        return source.paths.identify()
    if source.paths:
        folders = {os.path.dirname(path) for path in source.paths} if not root else ()
        start = len(os.path.commonpath(folders) if folders else expanded(root))
        text = "\n".join(path[start:] for path in source.paths)
        return {"count": len(source), "crc32": crc32(os.fsencode(text))}
    if source.images is None:
        return {"count": len(source), "crc32": _checksum(source)}
    some = source.images[:: max(1, len(source) // 1000)]
    return {"count": len(source), "crc32": crc32(some.contiguous().cpu().numpy())}


def _checksum(source: ImageSource) -> int:
    """Return a checksum over some items; which of them cannot be read counts too."""
    found = 0
    for index in range(0, len(source), max(1, len(source) // _SUMMED)):
        with contextlib.suppress(BadImage):
            found = crc32(source.content(index), crc32(b"%d" % index, found))
    return found


def _open_arrays(data: DataConfig, split: str) -> ImageSource:
    if data.channels == "auto":
        data = replace(data, channels=1 if data.dataset == "digits" else 3)
    images, labels, classes = read_arrays(data, split)
    if labels is not None:
        labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    name = f"{data.dataset} {split}"
    return ImageSource(name, images, [], labels, classes, data.channels)


def _open_folder(
    data: DataConfig, top: str, train: ImageSource | None = None
) -> ImageSource | None:
    """List a directory, or the files of `data.files` in it, with their labels.

    The train split, where it is another one, tells the classes and the range of values; images of
    other classes are then left out, and where there is none at all it is None.
    """
    root = expanded(data.root)
    listed = data.files and train is None
    paths = read_list(data.files, root) if listed else list_images(data, top)
    table = read_table(data.labels) if data.labels else None
    if table:
        if train is None:
            apart = split_folders(data)[1]
            table.say_unused(paths, "" if apart in (None, top) else apart)
        paths = table.part(paths, held_out=train is not None)
        if train is None and not paths:
            raise UserError(
                f"data.labels {data.labels!r} holds all images out: none is left to train on"
            )
        if not paths:  # what the table holds out is not there
            return None
        names = table.labels(paths, train.paths if train else ())
        if train is None:
            table.say(paths, names)
    else:
        names = by_folder(paths, top)
    if data.dataset == "imagenet" and None in names:
        raise UserError(
            f"data.root {data.root!r}: images lie directly in {shown(top)}, imagenet has them in "
            "one subfolder per class; for another tree set data.dataset folder"
        )
    if data.channels == "auto":
        data = replace(data, channels=train.channels if train else choose_channels(paths, data))
    reading = train.reading if train else settle(paths, data)
    source = ImageSource(f"folder {shown(top)}", None, paths, None, [], data.channels, reading)
    if train is None:
        return _numbered(source, names)
    return source if set(names) == {None} else _of_known_classes(source, names, train)


def _of_known_classes(
    source: ImageSource, names: list[str | None], train: ImageSource
) -> ImageSource:
    """Label the images of classes that the train split has, and leave out the others."""
    if not train.classes:
        return source
    known = set(train.classes)
    rows = [row for row, name in enumerate(names) if name in known]
    others = sorted({"(no class)" if name is None else name for name in names} - known)
    if others:
        log.info(
            "%s: %d of %d images are of classes that the train split lacks and are left out: %s",
            source.name, len(names) - len(rows), len(names), ", ".join(map(shown, others[:5])),
        )  # fmt: skip
    if not rows:
        return source
    number = {name: index for index, name in enumerate(train.classes)}
    labels = torch.tensor([number[names[row]] for row in rows])
    kept = source.rows(torch.tensor(rows))
    return replace(kept, labels=labels, classes=train.classes)


def _open_shards(data: DataConfig, train: ImageSource | None = None) -> ImageSource | None:
    """Open the shards that are trained on, or beside a train split those that are held out."""
    paths = open_shards(data, held_out=train is not None)
    if paths is None:
        return None
    if train is None and lies_elsewhere(paths):
        paths.warm(sample(len(paths)))
    if data.channels == "auto":
        data = replace(data, channels=train.channels if train else choose_channels(paths, data))
    reading = train.reading if train else settle(paths, data)
    name = f"{data.dataset} {shown(data.root)}{' (held out)' if train else ''}"
    return ImageSource(name, None, paths, None, [], data.channels, reading)


def _label_shards(data: DataConfig, train: ImageSource) -> tuple[ImageSource, ImageSource] | None:
    """Return the labelled images of the train split and of what is held out; None without any."""
    queries = _open_shards(data, train)
    if queries is None:
        return None
    bank = _named_part(train, train.paths.labels())
    if bank is None:
        return None
    queries = _of_known_classes(queries, queries.paths.labels(), bank)
    return None if queries.labels is None else (bank, queries)


def _numbered(source: ImageSource, names: list[str | None]) -> ImageSource:
    """Give images their labels; none of them has one where any lacks a name, which is said."""
    strays = [row for row, name in enumerate(names) if name is None]
    classes = sorted({name for name in names if name is not None})
    if len(classes) < 2 or 2 * len(strays) > len(names):
        return source
    if strays:
        log.info(
            "%s: %d of %d images have no class (first %s): they are trained on, and left out where "
            "labels are read", source.name, len(strays), len(names), shown(source.paths[strays[0]]),
        )  # fmt: skip
        return source
    if not source.is_sharded and (same := twins(source.paths, names)):
        log.info("warning: the same file lies in two classes: %s and %s (%d such pairs seen)",
                 *map(shown, same[0]), len(same))  # fmt: skip
    number = {name: index for index, name in enumerate(classes)}
    return replace(source, labels=torch.tensor([number[name] for name in names]), classes=classes)


def _labelled_part(data: DataConfig, source: ImageSource) -> ImageSource | None:
    """Return those images of an open train split that have a class; None if too few have one."""
    top = split_folders(data)[0]
    table = read_table(data.labels) if data.labels else None
    names = table.labels(source.paths) if table else by_folder(source.paths, top)
    return _named_part(source, names, few=bool(table))


def _named_part(
    source: ImageSource, names: list[str | None], few: bool = False
) -> ImageSource | None:
    """Return the images that have a class; None if fewer than half have one, unless `few` may."""
    rows = [row for row, name in enumerate(names) if name is not None]
    if 2 * len(rows) < len(names) and not few:
        return None
    part = source.rows(torch.tensor(rows))
    part = _numbered(part, [names[row] for row in rows])
    return None if part.labels is None else part
