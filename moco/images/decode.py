"""Decoding: one file, any of a dozen formats, to C H W uint8. The only room that meets a decoder.

What cannot be decoded raises `BadImage`, whatever the decoder raised. Nothing is unpickled. A
reader of each kind opens the header (`height`, `width`, `bands`, `dtype`), and `read`s the values.
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from moco.config import RunError
from moco.images.dicom import DicomImage, split_frame
from moco.images.formats import (
    DICOM,
    TIFF,
    BadImage,
    Member,
    escaped,
    extension,
    needed,
    pillow_formats,
)
from moco.images.readers import ArrayFile, Picture
from moco.images.scaling import PLAIN, Reading
from moco.images.tiff import TiffImage, pillow_reads_it
from moco.pixels import scaled

# The limit of pixels is our own, and is checked before pixels are read.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Header(NamedTuple):
    """What a file says of itself, without its pixels.

    Attributes:
        height, width: In pixels, of the image as it is read.
        dtype: Of its values; uint8 where nothing is left to scale.
        turned: Whether its EXIF orientation is not upright.
        bands: As it is read; where no channels are asked for, its own: of a picture 1 or 3.
        windowed: Whether a DICOM file's own window makes its values.
        pages: Of a TIFF of which the first page is read; else 1.
    """

    height: int
    width: int
    dtype: np.dtype
    turned: bool
    bands: int
    windowed: bool = False
    pages: int = 1


class Decoded(NamedTuple):
    """An image as it was decoded, and its size in the file.

    Attributes:
        pixels: C H W uint8, H W C in memory; H and W divided by `reduction`, and rounded up.
        height, width: Of the whole image.
        reduction: 1, 2, 4 or 8, whatever the decoder could do.
    """

    pixels: Tensor
    height: int
    width: int
    reduction: int


def decode(path: str, channels: int, reading: Reading = PLAIN) -> Tensor:
    """Decode one file to C H W uint8, H W C in memory.

    Args:
        path: An image, or an array in .npy: H W, H W C or C H W.
        channels: 1 grey, 3 RGB without alpha, 4 RGBA; any other number must be what the file has.
        reading: Which values become 0 and 255 where files have more than 8 bits, and the like.

    Raises:
        BadImage: Truncated, empty, no image, too large, unreadable, or of other bands.
    """
    return decode_reduced(path, channels, reading).pixels


def decode_reduced(
    path: str,
    channels: int,
    reading: Reading = PLAIN,
    reduction: Callable[[int, int], int] | None = None,
) -> Decoded:
    """Decode one file, as `decode` does, and a JPEG perhaps at a part of its size.

    Args:
        reduction: Asked with height and width of a JPEG: by which of 1, 2, 4 and 8 it may shrink.
            The decoder then computes fewer pixels, which is several times faster.
    """
    with _opened(path, channels, reading, whole=True) as image:
        check_bands(path, image.bands, channels)
        height, width, by = image.height, image.width, 1
        if reduction and isinstance(image, Picture) and image.image.format == "JPEG":
            by = image.reduce(reduction(height, width))
        values = image.read()
        levels = scaled(values, channels, reading.low, reading.high)
        if image.inverted:
            levels = 255 - levels
            levels[np.broadcast_to(values != values, levels.shape)] = 0  # NaN, as elsewhere
        pixels = fit_bands(path, levels, channels)
        # The one copy: writable, and H W C in memory, as decoders deliver and cuts are fastest.
        copy = torch.from_numpy(np.array(pixels.transpose(1, 2, 0), order="C"))
        return Decoded(copy.permute(2, 0, 1), height, width, by)


def read_values(path: str, channels: int, reading: Reading = PLAIN) -> np.ndarray:
    """Return a file's values before they are scaled, bands x H x W; raises as `decode`."""
    with _opened(path, channels, reading) as image:
        check_bands(path, image.bands, channels)
        return image.read()


