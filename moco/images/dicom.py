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
    found = _FRAME.fullmatch(path)
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

    def __init__(self, path: str | BytesIO, windowed: bool) -> None:
        import pydicom

        self._file, self._frame = (path, 0) if isinstance(path, BytesIO) else split_frame(path)
        self._header = header = pydicom.dcmread(self._file, stop_before_pixels=True)
        self.height, self.width = int(header.Rows), int(header.Columns)
        kind = header.get("PhotometricInterpretation")
        self.inverted, self._is_palette = kind == "MONOCHROME1", kind == "PALETTE COLOR"
        self.bands = 3 if self._is_palette else int(header.get("SamplesPerPixel", 1))
        is_grey = self.bands == 1
        self.windowed = windowed and _has_window(header) and is_grey
        slope, intercept = _rescale(header)
        self._is_scaled = is_grey and (slope, intercept) != (1, 0)
        self._is_whole = slope.is_integer() and intercept.is_integer()
        eight = header.BitsAllocated <= 8 and not self._is_scaled
        is_shown = eight or self.windowed or self._is_palette
        self.dtype = np.dtype(np.uint8 if is_shown else np.int32)

    def __enter__(self) -> DicomImage:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def read(self) -> np.ndarray:
        """Return the values, C H W; floats where the units are no whole numbers."""
        import pydicom
        from pydicom import pixels

        if isinstance(self._file, BytesIO):
            self._file.seek(0)
        data = pydicom.dcmread(self._file)
        values = pixels.pixel_array(data, index=self._frame)  # colours come as RGB
        if self._is_palette:
            colours = pixels.apply_color_lut(values, data)[..., :3].transpose(2, 0, 1)
            return (colours >> 8 * (colours.itemsize - 1)).astype(np.uint8)
        if self.bands > 1:
            return values.transpose(2, 0, 1)
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
        if data.get("VOILUTSequence"):
            return 0.0, 2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
        signed = int(data.PixelRepresentation)
        low = -(2.0 ** (data.BitsStored - 1)) if signed else 0.0
        high = low + 2.0**data.BitsStored - 1
        slope, intercept = _rescale(data)
        return low * slope + intercept, high * slope + intercept


def _has_window(header: Any) -> bool:
    """Tell whether a file has a window; files without names often keep its tags, emptied."""
    ends = (header.get("WindowCenter"), header.get("WindowWidth"))
    return None not in ends or bool(header.get("VOILUTSequence"))


def _rescale(header: Any) -> tuple[float, float]:
    """Return slope and intercept, 1 and 0 where a file has none or leaves them empty."""
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), float(intercept or 0)
