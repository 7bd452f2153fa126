"""Headers of shards: what a tar or a Parquet file tells of its images, without decoding any.

Labels are names here, as in `moco.images.labels`. This room needs no torch.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from moco.config import UserError
from moco.images.folders import visible
from moco.images.formats import escaped, extension, looks_like_image, readable
from moco.images.labels import one_form
from moco.images.shard_index import Members

LABELS = ("cls", "label", "class", "class_name", "target", "category")  # in a .json, or columns
_MOST_BYTES = 2**20  # of a file that holds a label
_START, _EDGE = 512, 2**16  # bytes of each member, and of both ends of a Parquet file, summed


def read_tar(file: Any, address: str) -> Members:
    """Read the headers of a tar in WebDataset's layout: KEY.jpg, and KEY.cls or KEY.json.

    Of a key's images and labels the first one counts, and a .cls before a .json. A tar that ends
    within a member gives those before it, and that one, which then cannot be decoded. What follows
    a damaged header, or the end of a first tar of several, cannot be read: `damaged` says where.

    Raises:
        UserError: It is no tar, or a compressed one.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, Any]] = {"cls": {}, "json": {}}
    foreign, second, links, starts, endings = Counter[str](), 0, 0, 0, readable()
    late = set[str]()  # keys whose labels an earlier version did not read, in capitals
    end = 0
    for tar, item in _members(file, address):
        end = tar.offset
        folder, _, base = item.name.rpartition("/")
        stem, _, rest = base.partition(".")
        kind, ending = rest.lower(), extension(base)
        if not item.isfile() or not visible(base):
            is_link = visible(base) and (item.issym() or item.islnk())
            links += is_link and (ending in endings or looks_like_image(ending) or kind in labels)
            continue
        key = f"{folder}/{stem}" if folder else stem
        if ending in endings:
            file.seek(item.offset_data)
            starts = zlib.crc32(file.read(min(_START, item.size)), starts)
            second += key in images
            images.setdefault(key, (item.name, item.offset_data, item.size))
        elif looks_like_image(ending):
            foreign[ending] += 1
        elif kind in labels and item.size <= _MOST_BYTES:
            value = _label(kind, tar.extractfile(item).read())
            if _spelt(value) is not None:
                labels[kind].setdefault(key, value)
                late |= {key} if rest != kind else set()
    found = images.values()
    names, offsets, sizes = ([image[part] for image in found] for part in range(3))
    named = labels["json"] | labels["cls"]
    told = [named.get(key) for key in images]
    before = [None if key in late else value for key, value in zip(images, told, strict=True)]
    once = [str(value) if isinstance(value, str | int) else None for value in before]
    about = names, offsets, sizes, [_spelt(value) for value in told]
    passed_over = second, dict(foreign), _damage(file, end), links
    return Members(*about, starts, *passed_over, once)


def _members(file: Any, address: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the headers of a tar up to where it is cut short, if it is."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while True:
                try:
                    item = tar.next()
                except (tarfile.ReadError, EOFError):
                    return
                if item is None:
                    return
                tar.members = []  # which tarfile would keep
                yield tar, item
    except tarfile.ReadError as error:
        raise UserError(
            f"{address} is no plain tar ({escaped(str(error))}): unpack compressed shards, since "
            "single images are read from them"
        ) from None


def _damage(file: Any, end: int) -> int:
    """Return where a tar goes on with something else than zeros after what was read, or 0."""
    file.seek(end)
    while block := file.read(2**16):
        if block.strip(b"\0"):
            return end
    return 0


def _label(kind: str, content: bytes) -> Any:
    """Return the label that a .cls or .json file holds, as it stands there."""
    text = content.decode("utf-8", "replace").strip()
    if kind == "cls":
        return text or None
    try:
        values = json.loads(text)
    except ValueError:
        return None
    told = values if isinstance(values, dict) else {}
    return next((told[name] for name in LABELS if told.get(name) is not None), None)


def _spelt(value: Any) -> str | None:
    """Return a class's name of a value; 2.0, as tables with gaps have whole numbers, is class 2."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_name = isinstance(value, str | int | float) and value == value  # NaN stands for none
    return one_form(str(value)) if is_name else None


def read_parquet(file: Any, address: str) -> Members:
    """Read names and labels of a Parquet file as Hugging Face writes sets of images."""
    pq = parquet_package()
    starts = zlib.crc32(file.read(_EDGE))
    file.seek(max(0, file.seek(0, os.SEEK_END) - _EDGE))
    starts = zlib.crc32(file.read(), starts)  # with the footer, which tells of every page
    table = pq.ParquetFile(file)
    schema = table.schema_arrow
    image = image_column(schema, address)
    label = next((name for name in ("label", *LABELS) if name in schema.names), None)
    has_path = image.endswith(".bytes") and f"{image[:-6]}.path" in _leaves(table)
    columns = [f"{image[:-6]}.path"] if has_path else []
    columns += [label] if label else []
    count, read = table.metadata.num_rows, table.read(columns=columns) if columns else None
    names = [None] * count
    if has_path:
        names = [row and row.get("path") for row in read.column(image[:-6]).to_pylist()]
    names = [f"{row}/{os.path.basename(n)}" if n else str(row) for row, n in enumerate(names)]
    labels: list[Any] = [None] * count
    if label:
        told = _class_names(schema, label)
        labels = [_named(value, told) for value in read.column(label).to_pylist()]
    once = [None if value is None else str(value) for value in labels]
    return Members(names, [], [], [_spelt(value) for value in labels], starts, once=once)


def parquet_package() -> Any:
    """Return pyarrow's module for Parquet, or raise UserError with what to install."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("data.dataset parquet needs a package: pip install pyarrow") from None
    return pyarrow.parquet


def image_column(schema: Any, address: str) -> str:
    """Return the name of the column of encoded images, as `image.bytes`.

    Raises:
        UserError: There is none.
    """
    for name in ("image", "img", *schema.names):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0:
            return f"{name}.bytes"
        if str(kind) in ("binary", "large_binary"):
            return name
    raise UserError(
        f"{address} has no column of images (it has {', '.join(schema.names)}): give Parquet as "
        "Hugging Face writes it, with image: {bytes, path}"
    )


def _leaves(table: Any) -> set[str]:
    return {table.schema.column(number).path for number in range(len(table.schema))}


def _class_names(schema: Any, label: str) -> list[str]:
    """Return the names of the classes that Hugging Face's own metadata tells; it may be none."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in told["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _named(value: Any, names: list[str]) -> Any:
    """Return a label, by its name if it has one; -1 stands for none in Hugging Face's sets."""
    if value is None or value == -1:
        return None
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