def read_header(path: str, channels: int = 3, reading: Reading = PLAIN) -> Header:
    """Read the header alone; `channels` tells C H W from H W C in arrays, 0 asks for none.

    Raises:
        BadImage: As `decode`, as far as the header shows it.
    """
    with _opened(path, channels, reading) as image:
        if channels:
            check_bands(path, image.bands, channels)
        size, more = (image.height, image.width), (image.windowed, image.pages)
        return Header(*size, image.dtype, image.turned, image.bands, *more)


@contextlib.contextmanager
def _opened(path: str, channels: int, reading: Reading, whole: bool = False) -> Iterator[Any]:
    """Open a file's header and check its size; whatever a decoder raises becomes BadImage."""
    try:
        file = io.BytesIO(path.content(whole)) if isinstance(path, Member) else path
        with contextlib.closing(_reader(path, file, channels, reading)) as image:
            _check_pixels(path, image.height, image.width, reading.max_pixels)
            if image.dtype.kind not in "buif":
                raise BadImage(
                    path, f"holds values of type {image.dtype}, which are no grey values"
                )
            yield image
    except (BadImage, MemoryError, RunError):
        raise
    except Image.DecompressionBombError:
        reason = f"is above the limit of {reading.max_pixels} pixels: raise data.max_pixels"
        raise BadImage(path, reason) from None
    except Exception as error:  # on broken files that is not only OSError
        with contextlib.suppress(OSError):
            if os.path.getsize(split_frame(path)[0]) == 0:
                raise BadImage(path, "is empty") from None
        if isinstance(error, UnidentifiedImageError):
            raise BadImage(path, "is no image of a known format") from None
        reason = f"cannot be decoded: {escaped(str(error)) or type(error).__name__}"
        raise BadImage(path, getattr(error, "strerror", None) or reason) from error


def _reader(path: str, file: str | io.BytesIO, channels: int, reading: Reading) -> Any:
    """Return what reads a file of this ending and content; `path` is its name."""
    ending = extension(split_frame(path)[0])
    if ending == ".npy":
        return ArrayFile(path, channels)
    if package := needed(ending):
        raise BadImage(path, f"cannot be read here: pip install {package}")
    if ending in DICOM:
        return DicomImage(file, reading.windowed)
    if ending in (".heic", ".heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    if reading.max_pixels > (Image.MAX_IMAGE_PIXELS or reading.max_pixels):
        Image.MAX_IMAGE_PIXELS = reading.max_pixels  # Pillow has a limit of its own
    try:
        image = Image.open(file, formats=pillow_formats(ending))
    except UnidentifiedImageError:
        if ending not in TIFF:
            raise
        return TiffImage(file, channels)
    if image.format == "TIFF" and not pillow_reads_it(image, channels):
        if file is path:
            image.close()
        return TiffImage(file, channels)
    return Picture(path, image, channels, reading)


def fit_bands(path: str, pixels: np.ndarray, channels: int) -> np.ndarray:
    """Bring C H W uint8 to `channels`: grey is repeated for RGB, RGB weighted for grey.

    Raises:
        BadImage: These channels do not become those.
    """
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=0)
    if len(pixels) == 1 and channels == 4:
        return np.concatenate([*[pixels] * 3, np.full_like(pixels, 255)])
    if len(pixels) == 3 and channels == 1:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return np.asarray(image.convert("L"))[None]
    raise _other_bands(path, len(pixels))


def _other_bands(path: str, bands: int) -> BadImage:
    return BadImage(path, f"has {bands} band{'s'[: bands != 1]}: set --data.channels {bands}")


def check_bands(path: str, bands: int, channels: int) -> None:
    """Refuse several bands that neither are `channels` nor become grey, RGB or RGBA."""
    if 1 < bands != channels and (bands > 4 or channels not in (1, 3, 4)):
        raise _other_bands(path, bands)


def _check_pixels(path: str, height: int, width: int, most: int) -> None:
    if height * width > most:
        reason = f"has {width} x {height} pixels, above the limit of {most}: raise data.max_pixels"
        raise BadImage(path, reason)
    if height * width == 0:
        raise BadImage(path, "has no pixels")
