"""Decoding: one file, any of a dozen formats, to C H W uint8. The only room that meets a decoder.

What cannot be decoded raises `BadImage`, whatever the decoder raised. Nothing is unpickled.
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLESPERPIXEL
from torch import Tensor

# Only these decoders run, whatever a file claims to be: Pillow's EPS reader starts Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 178_956_970  # where Pillow refuses too: 0.5 GB as RGB, above it a decompression bomb
TIFF = (".tif", ".tiff")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

for _name in ("PIL.TiffImagePlugin", "tifffile"):  # they log what they raise, and what is mended
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class BadImage(ValueError):
    """A file that does not become an image of the wanted channels; has `path` and `reason`."""

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)  # both, so that it survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


def decode(path: str, channels: int, max_value: int) -> Tensor:
    """Decode one file to C H W uint8, H W C in memory; all images are decoded here.

    Args:
        path: An image, or an array in .npy: H W, H W C or C H W of uint8, other integers of
            0..max_value, or floats of 0..1.
        channels: 1 grey, 3 RGB without alpha, 4 RGBA; any other number must be what the file has.
        max_value: Value in files of more than 8 bits that becomes 255; above it is clipped.

    Raises:
        BadImage: Truncated, empty, no image, too large, unreadable, or of other bands.
    """
    with _naming(path):
        if extension(path) == ".npy":
            pixels = _decode_npy(path, channels, max_value)
        else:
            pixels = _decode_image(path, channels, max_value)
        # The one copy: writable, and H W C in memory, as decoders deliver and cuts are fastest.
        return torch.from_numpy(np.array(pixels.transpose(1, 2, 0), order="C")).permute(2, 0, 1)


def image_size(path: str, channels: int = 3) -> tuple[int, int]:
    """Return (height, width) from the header alone; `channels` tells C H W from H W C in arrays.

    Raises:
        BadImage: As `decode`, as far as the header shows it.
    """
    with _naming(path):
        if extension(path) == ".npy":
            return _bands_first(path, _npy_header(path), channels).shape[1:]
        try:
            with Image.open(path, formats=FORMATS) as image:
                _check_pixels(path, image.height, image.width)
                return image.height, image.width
        except UnidentifiedImageError:
            if extension(path) not in TIFF:
                raise
        with _open_tiff(path) as file:
            return _page_size(path, file.pages.first)


def shown(path: str) -> str:
    """Return a path as one printable line, whatever bytes its name holds."""
    return one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))


def one_line(text: str) -> str:
    """Escape control characters, so that a message stays on one line."""
    return "".join(c if c >= " " else c.encode("unicode_escape").decode() for c in text)


def extension(name: str) -> str:
    """Return a file name's extension in lower case, dot included."""
    return os.path.splitext(name)[1].lower()


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn whatever a decoder raises into BadImage; on broken files that is not only OSError."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            if os.path.getsize(path) == 0:
                raise BadImage(path, "is empty") from None
        if isinstance(error, UnidentifiedImageError):
            raise BadImage(path, "is no image of a known format") from None
        reason = f"cannot be decoded: {one_line(str(error)) or type(error).__name__}"
        raise BadImage(path, getattr(error, "strerror", None) or reason) from error


