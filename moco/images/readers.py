"""Readers: a picture that Pillow opens, and an array in .npy; `tiff` and `dicom` have theirs.

Each opens a header (`height`, `width`, `bands`, `dtype`), and `read`s the values.
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from moco.images.formats import BadImage, Member
from moco.images.scaling import Reading, upright
from moco.images.tiff import is_inverted
from moco.pixels import to_uint8

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
BYTE, SHORT, FLOAT = np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32)
_ORIENTATION = 0x0112
_METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where it may stand


class Picture:
    """An image that Pillow reads; of an animation, the first frame."""

    windowed = False
    pages = 1

    def __init__(self, path: str, image: Image.Image, channels: int, reading: Reading) -> None:
        self.path, self.image, self.channels, self.reading = path, image, channels, reading
        self.height, self.width, bands = image.height, image.width, len(image.getbands())
        self.bands = channels if channels in (1, 3, 4) else bands  # Pillow converts
        # Of several bands Pillow cuts 16 bits to 8. A PPM names its own maximum.
        self._is_cut = bands > 1 and image.format != "JPEG" and ";16" in str(image.tile)
        grey = image.mode == "F" or image.mode.startswith("I")
        self._is_deep = grey and not (image.tile and image.tile[0][0] == "ppm")
        self.inverted = self._is_deep and image.format == "TIFF" and is_inverted(image)
        if channels == 0:
            is_grey = grey or image.mode in ("1", "L", "LA", "La") or "LA;16" in str(image.tile)
            self.bands = 1 if is_grey else 3
        deep = FLOAT if image.mode == "F" else SHORT
        self.dtype = deep if self._is_cut or self._is_deep else BYTE
        orientation = self._orientation()
        self.turned = orientation in range(2, 9)
        if reading.turn and orientation in range(5, 9):
            self.height, self.width = self.width, self.height

    def close(self) -> None:
        self.image.close()

    def _orientation(self) -> int:
        """Return 1 to 8; 1 of a TIFF, which Pillow turns by itself."""
        if self.image.format == "TIFF" or _METADATA.isdisjoint(self.image.info):
            return 1
        return self.image.getexif().get(_ORIENTATION, 1)

    def reduce(self, by: int) -> int:
        """Let a JPEG be decoded at 1/by of its size; return by how much it will be."""
        width, height = self.image.size
        while self.turned and self.reading.turn and (width % by or height % by):
            by //= 2  # the last pixel is not whole, and turned upright it may be the first
        self.image.draft(self.image.mode, (width // by, height // by))
        return round(width / self.image.width)

    def read(self) -> np.ndarray:
        """Return 16-bit values as they are stored, all others as uint8 of the wanted channels."""
        image, channels = self.image, self.channels
        if self._is_cut and (self.reading.low, self.reading.high) != ((0.0,), (65535.0,)):
            return self._uncut()
        if self.turned and self.reading.turn:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)[None]
            return values if self._is_deep else to_uint8(values, (0.0,), (65535.0,))
        if channels in (1, 3, 4) and image.mode != MODES[channels]:
            image.load()
            if channels != 4:
                image.info.pop("transparency", None)  # else Pillow warns that it is lost
            image = image.convert(MODES[channels])
        pixels = np.asarray(image)
        self.image.close()  # its memory serves the copy that is made next
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _uncut(self) -> np.ndarray:
        """Return the 16 bits of each band of a PNG; grey and RGB without alpha."""
        try:
            from imagecodecs import png_decode
        except ImportError:
            reason = "has 16 bits a band, which Pillow cuts to 8: pip install imagecodecs"
            raise BadImage(self.path, reason) from None
        values = png_decode(_content(self.path)).transpose(2, 0, 1)
        colours, alpha = (values, None) if len(values) in (1, 3) else (values[:-1], values[-1:])
        if self.channels == 4:
            opaque = np.full_like(values[:1], 65535) if alpha is None else alpha
            values = np.concatenate([*[colours] * (3 // len(colours)), opaque])
        elif self.channels != 2:
            values = colours
        if self.turned and self.reading.turn:
            values = upright(values, self._orientation())
        return values


class ArrayFile:
    """An array in .npy: H W, H W C or C H W; C is the axis of `channels`, or by `rather_last`."""

    turned = inverted = windowed = False
    pages = 1

    def __init__(self, path: str, channels: int) -> None:
        self.path, self.channels = path, channels
        # A file is mapped, which also fails when it is shorter than its header says.
        in_shard = isinstance(path, Member)
        stored = self._load() if in_shard else np.lib.format.open_memmap(path, mode="r")
        view = self._bands_first(stored)
        self.bands, self.height, self.width = view.shape
        self.dtype = view.dtype

    def close(self) -> None:
        """Do nothing: no file is open."""

    def read(self) -> np.ndarray:
        return self._bands_first(self._load())

    def _load(self) -> np.ndarray:
        return np.load(io.BytesIO(_content(self.path)), allow_pickle=False)

    def _bands_first(self, array: np.ndarray) -> np.ndarray:
        if array.ndim == 2:
            return array[None]
        if array.ndim != 3:
            raise BadImage(self.path, f"has the shape {array.shape}: give H W, H W C or C H W")
        first, last = array.shape[0], array.shape[2]
        if last == self.channels or (first != self.channels and rather_last(array.shape, True)):
            return array.transpose(2, 0, 1)
        return array


def rather_last(shape: tuple[int, ...], equal: bool) -> bool:
    """Tell H W C from C H W by the shape: a square has its bands on the third axis, whatever their
    number, and other images on the shorter of first and last, or on the last if `equal`."""
    first, middle, last = shape[-3:]
    if (first == middle) != (middle == last):
        return first == middle
    return last < first or (equal and last == first)


def _content(path: str) -> bytes:
    return path.content(True) if isinstance(path, Member) else Path(path).read_bytes()
