"""What the tests of features share: a checkpoint, commands in this process, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from networks import SMALL, save_ours

from moco.command.embed import main
from moco.reports import parts
from moco.reports.table import Features, vectors_of, writing

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


class Stopped(Exception):
    """What `stop` raises."""


def stop(*_):
    """Stand in for what follows, to end before it."""
    raise Stopped


def in_small_parts(patch) -> None:
    """Have parts of 16 images, in batches of 8."""
    patch.setattr(parts, "_BATCH", 8)
    patch.setattr(parts, "_PART_BATCHES", 2)


def table(folder: Path | str) -> dict:
    """Return the columns of a file of features; vectors as one array."""
    found = pq.read_table(Path(folder) / "features.parquet")
    columns = found.to_pydict()
    return columns | {"vector": np.array(columns["vector"])}


def write_features(vectors, folder="set", group=16, labels=None, **about) -> Features:
    """Write vectors as a file of features, in groups of rows; return it, opened."""
    Path(folder).mkdir(exist_ok=True)
    about = {"shape": [vectors.shape[1]], "data_root": "/images", "files": True} | about
    columns = {
        "id": pa.array(np.arange(len(vectors))),
        "path": pa.array([f"{row:05d}.png" for row in range(len(vectors))]),
    }
    columns |= {"label": pa.array(labels)} if labels else {}
    found = pa.table(columns | {"vector": vectors_of(vectors)})
    schema = found.schema.with_metadata({"moco": json.dumps(about)})
    with writing(Path(folder) / "features.parquet", schema) as writer:
        for start in range(0, len(vectors), group):
            writer.write_table(found.slice(start, group).cast(schema))
    return Features(folder)


def blobs(centres: int, each: int, width: int = 16, spread: float = 0.02, seed: int = 0):
    """Return vectors in groups around random centres, one group behind another."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((centres, width)).repeat(each, 0)
    return (middles + spread * rng.standard_normal(middles.shape)).astype(np.float32)
