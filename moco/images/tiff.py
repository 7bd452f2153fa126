"""TIFF as tifffile reads it: more bands than four, planes, stacks, deep and big files.

Shapes: C bands, H W pixels.
"""

from __future__ import annotations

import logging
import warnings
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    EXTRASAMPLES,
    IMAGEDESCRIPTION,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLESPERPIXEL,
)

from moco.images.scaling import upright

for _name in ("PIL.TiffImagePlugin", "tifffile"):  # they log what they raise, and what is mended
    logging.getLogger(_name).setLevel(logging.CRITICAL)
# Pillow says so of every BigTIFF, whose pixels it reads right.
warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")

_ORIENTATION, _NO_DATA, _ALPHA = 274, 42113, (1, 2)  # tags, and values of ExtraSamples
_STACKS = ("ImageJ=", "<?xml", "<OME", '{"shape"')  # how descriptions of stacks begin
_JPEG = (6, 7, 34892)  # values of Compression
_PALETTE, _MIXED = 3, {5: "CMYK", 6: "YCbCr", 8: "CIELAB"}  # values of PhotometricInterpretation
_WHITE_IS_ZERO = 0


def pillow_reads_it(image: Image.Image, channels: int) -> bool:
    """Tell whether Pillow reads a TIFF whole and right: ordinary 8-bit ones, and 16-bit grey."""
    tags = image.tag_v2
    bands, bits = tags.get(SAMPLESPERPIXEL, 1), tags.get(BITSPERSAMPLE, (1,))[0]
    is_grey = tags.get(PHOTOMETRIC_INTERPRETATION) in (0, 1)
    is_deep_grey = bands == 1 and image.mode.startswith("I;16") and _NO_DATA not in tags
    if bits > 8 and not is_deep_grey:
        return False
    if bands > 4 or (bands > 1 and is_grey and image.mode != "LA"):
        return False
    if bands == channels != len(image.getbands()):  # Pillow would call the fourth band alpha
        return False
    if channels == 0 and bands == 4 and tags.get(PHOTOMETRIC_INTERPRETATION) == 2:
        return tags.get(EXTRASAMPLES, (0,))[0] in _ALPHA  # or it would leave the fourth band out
    if tags.get(_ORIENTATION, 1) > 4 and tags.get(COMPRESSION, 1) == 1:
        return False  # Pillow (13 and before) reads rows of a wrong length where it turns them
    description = str(tags.get(IMAGEDESCRIPTION, "")).lstrip()
    if description.startswith("ImageJ=") and "\nimages=" in description:
        return False  # where all lie behind one page Pillow counts one
    is_stack = description.startswith(_STACKS) or channels not in (1, 3)
    return not (bands == 1 and is_stack and getattr(image, "n_frames", 1) > 1)


def is_inverted(image: Image.Image) -> bool:
    """Tell of a TIFF whether its lowest value is white; Pillow turns 8 bits, and no deeper ones."""
    return image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO


