"""Own images: what `moco.pretrain` is given in Python, as a source of images.

Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images.decode import BadImage
from moco.images.dicom import split_frame, with_frames
from moco.images.folders import expanded
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.items import bands_last, open_items, other_values
from moco.images.values import choose_channels, settle

log = logging.getLogger("moco")


def open_own(images: Any, data: DataConfig, column: str = "") -> ImageSource:
    """Make a source of paths, of an array of images, or of the items of a data set.

    Args:
        images: Paths; N x C x H x W, N x H x W x C or N x H x W uint8; or what `open_items` takes.
        data: Settings; channels may be auto.
        column: Of the images where items are dictionaries.

    Raises:
        UserError: They are not what is asked for, said in one line with the remedy.
    """
    if isinstance(images, ImageSource):
        return images
    images = _listed(images)
    if isinstance(images, Tensor) or (
        isinstance(images, np.ndarray)
        and not isinstance(images, np.memmap)
        and images.dtype != object  # of PIL images, say, which are items
    ):
        return _of_array(images, data)
    if isinstance(images, Sequence) and images and isinstance(images[0], str | os.PathLike):
        return _of_paths(images, data)
    items = open_items(images, column, data.exif == "apply")
    channels = items.bands() if data.channels == "auto" else data.channels
    if changed := items.changing(channels):
        log.info(
            "warning: %s is another image when it is read again, so a resumed run is not exact and "
            "images held in memory keep one draw: leave random transforms out of the data set, and "
            "give them as views=", changed,
        )  # fmt: skip
    name = f"{type(images).__name__} of {len(items)} items"
    return ImageSource(name, None, [], None, [], channels, items=items)


def _listed(images: Any) -> Any:
    """Return a column of pandas, which is indexed by its own labels, and an array of names as a
    list."""
    is_column = hasattr(images, "iloc") and getattr(images, "ndim", 0) == 1
    is_text = isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OU"
    return images.tolist() if is_column or is_text else images


def open_pair(pair: Any, data: DataConfig, column: str = "") -> tuple[ImageSource, ImageSource]:
    """Open training and test images with their labels.

    Args:
        pair: Both; each an array and its labels, or items with labels.
        data, column: As of `open_own`.

    Raises:
        UserError: They are no pair, or have no labels.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(
            f"images is a {type(pair).__name__}: give training and test images as a pair, each "
            "with labels, as in (train, test)"
        )
    sources, names = [], []
    for images in pair:
        beside = isinstance(images, tuple | list) and len(images) == 2
        beside = beside and isinstance(images[0], np.ndarray | Tensor) and images[0].ndim > 2
        source = open_own(images[0] if beside else images, data, column)
        sources.append(source)
        names.append(_labels(source, images[1] if beside else None))
    known = sorted({*names[0], *names[1]}, key=lambda name: (isinstance(name, str), name))
    number, classes = {name: place for place, name in enumerate(known)}, [*map(str, known)]
    bank, queries = (
        replace(source, labels=torch.tensor([number[name] for name in found]), classes=classes)
        for source, found in zip(sources, names, strict=True)
    )
    return bank, queries


def _labels(source: ImageSource, labels: Any) -> list[Any]:
    """Return the labels that stand beside an array, or those of the items.

    Raises:
        UserError: There are none, or not one for each image.
    """
    if labels is None and source.items is not None:
        try:
            labels = source.items.labels()
        except BadImage as error:
            raise UserError(f"images: {error}") from None
    if labels is None:
        raise UserError(
            f"{source.name} has no labels: give items that are pairs (image, label), or a pair of "
            "images and labels"
        )
    if len(labels) != len(source):
        raise UserError(f"{source.name} has {len(source)} images and {len(labels)} labels")
    return [_plain(label, place, source.name) for place, label in enumerate(labels)]


def _plain(label: Any, place: int, whose: str) -> Hashable:
    """Return a label as Python's own number or text.

    Raises:
        UserError: It is none, as a row of zeros and a one, None or NaN.
    """
    try:
        label = label.item() if hasattr(label, "item") else label
        if label is not None and label == label and isinstance(label, Hashable):
            return label
    except (ValueError, RuntimeError):  # of arrays and tensors of several numbers
        pass
    raise UserError(
        f"{whose}: the label of image {place} is {' '.join(repr(label).split())[:80]}: give one "
        "number or name for each image"
    )


def _of_array(images: Tensor | np.ndarray, data: DataConfig) -> ImageSource:
    if isinstance(images, np.ndarray):
        if min(images.strides, default=0) < 0:  # as bgr[..., ::-1] has them, and torch has not
            images = images.copy()
        array = torch.from_numpy(images)
    else:
        array = images.detach()
    if array.dtype != torch.uint8:
        raise UserError(f"images {other_values(images)}")
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        raise UserError(
            f"images has the shape {tuple(images.shape)}, which is one image H x W x C: give many, "
            "N x H x W x C"
        )
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or not array.numel():
        raise UserError(
            f"images has the shape {tuple(images.shape)}: give N x C x H x W, N x H x W x C or "
            "N x H x W"
        )
    wanted = 0 if data.channels == "auto" else data.channels
    if bands_last(tuple(array.shape), wanted):
        array = array.permute(0, 3, 1, 2)
    channels = array.shape[1]
    if (channels, wanted) == (1, 3):
        array = array.expand(-1, 3, -1, -1)
    elif wanted not in (0, channels):
        raise UserError(
            f"images has {channels} channels and data.channels is {wanted}: set data.channels "
            f"{channels}, or leave it out"
        )
    name = f"array of {len(array)} images"
    return ImageSource(name, array.contiguous(), [], None, [], array.shape[1])


def _of_paths(images: Sequence[Any], data: DataConfig) -> ImageSource:
    paths = with_frames([expanded(os.fspath(path)) for path in images])
    if missing := [path for path in paths[:1000] if not os.path.lexists(split_frame(path)[0])]:
        raise UserError(f"images: {shown(missing[0])} does not exist: give paths of images")
    if folders := [path for path in paths[:1000] if os.path.isdir(path)]:
        raise UserError(
            f"images: {shown(folders[0])} is a directory: give its path alone, or those of files"
        )
    channels = choose_channels(paths, data) if data.channels == "auto" else data.channels
    reading = settle(paths, replace(data, channels=channels))
    return ImageSource(f"{len(paths)} files", None, paths, None, [], channels, reading)
