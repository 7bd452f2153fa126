"""A picture of test images beside the training images that the encoder finds most similar.

Shapes: Q test images, k neighbours, C channels, S pixels.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from moco.evaluation.subject import Subject
from moco.images.crops import cut
from moco.images.draws import centre_crops
from moco.images.formats import lettered
from moco.images.labelled import LabelledData
from moco.whole_files import output_file

_ROWS, _NEIGHBOURS = 10, 8
SIDE, _GAP, _TEXT = 72, 6, 12  # pixels
_RIGHT, _WRONG, _PLAIN = (30, 140, 60), (200, 50, 40), (60, 60, 60)


class Cell(NamedTuple):
    """A picture of a sheet with the text below it, both in the colour of its frame."""

    picture: Image.Image
    text: str
    frame: tuple[int, int, int] = _PLAIN


def draw_gallery(
    path: Path, subject: Subject, queries: Tensor, similarity: Tensor, rows: Tensor
) -> str:
    """Draw a test image of each class, up to ten, beside its eight nearest training images.

    A green frame marks the test image's class, a red one another class; the text below gives the
    class and the cosine. The path is returned.

    Args:
        path: PNG to write.
        queries: Q, rows of the test images.
        similarity: Q x k cosines, best first.
        rows: Q x k, rows of the training images.
    """
    labels, targets = subject.bank.labels(rows), subject.queries.labels(queries)
    number = min(_NEIGHBOURS, rows.shape[1])
    chosen = [int((targets == c).nonzero()[0, 0]) for c in targets.unique().tolist()[:_ROWS]]
    lines = []
    for query in chosen:
        own = targets[query]
        cells = [Cell(_seen(subject.queries, int(queries[query])), lettered(subject.classes[own]))]
        found = zip(rows[query].tolist(), labels[query], similarity[query], strict=True)
        for row, label, cosine in itertools.islice(found, number):
            text = f"{lettered(subject.classes[label])[:6]}: {cosine:.2f}"
            cells.append(Cell(_seen(subject.bank, row), text, _RIGHT if label == own else _WRONG))
        lines.append(cells)
    return draw_sheet(path, lines)


def draw_sheet(path: Path, lines: list[list[Cell]]) -> str:
    """Draw lines of pictures, the first of each apart from the others; return the path."""
    step_x, step_y = SIDE + _GAP, SIDE + _TEXT + _GAP
    size = (2 * _GAP + step_x * max(map(len, lines)), _GAP + step_y * len(lines))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for line, cells in enumerate(lines):
        for column, (picture, text, frame) in enumerate(cells):
            x, y = _GAP + column * step_x + (_GAP if column else 0), _GAP + line * step_y
            pen.rectangle((x - 3, y - 3, x + SIDE + 2, y + SIDE + 2), fill=frame)
            sheet.paste(picture, (x, y))
            pen.text((x, y + SIDE + 2), text[:12], fill=frame)
    with output_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return str(path)


def _seen(images: LabelledData, row: int) -> Image.Image:
    return as_seen(images.source.read(row), images.config.image_size)


def as_seen(image: Tensor, size: int) -> Image.Image:
    """Return a C x H x W image as an encoder sees it: its first three bands, or its grey."""
    pixels = cut(image, centre_crops(1, *image.shape[1:], size, image.device), size)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    kind = Image.Resampling.NEAREST if picture.width <= SIDE else Image.Resampling.BICUBIC
    return picture.resize((SIDE, SIDE), kind)