class TiffImage:
    """One image of a TIFF: its first page, or a stack whose pages are its bands.

    Args:
        path: The file, or its bytes.
        channels: A stack of unnamed pages is one of bands if it has as many; unless there are three
            of them, which are more often three pictures.

    Attributes:
        height, width, bands, dtype: Of what `read` returns.
        inverted: Whether its lowest value is white.
        pages: How many there are where the first one is read; else 1.
    """

    turned = False  # as Pillow, it turns by the tag whether or not that is asked for
    windowed = False

    def __init__(self, path: str | BytesIO, channels: int) -> None:
        import tifffile  # slow to import, and most sets hold no such files

        if isinstance(path, BytesIO):
            path.seek(0)
        self._file = tifffile.TiffFile(path)
        self._page = page = self._file.pages.first
        self._series = self._file.series[0]
        self._is_stack = self._bands_axis(channels) is not None
        orientation = page.tags.valueof(_ORIENTATION, 1)
        self._orientation = orientation if orientation in range(1, 9) else 1
        size = (page.imagelength, page.imagewidth)
        self.height, self.width = size[::-1] if self._orientation > 4 else size
        axis = self._bands_axis(channels)
        count = page.samplesperpixel if axis is None else self._series.shape[axis]
        self.pages = len(self._series.pages) if axis is None else 1
        is_plain = not str(page.description).lstrip().startswith(_STACKS)
        self._has_palette = page.photometric == _PALETTE and is_plain and page.dtype == np.uint8
        self.inverted = page.photometric == _WHITE_IS_ZERO
        self._kept = 3 if self._has_palette else self._without_alpha(count, channels)
        self.bands, self.dtype = self._kept, np.dtype(page.dtype)

    def close(self) -> None:
        self._file.close()

    def _bands_axis(self, channels: int) -> int | None:
        """Return the axis of the series along which its pages are bands, or None for one page."""
        if self._page.samplesperpixel > 1:
            return None
        axes, shape = self._series.axes, self._series.shape
        if "C" in axes:
            return axes.index("C")
        unnamed = {"Q": channels > 1, "I": channels not in (1, 3)}
        for axis, may_be_bands in unnamed.items():
            if may_be_bands and axis in axes and shape[axes.index(axis)] == channels:
                return axes.index(axis)
        return None

    def _without_alpha(self, count: int, channels: int) -> int:
        """Return how many bands stay where RGB or grey is asked for and an alpha is there."""
        colours = 3 if self._page.photometric == 2 else 1
        alpha = count == colours + 1 and not self._is_stack and channels in (0, 1, 3)
        known = {*map(int, self._page.extrasamples)}
        is_named = known <= {*_ALPHA} if channels else known and known <= {*_ALPHA}
        return colours if alpha and (is_named or (channels and colours == 3)) else count

    def read(self) -> np.ndarray:
        """Return the values, C H W."""
        try:
            values = self._stack() if self._is_stack else self._first_page()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise ValueError(f"{error}: pip install imagecodecs") from None
            raise
        return upright(self._without_marks(values[: self._kept]), self._orientation)

    def _without_marks(self, values: np.ndarray) -> np.ndarray:
        """Put NaN, or 0 among integers, in the place of what a GeoTIFF names as no data.

        Bytes stay as they are.
        """
        if values.dtype == np.uint8:
            return values
        try:
            mark = float(self._page.tags.valueof(_NO_DATA) or "nan")
        except (TypeError, ValueError):
            return values
        if values.dtype.kind == "f":
            return np.where(values == values.dtype.type(mark), values.dtype.type(np.nan), values)
        return np.where(values == mark, values.dtype.type(0), values)

    def _first_page(self) -> np.ndarray:
        values, axes, kind = self._page.asarray(), self._page.axes, int(self._page.photometric)
        if self._has_palette:
            return (self._page.colormap[:, values] >> 8).astype(np.uint8)
        if kind in _MIXED and int(self._page.compression) not in _JPEG:  # whose decoder makes RGB
            raise ValueError(f"it holds {_MIXED[kind]} colours that are not read here: save as RGB")
        if "S" not in axes:
            return values[None]
        return np.moveaxis(values, axes.index("S"), 0)

    def _stack(self) -> np.ndarray:
        """Return the bands of a stack at the first place of all its other axes: time, depth."""
        axes, shape = self._series.axes, self._series.shape
        band = next(axis for axis in "CQI" if axis in axes)
        place = tuple(slice(None) if axis in (band, "Y", "X") else 0 for axis in axes)
        kept = [axis for axis in axes if axis in (band, "Y", "X")]
        order = [kept.index(axis) for axis in (band, "Y", "X")]
        is_mapped = self._series.dataoffset is not None and self._file.filehandle.is_file
        if is_mapped:  # one block of values, of which only these are read
            return self._series.asarray(out="memmap")[place].transpose(order)
        outer = [size for axis, size in zip(axes, shape, strict=True) if axis not in "YX"]
        pages = np.arange(np.prod(outer)).reshape(outer)[place[: len(outer)]]
        return self._file.asarray(series=0, key=pages.tolist())
