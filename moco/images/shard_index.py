"""The index of shards: which images a tar or a Parquet file holds and where, and their labels.

It is read once from the headers, and kept in one SQLite file beside the cache of shards, under the
address, size and mark of each shard. Labels are names here, as in `moco.images.labels`. What tells
a shard's content from another's is a checksum of that and of the first bytes of its members.
This room needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moco.config import RunError, UserError
from moco.images.folders import visible
from moco.images.formats import escaped, extension, looks_like_image, readable
from moco.images.stores import Facts

log = logging.getLogger("moco")
LABELS = ("cls", "label", "class", "class_name", "target", "category")  # in a .json, or columns
_MOST_BYTES = 2**20  # of a file that holds a label
_START, _EDGE = 512, 2**16  # bytes of each member, and of both ends of a Parquet file, summed
_MAKE = """create table if not exists indexed (address text primary key, size integer, tag text,
    count integer, checksum integer, formats integer, members blob)"""


@dataclass
class Members:
    """The images of one shard, in its order.

    Attributes:
        names: For people; their endings tell the decoders.
        offsets, sizes: In bytes within a tar; empty for Parquet, whose images lie in pages.
        labels: None where an image has none.
        starts: Checksum of the first bytes of all members.
        second: Images that are passed over, since another one has their key.
        foreign: By ending, the images that are passed over, since nothing here reads them.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[str | None]
    starts: int = 0
    second: int = 0
    foreign: dict[str, int] = field(default_factory=dict)

    def checksum(self) -> int:
        """Return what tells this content from another."""
        text = json.dumps([self.names, self.sizes, self.labels])
        return zlib.crc32(text.encode(), self.starts)


class Known(NamedTuple):
    """What the index tells of a shard without its members.

    Attributes:
        facts: Of the shard when it was read.
        count: Its images.
        checksum: Of its content.
        formats: Which formats could be read then, a checksum too.
    """

    facts: Facts
    count: int
    checksum: int
    formats: int


def known_formats() -> int:
    """Return a checksum of the endings that can be read here; further packages bring more."""
    return zlib.crc32(" ".join(sorted(readable())).encode())


class Index:
    """Members of shards by address, in a file that the processes of a machine share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            connection.execute(_MAKE)
            yield connection
            connection.commit()
        finally:
            connection.close()

    def known(self) -> dict[str, Known]:
        """Return what is known of every shard that is indexed; a damaged index is made anew."""
        try:
            with self._open() as connection:
                rows = connection.execute(
                    "select address, size, tag, count, checksum, formats from indexed"
                )
                return {row[0]: Known(Facts(row[1], row[2]), *row[3:]) for row in rows}
        except sqlite3.OperationalError as error:
            raise RunError(f"{self.path} cannot be read: {error}", local=True) from None
        except sqlite3.DatabaseError as error:
            log.info("%s is damaged (%s) and made anew", self.path, error)
            self.path.unlink()
            return {}

    def add(self, found: list[tuple[str, Facts, Members]]) -> dict[str, Known]:
        """Keep what was found in some shards, whole or not at all; return it without members."""
        formats, rows, known = known_formats(), [], {}
        for address, facts, members in found:
            rest = zlib.compress(json.dumps(asdict(members)).encode())
            known[address] = Known(facts, len(members.names), members.checksum(), formats)
            rows.append((address, *facts, *known[address][1:], rest))
        with self._open() as connection:
            connection.executemany(
                "insert or replace into indexed values (?, ?, ?, ?, ?, ?, ?)", rows
            )
        return known

    def members(self, address: str) -> Members:
        """Return the images of one shard.

        Raises:
            RunError: The index is damaged.
        """
        try:
            with self._open() as connection:
                found = connection.execute(
                    "select members from indexed where address = ?", (address,)
                ).fetchone()
            if found:
                return Members(**json.loads(zlib.decompress(found[0])))
        except (sqlite3.DatabaseError, zlib.error, ValueError, TypeError) as error:
            text = f"{self.path} is damaged ({error}): delete it, it is made anew"
            raise RunError(text, local=True) from None
        text = f"{self.path} was made anew meanwhile and lacks {address}: start again"
        raise RunError(text, local=True)


def read_tar(file: Any, address: str) -> Members:
    """Read the headers of a tar in WebDataset's layout: KEY.jpg, and KEY.cls or KEY.json.

    Of a key's images and labels the first one counts, and a .cls before a .json. A tar that ends
    within a member gives those before it, and that one, which then cannot be decoded.

    Raises:
        UserError: It is no tar, or a compressed one.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, str]] = {"cls": {}, "json": {}}
    foreign, second, starts, endings = Counter[str](), 0, 0, readable()
    for tar, item in _members(file, address):
        folder, _, base = item.name.rpartition("/")
        if not item.isfile() or not visible(base):
            continue
        stem, _, kind = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        ending = extension(base)
        if ending in endings:
            file.seek(item.offset_data)
            starts = zlib.crc32(file.read(min(_START, item.size)), starts)
            second += key in images
            images.setdefault(key, (item.name, item.offset_data, item.size))
        elif looks_like_image(ending):
            foreign[ending] += 1
        elif kind in labels and item.size <= _MOST_BYTES:
            name = _label(kind, tar.extractfile(item).read())
            if name is not None:
                labels[kind].setdefault(key, name)
    found = images.values()
    names, offsets, sizes = ([image[part] for image in found] for part in range(3))
    named = labels["json"] | labels["cls"]
    told = [named.get(key) for key in images]
    return Members(names, offsets, sizes, told, starts, second, dict(foreign))


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


def _label(kind: str, content: bytes) -> str | None:
    """Return the label that a .cls or .json file holds."""
    text = content.decode("utf-8", "replace").strip()
    if kind == "cls":
        return text or None
    try:
        values = json.loads(text)
    except ValueError:
        return None
    told = values if isinstance(values, dict) else {}
    found = [told[name] for name in LABELS if told.get(name) is not None]
    return str(found[0]) if found and isinstance(found[0], str | int) else None


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
    labels: list[str | None] = [None] * count
    if label:
        told = _class_names(schema, label)
        labels = [_named(value, told) for value in read.column(label).to_pylist()]
    return Members(names, [], [], labels, starts)


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


def _named(value: Any, names: list[str]) -> str | None:
    """Return the name of a label; -1 stands for none in Hugging Face's sets."""
    if value is None or value == -1:
        return None
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)
