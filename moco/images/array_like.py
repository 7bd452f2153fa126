"""Array-like: one image that Python gives, a PIL image, an array or a tensor, as its values.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco.config import UserError
from moco.images.decode import BadImage
from moco.images.readers import MODES, rather_last


def to_array(name: str, image: Any, channels: int, turn: bool) -> np.ndarray:
    """Return an image's values as they are, bands x H x W: integers or floats.

    Args:
        channels: That a PIL image is converted to, and that tell C H W from H W C in arrays; 0:
            its own, on the axis that `rather_last` tells.

    Raises:
        BadImage: No image, or values that are no integers and no floats.
    """
    if isinstance(image, Image.Image):
        values = _of_picture(image, channels, turn)
    elif isinstance(image, Tensor):
        try:
            values = to_numpy(image)
        except UserError as error:
            raise BadImage(name, str(error)) from None
    elif isinstance(image, np.ndarray):
        values = unmasked(image)
    else:
        reason = f"is of type {type(image).__name__}: give PIL images, arrays or tensors"
        reason += ", or paths alone in a list" if isinstance(image, str | os.PathLike) else ""
        raise BadImage(name, reason)
    if values.dtype.kind not in "uif":
        raise BadImage(name, no_values(values))
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3 or not values.size:
        raise BadImage(name, f"has the shape {tuple(values.shape)}: give H W, H W C or C H W")
    return values.transpose(2, 0, 1) if bands_last(values.shape, channels) else values


def bands_last(shape: tuple[int, ...], channels: int) -> bool:
    """Tell H W C from C H W: by the channels, and where neither axis has them by the shape."""
    first, last = shape[-3], shape[-1]
    known = channels in (first, last)
    return last == channels != first or (not known and rather_last(shape, False))


def to_numpy(image: Tensor) -> np.ndarray:
    """Return a tensor's values, those of floats that NumPy lacks as float32, which holds them.

    Raises:
        UserError: It is sparse, quantised or without values.
    """
    known = (torch.float16, torch.float32, torch.float64)
    try:
        image = image.detach().cpu()
        is_other = image.is_floating_point() and image.dtype not in known
        return (image.float() if is_other else image).numpy()
    except (TypeError, NotImplementedError):
        kind = f"{str(image.layout).removeprefix('torch.')} {image.dtype} on {image.device}"
        raise UserError(f"is a tensor that NumPy lacks, {kind}: give a dense one") from None


def unmasked(values: np.ndarray) -> np.ndarray:
    """Return an array without its mask: masked floats are NaN, no data; integers what they hide."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    return values.filled(np.nan) if values.dtype.kind == "f" else values.data


def no_values(values: np.ndarray) -> str:
    """Say of what type values are that are no image, and how they become one."""
    how = "give integers or floats"
    if values.dtype == bool:
        how = "give uint8, as 255 * x.astype(np.uint8)"
    elif values.dtype == object:
        how = "give numbers of one type, as x.astype(np.float32), or one image for each place"
    return f"holds {values.dtype} values: {how}"


def _of_picture(image: Image.Image, channels: int, turn: bool) -> np.ndarray:
    """Return the values of a PIL image, H W C or H W, in the wanted channels."""
    if turn and image.getexif().get(0x0112, 1) != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image)
    if channels == 0:
        channels = 1 if image.mode in ("1", "L", "LA", "La") else 3
    if channels in (1, 3, 4) and image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    return np.asarray(image)
