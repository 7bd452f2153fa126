"""The file of features: Parquet that any reader takes, one row an image, read in blocks.

Columns: `id`, the number of the row; `path`, below the data root, for a set without files a name;
`split` and `label`, where there are any; `vector`, a list of fixed size. A name that is no UTF-8
has its other bytes escaped in `path`, and `path_bytes` holds it as it is. The entry `moco` of the
file's metadata says in JSON which encoder made it, from which images.
This room needs no torch. Shapes: M images, n rows of a block, D feature.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moco.config import UserError
from moco.log import reason_of
from moco.whole_files import output_file

FILE, INDEX = "features.parquet", "features.faiss"
_ESSENTIAL = {"id", "path", "vector"}


class Features:
    """An open file of features.

    Attributes:
        about: What its metadata says, see `moco.reports.embed`.
        shape: Of what the network computed from one image: D, or D h w.
        dim: Width of the column `vector`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            raise UserError(
                f"--index {folder} holds no {FILE}: give the --output of `python -m moco embed`"
            )
        try:
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
            self.about: dict[str, Any] = json.loads((schema.metadata or {})[b"moco"])
            self.shape = tuple(self.about["shape"])
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            reason = reason_of(error, 100)
            raise UserError(f"{path} was not written by `moco embed` ({reason})") from None
        if absent := _ESSENTIAL - {*schema.names}:
            raise UserError(f"{path} lacks the columns {', '.join(sorted(absent))}: embed anew")
        self.schema, self.names = schema, schema.names
        self.dim = schema.field("vector").type.list_size

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def column(self, name: str) -> list[Any]:
        """Return a column besides `vector`, whole; all None where there is no such column."""
        if name not in self.names:
            return [None] * len(self)
        return self._file.read([name])[name].to_pylist()

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the vectors in order: the first one's number, and n x D float32."""
        for start, _, block in self.groups(["vector"]):
            yield start, block

    def groups(
        self, columns: list[str] | None = None
    ) -> Iterator[tuple[int, pa.Table, np.ndarray]]:
        """Yield the parts of the file in order: the first row's number, the rows, the vectors."""
        start = 0
        for group in range(self._file.num_row_groups):  # iter_batches keeps what it has read
            table = self._file.read_row_group(group, columns)
            yield start, table, self._numbers(table["vector"])
            start += len(table)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return some vectors, n x D float32; only the parts of the file that hold any are read.

        Args:
            ids: n rows in rising order.
        """
        found, start = np.empty((len(ids), self.dim), np.float32), 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(ids, (start, start + count))
            if last > first:
                vectors = self._numbers(self._file.read_row_group(group, ["vector"])["vector"])
                found[first:last] = vectors[ids[first:last] - start]
            start += count
        return found

    def files(self, ids: Sequence[int]) -> list[str]:
        """Return the files of some images, as this system names them."""
        name = "path_bytes" if "path_bytes" in self.names else "path"
        names = self._file.read([name])[name].take(pa.array(list(ids))).to_pylist()
        return [os.path.join(self.about["data_root"], os.fsdecode(each)) for each in names]

    def _numbers(self, column: pa.ChunkedArray) -> np.ndarray:
        values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(-1, self.dim).astype(np.float32, copy=False)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale n x D rows to unit length; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)


def as_text(path: str) -> str:
    """Return a path as UTF-8, bytes that are none escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def vectors_of(numbers: np.ndarray) -> pa.FixedSizeListArray:
    """Make a column of n x D numbers."""
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])


@contextlib.contextmanager
def writing(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a Parquet file, whole or not at all; each table that is written becomes a row group."""
    plain = [name for name in schema.names if name in ("split", "label")]
    others = {name: "zstd" for name in schema.names if name != "vector"}
    with (
        output_file(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            use_dictionary=plain,  # numbers that differ would only make it larger
            compression=others | {"vector.list.element": "none"},
            write_statistics=["id"],
        ) as writer,
    ):
        yield writer
