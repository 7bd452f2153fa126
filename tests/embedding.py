"""What the tests of features share: a checkpoint, commands in this process, and what they wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from networks import SMALL, save_ours

from moco.command.embed import main
from moco.reports import parts

SIZE = 16
FAST = ["--accelerator", "cpu", "--data.num_workers", "0"]


def checkpoint(folder: Path) -> Path:
    """Write a checkpoint of a small ResNet for images of 16 pixels."""
    path = folder / "last.ckpt"
    save_ours(path, SMALL, 3, SIZE)
    return path


def embed(ckpt: Path, root: Path | str, output: Path | str, *arguments: str) -> dict:
    """Run `moco embed` in this process."""
    words = ["--checkpoint", str(ckpt), "--output", str(output), *FAST, *arguments]
    return main([*words, "--data.root", str(root)] if root else words)


def in_small_parts(patch) -> None:
    """Have parts of 16 images, in batches of 8."""
    patch.setattr(parts, "_BATCH", 8)
    patch.setattr(parts, "_PART_BATCHES", 2)


def table(folder: Path | str) -> dict:
    """Return the columns of a file of features; vectors as one array."""
    found = pq.read_table(Path(folder) / "features.parquet")
    columns = found.to_pydict()
    return columns | {"vector": np.array(columns["vector"])}
