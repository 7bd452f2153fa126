"""A picture of test images beside the training images that the encoder finds most similar.

Shapes: Q test images, k neighbours, C channels, S pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from moco.config import normalisation
from moco.evaluation.subject import Subject
from moco.images.labelled import Labelled

_ROWS, _NEIGHBOURS = 10, 8
_CELL, _GAP, _TEXT = 72, 6, 12  # pixels
_RIGHT, _WRONG, _QUERY = (30, 140, 60), (200, 50, 40), (60, 60, 60)


def draw_gallery(path: Path, subject: Subject, similarity: Tensor, rows: Tensor) -> str:
    """Draw one test image of each class, up to ten, and its eight nearest training images.

    A green frame marks the test image's class, a red one another class; the text below gives the
    class and the cosine.

    Args:
        path: PNG to write.
        subject: Images, classes and settings.
        similarity: Q x k cosines, best first.
        rows: Q x k, rows of the training images.

    Returns:
        The path.
    """
    labels, targets = subject.bank.source.labels, subject.queries.source.labels
    number = min(_NEIGHBOURS, rows.shape[1])
    chosen = [int((targets == c).nonzero()[0, 0]) for c in targets.unique().tolist()[:_ROWS]]
    step_x, step_y = _CELL + _GAP, _CELL + _TEXT + _GAP
    size = (_GAP + step_x * (number + 1) + _GAP, _GAP + step_y * len(chosen))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    for line, query in enumerate(chosen):
        cells = [(subject.queries, query, _QUERY, subject.classes[targets[query]])]
        for row, cosine in zip(rows[query, :number].tolist(), similarity[query], strict=False):
            frame = _RIGHT if labels[row] == targets[query] else _WRONG
            text = f"{subject.classes[labels[row]][:6]}: {cosine:.2f}"
            cells.append((subject.bank, row, frame, text))
        for column, (images, row, frame, text) in enumerate(cells):
            x, y = _GAP + column * step_x + (_GAP if column else 0), _GAP + line * step_y
            pen.rectangle((x - 3, y - 3, x + _CELL + 2, y + _CELL + 2), fill=frame)
            sheet.paste(_picture(subject, images, row), (x, y))
            pen.text((x, y + _CELL + 2), text[:12], fill=frame)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)
    return str(path)


def _picture(subject: Subject, images: Labelled, row: int) -> Image.Image:
    """Return an image as the encoder sees it: its first three bands, or its grey."""
    batch, _ = next(iter(subject.batches(images.rows(torch.tensor([row])))))
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(subject.data))
    pixels = ((batch[0].cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    kind = Image.Resampling.NEAREST if picture.width <= _CELL else Image.Resampling.BICUBIC
    return picture.resize((_CELL, _CELL), kind)
