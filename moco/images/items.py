"""Items: images that Python gives one by one, from anything that has a length and can be indexed.

An item is a PIL image, an array or a tensor, a pair of such an image and its label, or a
dictionary with the image in one of its columns. What does not become an image raises `BadImage`.
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from moco.config import UserError
from moco.images.array_like import to_array
from moco.images.decode import BadImage, Header, check_bands, fit_bands
from moco.images.formats import escaped
from moco.images.scaling import PLAIN, Reading
from moco.images.values import sample
from moco.pixels import scaled

_LOOKED_AT = 16  # items, of which one must be an image
_READ_TWICE = 4  # items that tell whether all stay the same: a coin shows in 15 of 16 sets
_NO_LABEL = object()


@dataclass(frozen=True)
class Items:
    """Images of a sequence or a map-style data set.

    Attributes:
        data: What is indexed by 0, 1, 2 and so on.
        column: Of the image where items are dictionaries, else empty.
        turn: Whether PIL images are turned upright as their EXIF orientation says.
        noun: What one is called.
    """

    data: Any
    column: str = ""
    turn: bool = False
    noun: str = "item"

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Name an image for people."""
        return f"{self.noun} {index}"

    def item(self, index: int) -> Any:
        """Return an item as the data gives it; whatever it raises becomes BadImage."""
        try:
            return self.data[index]
        except MemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {escaped(str(error))}"
            raise BadImage(self.name(index), f"cannot be read: {reason}") from error

    def image(self, index: int) -> Any:
        """Return the image of an item, without its label and other columns."""
        item = self.item(index)
        if isinstance(item, dict):
            if self.column not in item:
                columns = ", ".join(map(str, item)) or "nothing"
                raise BadImage(self.name(index), f"has no column {self.column!r}, but {columns}")
            return item[self.column]
        return item[0] if isinstance(item, tuple | list) and len(item) else item

    def values(self, index: int, channels: int) -> np.ndarray:
        """Return an image's values as they are, bands x H x W; raise BadImage as `read` does."""
        name = self.name(index)
        values = to_array(name, self.image(index), channels, self.turn)
        check_bands(name, len(values), channels)
        return values

    def read(self, index: int, channels: int, reading: Reading = PLAIN) -> Tensor:
        """Return an image, C H W uint8, H W C in memory, scaled and brought to its channels as
        files are.

        Raises:
            BadImage: No image, no range for values of more than 8 bits, or other channels.
        """
        name, values = self.name(index), self.values(index, channels)
        full = (reading.low, reading.high) == (PLAIN.low, PLAIN.high)
        if values.dtype != np.uint8 and full and not reading.reason:
            reason = f"holds {values.dtype} values, and the images looked at hold 8 bits: give all"
            raise BadImage(name, f"{reason} of one type, or set data.min_value and data.max_value")
        try:
            levels = scaled(values, channels, reading.low, reading.high)
        except ValueError as error:
            raise BadImage(name, str(error)) from None
        pixels = fit_bands(name, levels, channels)
        return torch.from_numpy(np.array(pixels.transpose(1, 2, 0), order="C")).permute(2, 0, 1)

    def content(self, index: int, channels: int) -> bytes:
        """Return what tells an image from others, in whatever range it is read."""
        values = self.values(index, channels)
        if values.dtype == np.uint8:
            values = fit_bands(self.name(index), values, channels)
        return values.tobytes()

    def header(self, index: int, channels: int, reading: Reading = PLAIN) -> Header:
        """Read an item for its height, width and bands: items have no header of their own."""
        bands, height, width = self.read(index, channels, reading).shape
        return Header(height, width, np.dtype(np.uint8), False, bands)

    def bands(self) -> int:
        """Return the channels of some items, evenly spread: 3 where grey and colours are mixed.

        Raises:
            UserError: None of these items is an image.
        """
        found, faults = [], []
        for index in sample(len(self), _LOOKED_AT):
            try:
                found.append(len(to_array(self.name(index), self.image(index), 0, False)))
            except BadImage as error:
                faults.append(error)
        if not found:
            raise UserError(f"images: {faults[0]}")
        return max(found) if {*found} == {1, 3} else found[0]

    def changing(self, channels: int) -> str:
        """Name one of some items that is another image when it is read again; empty: none is."""
        for index in sample(len(self), _READ_TWICE):
            with contextlib.suppress(BadImage):
                first, again = (self.values(index, channels) for _ in range(2))
                if not np.array_equal(first, again, equal_nan=True):
                    return self.name(index)
        return ""

    def labels(self) -> list[Any] | None:
        """Return the second part of each pair, or the column `label` of dictionaries; None where
        items are images alone."""
        for name in ("targets", "labels"):  # as torchvision's sets have them, without their images
            known = getattr(self.data, name, None)
            if known is None or len(known) != len(self):
                continue
            change = getattr(self.data, "target_transform", None)
            mapped = [*map(change, known)] if callable(change) else list(known)
            if self._have(mapped):
                return mapped
        found = []
        for index in range(len(self)):
            label = self._label(index)
            if label is _NO_LABEL:
                return None
            found.append(label)
        return found

    def _label(self, index: int) -> Any:
        item = self.item(index)
        if isinstance(item, dict):
            return item.get("label", _NO_LABEL)
        return item[1] if isinstance(item, tuple | list) and len(item) > 1 else _NO_LABEL

    def _have(self, known: list[Any]) -> bool:
        """Tell whether some items have these labels, as far as theirs are single values."""
        for index in range(0, len(self), max(1, len(self) // _LOOKED_AT)):
            try:
                label = self._label(index)
            except BadImage:  # counted where images are read
                continue
            is_single = isinstance(label, str | int | float | np.generic)
            is_single |= isinstance(label, np.ndarray | Tensor) and label.ndim == 0
            if is_single and label != known[index]:
                return False
        return True


def open_items(data: Any, column: str = "", turn: bool = False) -> Items:
    """Check that data is sized and can be indexed, and find the column of its images.

    Raises:
        UserError: It lacks something, named with the remedy.
    """
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        raise UserError("images is a DataLoader, whose items are batches: give its data set")
    if (isinstance(data, Mapping) and 0 not in data) or hasattr(data, "iloc"):  # pandas' table
        names = ", ".join(map(repr, data))
        raise UserError(f"images is a {kind} of {names[:80]}: give what one of these holds")
    try:
        count = len(data)
    except (TypeError, NotImplementedError):
        raise UserError(
            f"images is a {kind}, which has no length: give a list, an array or a map-style "
            "Dataset, such as list(images)"
        ) from None
    if not hasattr(data, "__getitem__"):
        raise UserError(
            f"images is a {kind}, which cannot be indexed by number: give a list, an array or a "
            "map-style Dataset, such as list(images)"
        )
    if count == 0:
        raise UserError(f"images is a {kind} of length 0: give some images")
    items = Items(data, column, turn)
    try:
        first = items.item(0)
    except BadImage as error:
        if count == 1:
            raise UserError(f"images: {error}") from None
        first = None
    if isinstance(first, dict) and not column:
        found = [name for name, value in first.items() if _is_image(value)]
        if len(found) != 1:
            names = ", ".join(map(str, first))
            raise UserError(
                f"images: items are dictionaries of {names}, {len(found)} of which are images: "
                "name the column, as in column='image'"
            )
        items = replace(items, column=found[0])
    elif column and first is not None and not isinstance(first, dict):
        raise UserError(f"column is {column!r}, but items are no dictionaries: leave it out")
    return items


def check_pickles(name: str, part: Any) -> None:
    """Raise UserError for an argument that worker processes cannot be handed.

    Forked workers have it already. Arrays are not copied for this.
    """
    if multiprocessing.get_start_method() == "fork":
        return
    try:
        with open(os.devnull, "wb") as nothing:
            pickle.Pickler(nothing, protocol=5, buffer_callback=lambda _: None).dump(part)
    except Exception as error:
        reason = escaped(str(error)) or type(error).__name__
        raise UserError(
            f"{name} cannot be pickled for worker processes ({reason}): define it in a module and "
            "open its files in __getitem__, or set data.num_workers 0"
        ) from None


def _is_image(value: Any) -> bool:
    array = isinstance(value, np.ndarray | Tensor) and value.ndim in (2, 3) and value.shape[-1] > 1
    return array or isinstance(value, Image.Image)
