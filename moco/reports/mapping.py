"""Columns for a map: where each image lies in a plane, and which others are most like it.

Embedding Atlas reads them: `x`, `y`, and `neighbors`, a struct of `ids` and `distances`, which are
one less the cosine. Points lie near one another where the features do. This room needs no torch.
Shapes: M images, n rows of a block, D feature, P main directions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from moco.reports.index import open_index, others
from moco.reports.layout import tsne
from moco.reports.table import FILE, Features, unit, writing

log = logging.getLogger("moco")
NEIGHBOURS = 15
_DIRECTIONS, _SEED = 50, 0
Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]
_NEIGHBORS = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
_ADDED = [pa.field("x", pa.float32()), pa.field("y", pa.float32()),
          pa.field("neighbors", _NEIGHBORS)]  # fmt: skip


def add_map(features: Features) -> None:
    """Write a file of features anew, with the columns of a map."""
    log.info("map: %d images, which may take minutes", len(features))
    index = open_index(features)
    points = project(features.blocks, len(features))
    schema = features.schema
    for field in _ADDED:
        schema = schema.append(field)
    with writing(features.folder / FILE, schema) as writer:
        for start, table, block in features.groups():
            place = points[start : start + len(table)]
            added = [pa.array(place[:, 0]), pa.array(place[:, 1])]
            added.append(_neighbors(*others(index, start, block, NEIGHBOURS)))
            writer.write_table(pa.table([*table.columns, *added], schema=schema))


def _neighbors(similarity: np.ndarray, found: np.ndarray) -> pa.StructArray:
    """Make the column of n images; what an index of cells did not find is left out."""
    there = found >= 0
    ends = pa.array(np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32))
    distances = np.maximum(1 - similarity[there], 0)
    lists = [pa.ListArray.from_arrays(ends, pa.array(found[there]))]
    lists.append(pa.ListArray.from_arrays(ends, pa.array(distances.astype(np.float32))))
    return pa.StructArray.from_arrays(lists, fields=[_NEIGHBORS.field(0), _NEIGHBORS.field(1)])


def project(blocks: Blocks, count: int) -> np.ndarray:
    """Return a point for each image, M x 2 float32, the same at each call.

    Args:
        blocks: Yields a number and n x D vectors, from which that row on.
        count: M. Few images, or images without any difference, lie on a line or at one point.
    """
    points = _main_directions(blocks, count)
    if len(points) < 4 or not points[:, 0].std() > 0:
        return points[:, :2].copy()
    return tsne(points, _SEED, "leave out --map")


def _main_directions(blocks: Blocks, count: int) -> np.ndarray:
    """Return the share of each unit vector along the main directions, M x P, in two passes."""
    total, square = 0.0, 0.0
    for _, block in blocks():
        rows = unit(block).astype(np.float64)
        total, square = total + rows.sum(0), square + rows.T @ rows
    mean = total / count
    spread, directions = np.linalg.eigh(square / count - np.outer(mean, mean))
    kept = directions[:, ::-1][:, :_DIRECTIONS].astype(np.float32)
    kept = kept[:, spread[::-1][:_DIRECTIONS] > 1e-9]  # what is left is rounding
    points = np.zeros((count, max(2, kept.shape[1])), np.float32)
    for start, block in blocks():
        rows = unit(block) - mean.astype(np.float32)
        points[start : start + len(rows), : kept.shape[1]] = rows @ kept
    return points