def _decode_image(path: str, channels: int, max_value: int) -> np.ndarray:
    """Decode to C H W uint8 with Pillow; with tifffile a TIFF that Pillow does not read whole."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(path, image.height, image.width)
            if not _loses_bands(path, image, channels, max_value):
                return _convert(path, image, channels, max_value)
    except UnidentifiedImageError:
        if extension(path) not in TIFF:
            raise
    with _open_tiff(path) as file:
        _page_size(path, file.pages.first)
        _check_bands(path, file.pages.first.samplesperpixel, channels)
        stack = file.series[0]
        _bands_first(path, np.broadcast_to(np.uint8(0), stack.shape), channels)  # before it is read
        pixels = _bands_first(path, stack.asarray(), channels)
    return _fit_bands(path, to_uint8(pixels, max_value), channels)


def _loses_bands(path: str, image: Image.Image, channels: int, max_value: int) -> bool:
    """Tell whether Pillow would drop bands of a TIFF, or bits of them that `max_value` needs."""
    if image.format != "TIFF":
        return False
    bands = image.tag_v2.get(SAMPLESPERPIXEL, 1)
    _check_bands(path, bands, channels)
    deep = bands > 1 and image.tag_v2.get(BITSPERSAMPLE, (1,))[0] > 8 and max_value != 65535
    no_alpha = bands == channels != len(image.getbands())  # Pillow would call the fourth band alpha
    return bands > 4 or channels not in (1, 3, 4) or deep or no_alpha


def _convert(path: str, image: Image.Image, channels: int, max_value: int) -> np.ndarray:
    """Bring an image of Pillow's to C H W uint8; of an animation, the first frame.

    EXIF orientation is not applied: torchvision's ImageFolder, on which published numbers stand,
    ignores it too.
    """
    if max_value != 65535 and len(image.getbands()) > 1 and ";16" in str(image.tile):
        reason = f"has 16 bits a band, which Pillow cuts to 8: max_value {max_value} needs .npy"
        raise BadImage(path, reason)
    if image.tile and image.tile[0][0] == "ppm":
        max_value = 65535  # the file names its own maximum, and Pillow has applied it
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(to_uint8(np.asarray(image), max_value))
    if channels not in (1, 3, 4) and len(image.getbands()) != channels:
        raise _other_bands(path, len(image.getbands()))
    if image.mode != MODES[channels]:
        image.load()
        if channels != 4:
            image.info.pop("transparency", None)  # else Pillow warns that it is lost
        image = image.convert(MODES[channels])
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _open_tiff(path: str) -> Any:
    import tifffile  # slow to import, and most sets hold no such files

    return tifffile.TiffFile(path)


def _page_size(path: str, page: Any) -> tuple[int, int]:
    """Return (height, width) of a page of tifffile's; raise BadImage where they are too large."""
    _check_pixels(path, page.imagelength, page.imagewidth)
    return page.imagelength, page.imagewidth


def _decode_npy(path: str, channels: int, max_value: int) -> np.ndarray:
    _npy_header(path)
    values = np.load(path, allow_pickle=False)
    if values.dtype.kind == "f":
        if (values > 1.5).any():
            raise BadImage(path, "holds floats above 1: scale them to 0..1, or store uint8")
        max_value = 1
    return _fit_bands(path, to_uint8(_bands_first(path, values, channels), max_value), channels)


def _npy_header(path: str) -> np.ndarray:
    """Map an array without reading it; raises when the file is shorter than its header says."""
    return np.lib.format.open_memmap(path, mode="r")


def _bands_first(path: str, array: np.ndarray, channels: int) -> np.ndarray:
    """View H W, H W C or C H W as C H W; C is the axis of `channels`, else the shorter one."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3:
        first, last = array.shape[0], array.shape[2]
        if last == channels or (first != channels and last <= first):
            array = array.transpose(2, 0, 1)
    else:
        raise BadImage(path, f"has the shape {array.shape}: give H W, H W C or C H W")
    _check_pixels(path, *array.shape[1:])
    return array


def _fit_bands(path: str, pixels: np.ndarray, channels: int) -> np.ndarray:
    """Bring C H W uint8 to `channels`: grey is repeated for RGB, RGB weighted for grey."""
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=0)
    if len(pixels) == 3 and channels == 1:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return np.asarray(image.convert("L"))[None]
    raise _other_bands(path, len(pixels))


def _other_bands(path: str, bands: int) -> BadImage:
    return BadImage(path, f"has {bands} band{'s'[: bands != 1]}: set --data.channels {bands}")


def _check_bands(path: str, bands: int, channels: int) -> None:
    """Refuse several bands that neither are `channels` nor become grey, RGB or RGBA."""
    if 1 < bands != channels and (bands > 4 or channels not in (1, 3, 4)):
        raise _other_bands(path, bands)


def _check_pixels(path: str, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(path, f"has {width} x {height} pixels, above the limit of {MAX_PIXELS}")
    if height * width == 0:
        raise BadImage(path, "has no pixels")


def to_uint8(values: np.ndarray, max_value: int) -> np.ndarray:
    """Scale 0..max_value to 0..255, rounded and clipped; NaN, a usual mark of no data, gives 0."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"holds values of type {values.dtype}")
    top = 1 if values.dtype.kind == "b" else max_value
    values = np.nan_to_num(values.astype(np.float64))
    return np.rint(np.clip(values, 0, top) * (255 / top)).astype(np.uint8)
