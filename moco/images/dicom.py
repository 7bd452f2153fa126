"""DICOM as pydicom reads it: rescaled to physical units, through the file's own window, by frame.

A file of several frames is several images: `PATH#frame=N` names one of them.
Shapes: C bands, H W pixels.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np

from moco.images.formats import DICOM, extension

_SAMPLE = 64  # files of a set
_FRAME = re.compile(r"(.*)#frame=(\d+)", re.DOTALL)


def split_frame(path: str) -> tuple[str, int]:
    """Return the file that a path names, and the number of its frame, 0 for other files."""
    found = _FRAME.fullmatch(path) if "#frame=" in path else None  # of each image that is read
    if found and extension(found[1]) in DICOM:
        return found[1], int(found[2])
    return path, 0


def with_frames(paths: list[str]) -> list[str]:
    """Put a path for each frame in the place of each DICOM file of several frames.

    The headers of all are read only where one of a sample has several: a folder of single slices,
    as scanners write them, costs nothing.
    """
    some = [path for path in paths if path[-6:].lower().endswith(DICOM)]
    some = some[:: max(1, len(some) // _SAMPLE)]
    if all(_frame_count(path) == 1 for path in some):
        return paths
    return [name for path in paths for name in _frame_paths(path)]


def _frame_paths(path: str) -> list[str]:
    count = _frame_count(path) if extension(path) in DICOM else 1
    return [path] if count == 1 else [f"{path}#frame={number}" for number in range(count)]


def _frame_count(path: str) -> int:
    """Return how many frames a file says it has; 1 where it cannot be read, for others to name."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1)
    except Exception:  # on broken files pydicom raises what it will
        return 1


class DicomImage:
    """One frame of a DICOM file.

    Args:
        path: The file, and the frame if it has several; or its bytes.
        windowed: Whether the file's own window, where it has one, makes 8 bits of the values.

    Attributes:
        height, width, bands, dtype: Of what `read` returns.
        inverted: Whether its lowest value is white.
        windowed: Whether its window is applied.
    """

    turned = False
    pages = 1

    def __init__(self, path: str | BytesIO, windowed: bool) -> None:
        import pydicom

        self._file, self._frame = (path, 0) if isinstance(path, BytesIO) else split_frame(path)
        header = pydicom.dcmread(self._file, stop_before_pixels=True)
        self.height, self.width = int(header.Rows), int(header.Columns)
        kind = header.get("PhotometricInterpretation")
        self.inverted, self._has_palette = kind == "MONOCHROME1", kind == "PALETTE COLOR"
        self.bands = 3 if self._has_palette else int(header.get("SamplesPerPixel", 1))
        is_grey = self.bands == 1
        self.windowed = windowed and is_grey and (_has_lut(header) or _has_window(header))
        slope, intercept = _rescale(header)
        has_lut = bool(header.get("ModalityLUTSequence"))
        self._is_scaled = is_grey and (has_lut or (slope, intercept) != (1, 0))
        self._is_whole = slope.is_integer() and intercept.is_integer()
        signed = bool(header.get("PixelRepresentation", 0))
        eight = header.BitsAllocated <= 8 and not self._is_scaled and not signed
        is_ready = eight or self.windowed or self._has_palette
        self.dtype = np.dtype(np.uint8 if is_ready else np.int32)

    def close(self) -> None:
        """Do nothing: no file is open."""

    def read(self) -> np.ndarray:
        """Return the values, C H W; floats where the units are no whole numbers."""
        import pydicom
        from pydicom import pixels

        if isinstance(self._file, BytesIO):
            self._file.seek(0)
        data = pydicom.dcmread(self._file)
        values = pixels.pixel_array(data, index=self._frame)  # colours come as RGB
        if self._has_palette:
            depth = int(data.RedPaletteColorLookupTableDescriptor[2])
            colours = pixels.apply_color_lut(values, data)[..., :3] >> (depth - 8)
            return colours.astype(np.uint8).transpose(2, 0, 1)
        if self.bands > 1:
            return values.transpose(2, 0, 1)
        if data.BitsAllocated == 1:  # a mask
            return values.astype(bool)[None]
        rescaled = pixels.apply_modality_lut(values, data) if self._is_scaled else values
        if self.windowed:
            low, high = self._window_ends(data)
            shown = pixels.apply_voi_lut(rescaled, data)
            return np.rint((shown - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)[None]
        if self._is_scaled and self._is_whole:
            rescaled = rescaled.astype(np.int32)
        return rescaled[None]

    def _window_ends(self, data: Any) -> tuple[float, float]:
        """Return what pydicom makes of the window's two ends."""
        if _has_lut(data):
            return 0.0, 2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
        slope, intercept = _rescale(data)
        bits, signed = data.BitsStored, int(data.PixelRepresentation)
        if data.get("ModalityLUTSequence"):
            bits, signed = data.ModalityLUTSequence[0].LUTDescriptor[2], 0
        low = -(2.0 ** (bits - 1)) if signed else 0.0
        high = low + 2.0**bits - 1
        return low * slope + intercept, high * slope + intercept


def _has_window(header: Any) -> bool:
    """Tell whether a file has a window: many have its elements and no value in them."""
    return None not in (header.get("WindowCenter"), header.get("WindowWidth"))


def _has_lut(header: Any) -> bool:
    """Tell whether a table of a file's own says which values are black and white."""
    tables = header.get("VOILUTSequence") or [{}]
    return None not in (tables[0].get("LUTDescriptor"), tables[0].get("LUTData"))


def _rescale(header: Any) -> tuple[float, float]:
    """Return the slope and the intercept of a file's units."""
    slope, intercept = (header.get(f"Rescale{name}") for name in ("Slope", "Intercept"))
    return float(1 if slope is None else slope), float(intercept or 0)
