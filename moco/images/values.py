"""Values: which range of a set's values becomes 0 to 255, from a bounded sample of it.

The sample is the same on every rank, and its cost does not grow with the set. Headers come first:
where all files hold 8 bits, nothing is left to decide and no pixel is read. Images that Python
gives have no headers: they are read in their place.
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moco.config import DataConfig, UserError
from moco.images.decode import BadImage, Header, read_header, read_values
from moco.images.levels import FEW_LEVELS, OUTLIERS, PIXELS_PER_FILE, check_levels, choose_range
from moco.images.scaling import Reading, numbers

log = logging.getLogger("moco")
FILES, VALUES = 64, 2**24  # files whose headers are read, and values in all that are looked at
ReadValues = Callable[[Any, int], np.ndarray]  # an image and its channels to C H W as they are
_UNCUT = 65_536.0  # a top with which Pillow's cut of 16-bit colours to 8 bits is not enough


@dataclass
class Seen:
    """What a sample of a set's files holds.

    Attributes:
        headers: Of the files that could be read.
        values: C H W each, as they are stored, of some files of more than 8 bits.
        bad: Why the others could not be read.
    """

    headers: list[Header]
    values: list[np.ndarray]
    bad: list[BadImage]

    @property
    def kinds(self) -> list[str]:
        """Name the types of more than 8 bits, sorted."""
        return sorted({v.dtype.name for v in self.values if v.dtype != np.uint8})

    @property
    def ends(self) -> tuple[float, float]:
        """Return the lowest and the highest value without a few outliers of each file."""
        edges = (OUTLIERS, 100 - OUTLIERS)
        finite = [v[np.isfinite(v)] for v in self.values if v.dtype != np.uint8]
        found = [np.percentile(v, edges) for v in finite if v.size]
        if not found:
            return 0.0, 1.0
        return float(min(low for low, _ in found)), float(max(high for _, high in found))


def look(
    paths: Sequence[Any],
    channels: int,
    reading: Reading,
    with_values: bool = True,
    read: ReadValues | None = None,
) -> Seen:
    """Read the headers of some files, evenly spread, and values of those of more than 8 bits.

    Args:
        read: Reads images that are no files, given what stands for them in `paths`.
    """
    some = [paths[row] for row in sample(len(paths))]
    seen, deep = Seen([], [], []), []
    for path in some:
        try:
            header = _header(read(path, channels)) if read else read_header(path, channels, reading)
        except BadImage as error:
            seen.bad.append(error)
            continue
        seen.headers.append(header)
        if with_values and header.dtype not in (np.uint8, np.bool_):
            deep.append((path, header.height * header.width * channels))
    # A spread order, so that a budget which ends early has still met all parts of the set.
    budget = VALUES
    for path, size in deep[::4] + deep[1::4] + deep[2::4] + deep[3::4]:
        if seen.values and size > budget:
            continue
        budget -= size
        try:
            values = read(path, channels) if read else read_values(path, channels, reading)
        except BadImage as error:
            seen.bad.append(error)
            continue
        if values.dtype.kind in "uif":  # others are no images, and are named where all are read
            native = values.dtype.newbyteorder("=")
            seen.values.append(_thinned(values).astype(native, copy=False))
    return seen


def _header(values: np.ndarray) -> Header:
    bands, height, width = values.shape
    return Header(height, width, values.dtype, False, bands)


def sample(total: int, most: int = FILES) -> list[int]:
    """Return which images of a set are looked at: some, evenly spread."""
    count = min(most, total)
    return [number * total // count for number in range(count)]


def _thinned(values: np.ndarray) -> np.ndarray:
    step = max(1, math.isqrt(values[0].size // PIXELS_PER_FILE))
    return values[:, ::step, ::step].copy()


def choose_channels(paths: Sequence[str], data: DataConfig) -> int:
    """Decide how many channels a set has: 1 where all is grey, 3 with colours, else its bands.

    Raises:
        UserError: No file of the sample can be read.
    """
    reading = Reading(max_pixels=data.max_pixels)
    seen = look(paths, 0, reading, with_values=False)
    bands = {header.bands for header in seen.headers}
    if not bands:
        raise UserError(
            f"data.channels is auto and none of {len(seen.bad)} files looked at can be read: "
            f"mend them, first {seen.bad[0]}"
        )
    return max(bands) if len(bands) == 1 or max(bands) > 3 else 3


def settle(paths: Sequence[Any], data: DataConfig, read: ReadValues | None = None) -> Reading:
    """Decide how the files of a set are read, and check on a sample that this leaves an image.

    Args:
        read: As of `look`.

    Raises:
        UserError: The sample is one value after scaling, or of types that share no range; or there
            are more or fewer values than channels.
    """
    auto = "auto" in (data.min_value, data.max_value)
    reading = as_told(data)
    low, high = reading.low, reading.high
    for name, ends in (("min_value", low), ("max_value", high)):
        if len(ends) not in (1, data.channels):
            raise UserError(
                f"data.{name} has {len(ends)} values for data.channels {data.channels}: give one "
                "for all of them, or one for each"
            )
    seen = look(paths, data.channels, replace(reading, low=(0.0,), high=(_UNCUT,)), read=read)
    _say_turned(seen, reading)
    _say_pages(seen)
    if windowed := sum(header.windowed for header in seen.headers):
        log.info(
            "%d of %d files looked at are DICOM, shown through their own window "
            "(data.dicom_window)", windowed, len(seen.headers),
        )  # fmt: skip
    if not seen.kinds:
        if seen.bad and any(header.dtype != np.uint8 for header in seen.headers):
            log.info("warning: no range was chosen, and 65535 becomes 255: %s", seen.bad[-1])
        elif seen.headers:
            say_idle(data)
        if not read:
            _check_cut(paths, data.channels, reading, seen)
        return reading
    (bottom, top), kinds = seen.ends, seen.kinds
    if auto:
        _check_kinds(kinds)
        chosen = choose_range(bottom, top)
        low = (chosen[0],) if data.min_value == "auto" else low
        high = (chosen[1],) if data.max_value == "auto" else high
    if not all(b < t for b, t in zip(*_matched(low, high), strict=True)):
        raise UserError(
            f"data.min_value {numbers(low)} is not below data.max_value {numbers(high)}, where "
            f"the images hold {bottom:g} to {top:g}: set both"
        )
    how = "auto" if auto else "as set"
    held = f"{', '.join(kinds)} images, {len(seen.values)} of which hold {bottom:g} to {top:g}"
    reading = replace(reading, low=low, high=high, reason=f"{how}: {held}")
    check_levels(seen.values, seen.ends, reading)
    return reading


def say_idle(data: DataConfig) -> None:
    """Say that a range is set for images of 8 bits, if it is."""
    if (data.min_value, data.max_value) != ("auto", "auto"):
        log.info("data.min_value and data.max_value do nothing here: the images looked at have "
                 "8 bits, and are taken as they are")  # fmt: skip


def as_told(data: DataConfig) -> Reading:
    """Return how files are read by the settings alone, where `auto` is the full range."""
    low, high = _as_set(data.min_value, (0.0,)), _as_set(data.max_value, (65535.0,))
    return Reading(low, high, data.exif == "apply", data.max_pixels, data.dicom_window)


def _as_set(value: str | float | list[float], default: tuple[float, ...]) -> tuple[float, ...]:
    if value == "auto":
        return default
    return tuple(map(float, value)) if isinstance(value, list) else (float(value),)


def _matched(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    count = max(len(low), len(high))
    return tuple(ends * count if len(ends) == 1 else ends for ends in (low, high))


def _check_kinds(kinds: list[str]) -> None:
    """Raise UserError where integers and floats share a set: one range cannot be guessed."""
    floats = [kind for kind in kinds if kind.startswith("float")]
    if floats and len(floats) < len(kinds):
        raise UserError(
            f"data.max_value is auto but the images hold {' and '.join(kinds)}: convert them to "
            "one type, or set data.min_value and data.max_value"
        )


def _check_cut(paths: Sequence[str], channels: int, reading: Reading, seen: Seen) -> None:
    """Warn where colours of 16 bits lose most of their levels, since nothing here reads them whole.

    Args:
        seen: What was read of all bits: here no file of more than 8.
    """
    if all(header.dtype == np.uint8 for header in seen.headers):
        return
    cut = [v for v in look(paths, channels, reading).values if v.dtype == np.uint8]
    levels = len(np.unique(np.concatenate([v.ravel() for v in cut]))) if cut else 256
    if levels < FEW_LEVELS:
        log.info(
            "warning: colours of 16 bits, cut to 8 by Pillow, use %d of 256 levels in %d files "
            "looked at: pip install imagecodecs, which reads them whole", levels, len(cut),
        )  # fmt: skip


def _say_pages(seen: Seen) -> None:
    several = [header.pages for header in seen.headers if header.pages > 1]
    if several:
        log.info(
            "%d of %d files looked at have %d pages or more, of which the first is read: where "
            "pages are bands set data.channels to their number",
            len(several), len(seen.headers), min(several),
        )  # fmt: skip


def _say_turned(seen: Seen, reading: Reading) -> None:
    turned = sum(header.turned for header in seen.headers)
    if turned:
        what = "are turned upright (data.exif apply)" if reading.turn else "lie as they are stored"
        remedy = "" if reading.turn else ": data.exif apply would turn them"
        log.info(
            "%d of %d pictures looked at have an EXIF orientation, and %s%s",
            turned, len(seen.headers), what, remedy,
        )  # fmt: skip
