"""Crops: boxes are cut out of images and resized, antialiased; batched by matrices, or one alone.

Shapes: N images, C channels, H W their pixels, S the side of a view.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from moco.images.draws import Crops


def crop_and_resize(
    images: Tensor, crops: Crops, size: int, interpolation: str = "bilinear"
) -> Tensor:
    """Cut, resize (antialiased) and mirror.

    Args:
        images: N x C x H x W uint8, or float on the same scale.
        size: S.
        interpolation: bilinear or bicubic.

    Returns:
        N x C x S x S float on a 0-1 scale.
    """
    cubic = interpolation == "bicubic"
    rows = _resize_matrix(crops.top, crops.height, images.shape[2], size, cubic) / 255
    columns = _resize_matrix(crops.left, crops.width, images.shape[3], size, cubic)
    columns = torch.where(crops.flip[:, None, None], columns.flip(1), columns)
    if not cubic:
        return separable(images, rows, columns)
    # Cubic weights overshoot at edges, which PIL cuts off after each of its two passes.
    return _rows(_columns(images, columns).clamp(0, 255), rows).clamp(0, 1)


def _resize_matrix(start: Tensor, length: Tensor, pixels: int, size: int, cubic: bool) -> Tensor:
    """Build the N x S x pixels weights that resize [start, start+length) to S, as PIL does."""
    length, start = length.float()[:, None, None], start.float()[:, None, None]
    scale = length / size
    out = torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None]
    pixel = torch.arange(pixels, device=start.device, dtype=torch.float32)[None, None, :]
    centre = start + (out + 0.5) * scale
    distance = (pixel + 0.5 - centre).abs() / scale.clamp(min=1)
    weights = _keys_cubic(distance) if cubic else (1 - distance).clamp(min=0)
    weights = weights * ((pixel >= start) & (pixel < start + length))
    return weights / weights.sum(2, keepdim=True)


def _keys_cubic(distance: Tensor) -> Tensor:
    """Return Keys' cubic kernel with a = -0.5, which PIL's bicubic has (Keys 1981)."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply N x S x H weights to the rows and N x T x W to the columns of N x C x H x W.

    On a GPU the products are of half precision, whose eleven bits hold each level of a uint8 image:
    photographs differ by 0.3 of a level at most, where PIL rounds to whole levels.
    """
    return _rows(_columns(images, columns), rows)


def _rows(images: Tensor, weights: Tensor) -> Tensor:
    return _product(weights[:, None], images)


def _columns(images: Tensor, weights: Tensor) -> Tensor:
    lines = _product(images.flatten(1, 2), weights.transpose(1, 2))  # of all channels at once
    return lines.unflatten(1, images.shape[1:3])


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Multiply two batches of matrices to one of float32."""
    kind = _precision(first.device)
    with torch.autocast(first.device.type, enabled=False):  # bf16 would cost a level of grey
        return torch.matmul(first.to(kind), second.to(kind)).float()


def _precision(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def cut(
    image: Tensor,
    boxes: Crops,
    size: int,
    row: int = 0,
    interpolation: str = "bilinear",
    reduction: int = 1,
) -> Tensor:
    """Cut one of the boxes out of a C x H x W uint8 image and resize it, antialiased.

    Args:
        reduction: By which the image is smaller than the one that the boxes are for.

    Returns:
        C x S x S uint8, mirrored where the box says so; H W C in memory, for which torch has the
        fastest code.
    """
    top, left, height, width, flip = (
        int(side[row]) for side in (boxes.top, boxes.left, boxes.height, boxes.width, boxes.flip)
    )
    if reduction > 1:  # the box ends between two pixels, and Pillow alone can cut there
        pixels = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
        box = [side / reduction for side in (left, top, left + width, top + height)]
        filter = Image.Resampling[interpolation.upper()]
        resized = np.array(picture.resize((size, size), filter, box)).reshape(size, size, -1)
        part = torch.from_numpy(resized).permute(2, 0, 1)
    else:
        part = image[None, :, top : top + height, left : left + width]
        part = part.contiguous(memory_format=torch.channels_last)
        if height == width == size:  # nothing to resize
            part = part[0]
        else:
            part = interpolate(part, (size, size), mode=interpolation, antialias=True)[0]
    return part.flip(2) if flip else part
