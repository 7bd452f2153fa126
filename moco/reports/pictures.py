"""Pictures: images as the encoder sees them, small, for a page or a sheet.

Shapes: M images, C channels, S side of a view, T side of a tile.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from moco.images.formats import lettered
from moco.whole_files import output_file

TILE = 96  # pixels at most
_GAP, _TEXT = 6, 14
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def tiles(images: Tensor, mean: Tensor, std: Tensor, side: int = TILE) -> Tensor:
    """Turn normalised images into small pictures: their first three bands, or their grey.

    Args:
        images: M x C x S x S, normalised.
        mean, std: C each, on a 0-1 scale.
        side: T; images that are smaller stay as they are.

    Returns:
        M x 3 x T x T uint8 on the CPU.
    """
    pixels = images.float() * std[:, None, None] + mean[:, None, None]
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    if pixels.shape[2] > side:
        pixels = interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def picture(tile: Tensor) -> Image.Image:
    """Return a 3 x T x T uint8 tile as a picture."""
    return Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())


def as_address(image: Image.Image, quality: int = 82) -> str:
    """Return a picture as an address that holds it, so that a page needs no file beside it."""
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def sprite(images: Tensor, side: int) -> tuple[str, int, int]:
    """Put tiles into one picture, row by row.

    Args:
        images: M x 3 x T x T uint8.
        side: Of a tile in the picture, T at most.

    Returns:
        The picture's address, its tiles in a row, and their side in pixels.
    """
    side = min(side, images.shape[2])
    columns = math.ceil(math.sqrt(len(images)))
    drawn = Image.new("RGB", (columns * side, math.ceil(len(images) / columns) * side))
    for place, tile in enumerate(images):
        row, column = divmod(place, columns)
        small = picture(tile).resize((side, side), Image.Resampling.BOX)
        drawn.paste(small, (column * side, row * side))
    return as_address(drawn, 72), columns, side


def draw_rows(
    path: Path, rows: Sequence[tuple[str, Sequence[Tensor]]], heads: Sequence[str]
) -> None:
    """Draw a `sheet` as a PNG that is whole or absent."""
    drawn = sheet(rows, heads)
    with output_file(path) as temporary:
        drawn.save(temporary, format="PNG", optimize=True)


def shortened(name: str, letters: int) -> str:
    """Cut a name down to its end, which tells most of a path; a number before two blanks stays."""
    number, gap, path = name.partition("  ")
    if not gap:
        number, path = "", name
    return number + gap + path[-max(letters - len(number + gap), 1) :]


def sheet(rows: Sequence[tuple[str, Sequence[Tensor]]], heads: Sequence[str]) -> Image.Image:
    """Draw rows of tiles, each below its name.

    Args:
        rows: Name of each row, and its tiles, 3 x T x T uint8.
        heads: What stands above each column; every second gap after the first is wider.
    """
    cell, line = TILE + _GAP, TILE + _TEXT + 2 * _GAP
    widths = [cell + (2 * _GAP if column % 2 == 0 else 0) for column in range(len(heads))]
    size = (sum(widths) + _GAP, _TEXT + 2 * _GAP + line * len(rows))
    drawn = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(drawn)
    lefts = [_GAP + sum(widths[:column]) for column in range(len(heads))]
    for left, head in zip(lefts, heads, strict=True):
        pen.text((left, _GAP), head, fill=_INK)
    for number, (name, images) in enumerate(rows):
        top = _TEXT + 2 * _GAP + number * line
        pen.text((_GAP, top), shortened(lettered(name), size[0] // 7), fill=_INK)
        for left, tile in zip(lefts, images, strict=True):
            kind = Image.Resampling.NEAREST if tile.shape[2] <= TILE // 2 else None
            drawn.paste(picture(tile).resize((TILE, TILE), kind), (left, top + _TEXT))
    return drawn
