"""Write smooth random colour images, for tests and for the torture of runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(
    folder: Path,
    names: Iterable[str],
    rng: np.random.Generator,
    small: int = 5,
    size: tuple[int, int] = (20, 20),
) -> None:
    """Write an image under each name: random pixels, `small` x `small`, enlarged to `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = rng.integers(0, 256, (small, small, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / name)


def write_classes(root: Path) -> Path:
    """Write 40 smooth colour images of 24 x 20 pixels in two classes, and 10 for testing."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in ("cat", "dog"):
            names = [f"{i}.png" for i in range(count)]
            write_pictures(root / split / name, names, rng, small=4, size=(20, 24))
    return root


def save(path: Path, size: tuple[int, int] = (4, 4)) -> Path:
    """Write a grey image of one value and `size` (height, width); return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, 128, np.uint8)).save(path)
    return path
