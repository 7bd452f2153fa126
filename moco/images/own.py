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
from moco.images.array_like import bands_last, no_values, to_numpy, unmasked
from moco.images.decode import BadImage
from moco.images.dicom import split_frame, with_frames
from moco.images.folders import expanded
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.items import Items, open_items
from moco.images.scaling import Reading
from moco.images.values import as_told, choose_channels, say_idle, settle

log = logging.getLogger("moco")


def open_own(
    images: Any, data: DataConfig, column: str = "", reading: Reading | None = None
) -> ImageSource:
    """Make a source of paths, of an array of images, or of the items of a data set.

    Args:
        images: Paths; N x C x H x W, N x H x W x C or N x H x W; or what `open_items` takes.
        data: Settings; channels may be auto.
        column: Of the images where items are dictionaries.
        reading: Of the training images, where these are test images.

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
        return _of_array(images, data, reading)
    if isinstance(images, Sequence) and images and isinstance(images[0], str | os.PathLike):
        return _of_paths(images, data, reading)
    items = open_items(images, column, data.exif == "apply")
    channels = items.bands() if data.channels == "auto" else data.channels
    if changed := items.changing(channels):
        log.info(
            "warning: %s is another image when it is read again, so a resumed run is not exact and "
            "images held in memory keep one draw: leave random transforms out of the data set, and "
            "give them as views=", changed,
        )  # fmt: skip
    name = f"{type(images).__name__} of {len(items)} items"
    return _of_items(name, items, channels, data, reading)


def _of_items(
    name: str, items: Items, channels: int, data: DataConfig, reading: Reading | None
) -> ImageSource:
    """Make a source of items, of whose values a sample tells the range as that of files does."""
    if reading is None:
        reading = settle(range(len(items)), replace(data, channels=channels), items.values)
    return ImageSource(name, None, [], None, [], channels, reading, items)


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
    sources, names, reading = [], [], None
    for images in pair:
        beside = isinstance(images, tuple | list) and len(images) == 2
        beside = beside and isinstance(images[0], np.ndarray | Tensor) and images[0].ndim > 2
        source = open_own(images[0] if beside else images, data, column, reading)
        sources.append(source)
        reading = source.reading
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


def _of_array(
    images: Tensor | np.ndarray, data: DataConfig, reading: Reading | None
) -> ImageSource:
    """Hold an array of 8 bits as it is; the images of any other are scaled when they are read."""
    is_bytes = images.dtype in (torch.uint8, np.uint8)
    if isinstance(images, np.ndarray):
        images = unmasked(images)
        if is_bytes and min(images.strides, default=0) < 0:  # as bgr[..., ::-1], which torch lacks
            images = images.copy()
        array = torch.from_numpy(images) if is_bytes else images
    else:
        try:
            array = images.detach() if is_bytes else to_numpy(images)
        except UserError as error:
            raise UserError(f"images {error}") from None
    if isinstance(array, np.ndarray) and array.dtype.kind not in "uif":
        raise UserError(f"images {no_values(array)}")
    array, channels = _laid_out(array, data)
    name = f"array of {len(array)} images"
    if isinstance(array, np.ndarray):
        # Without an axis of bands no other is taken for it.
        items = Items(array[:, 0] if array.shape[1] == 1 else array, noun="image")
        return _of_items(name, items, channels, data, reading)
    if reading is None:
        say_idle(data)
        reading = as_told(data)  # by which test images of more bits are read
    array = array.expand(-1, channels, -1, -1).contiguous()
    return ImageSource(name, array, [], None, [], channels, reading)


def _laid_out(array: Any, data: DataConfig) -> tuple[Any, int]:
    """Return an array or a tensor as N C H W, and the channels of its images: grey may become RGB.

    Raises:
        UserError: It has no such shape, or other channels than the settings say.
    """
    shape = tuple(array.shape)
    if array.ndim == 3 and shape[-1] in (3, 4):
        raise UserError(
            f"images has the shape {shape}, which is one image H x W x C: give many, N x H x W x C"
        )
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or 0 in shape:
        raise UserError(
            f"images has the shape {shape}: give N x C x H x W, N x H x W x C or N x H x W"
        )
    wanted = 0 if data.channels == "auto" else data.channels
    if bands_last(tuple(array.shape), wanted):
        last_first = (0, 3, 1, 2)
        is_tensor = isinstance(array, Tensor)
        array = array.permute(last_first) if is_tensor else array.transpose(last_first)
    channels = array.shape[1]
    if (channels, wanted) == (1, 3):
        return array, 3
    if wanted not in (0, channels):
        raise UserError(
            f"images has {channels} channels and data.channels is {wanted}: set data.channels "
            f"{channels}, or leave it out"
        )
    return array, channels


def _of_paths(
    images: Sequence[Any], data: DataConfig, reading: Reading | None = None
) -> ImageSource:
    paths = with_frames([expanded(os.fspath(path)) for path in images])
    if missing := [path for path in paths[:1000] if not os.path.lexists(split_frame(path)[0])]:
        raise UserError(f"images: {shown(missing[0])} does not exist: give paths of images")
    if folders := [path for path in paths[:1000] if os.path.isdir(path)]:
        raise UserError(
            f"images: {shown(folders[0])} is a directory: give its path alone, or those of files"
        )
    channels = choose_channels(paths, data) if data.channels == "auto" else data.channels
    reading = reading or settle(paths, replace(data, channels=channels))
    return ImageSource(f"{len(paths)} files", None, paths, None, [], channels, reading)
