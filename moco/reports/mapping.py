"""Columns for a map: where each image lies in a plane, and which others are most like it.

Embedding Atlas reads them: `x`, `y`, and `neighbors`, a struct of `ids` and `distances`, which are
one less the cosine. This room needs no torch. Shapes: M images, n rows of a block.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa

from moco.reports.index import open_index, others
from moco.reports.projection import project
from moco.reports.table import FILE, Features, writing

log = logging.getLogger("moco")
NEIGHBOURS = 15
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
