"""Parquet in the cache: its images one behind the other, after a table of their places.

The table is int64: their number N, where each begins, and where the last one ends; N+2 numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco.config import RunError
from moco.images.formats import escaped
from moco.images.shard_headers import image_column, parquet_package


def unpack(source: str, target: Path, name: str) -> None:
    """Write the images of a Parquet file to `target`.

    Raises:
        RunError: It is damaged, or no image has any bytes.
    """
    table = parquet_package().ParquetFile(source)
    column = image_column(table.schema_arrow, name)
    places = array("q", [8 * (table.metadata.num_rows + 2)])  # after the number and the table
    batches = table.iter_batches(64, columns=[column])
    with open(target, "wb") as file:
        file.seek(places[0])
        while (batch := _next(batches, name)) is not None:
            values = batch.column(0)
            for value in values.field("bytes") if column.endswith(".bytes") else values:
                content = value.as_py() or b""
                file.write(content)
                places.append(places[-1] + len(content))
        if len(places) > 1 and places[-1] == places[0]:
            raise RunError(
                f"{name} holds no bytes of images, perhaps their paths alone: write it with the "
                "bytes", local=True,
            )  # fmt: skip
        file.seek(0)
        file.write(array("q", [len(places) - 1]).tobytes() + places.tobytes())


def _next(batches: Iterator[Any], name: str) -> Any:
    """Return the next rows of a Parquet file, or None; raise RunError where they are damaged."""
    try:
        return next(batches, None)
    except (ValueError, OSError) as error:  # of pyarrow
        reason = escaped(str(error))
        raise RunError(f"{name} is damaged: {reason}: put a whole one there", local=True) from None


def is_whole(path: Path, size: int, is_parquet: bool) -> bool:
    """Tell whether a file of the cache has its length.

    Args:
        path: Of the file.
        size: Bytes of the shard where it lies.
        is_parquet: Whether it is as `unpack` writes it, else a copy.
    """
    try:
        found, places = path.stat().st_size, array("q")
        if not is_parquet:
            return found == size
        with open(path, "rb") as file:
            places.fromfile(file, 1)
            file.seek(8 * (places[0] + 1))
            places.fromfile(file, 1)
        return places[1] == found
    except (OSError, EOFError, ValueError, OverflowError):
        return False
