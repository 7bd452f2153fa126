"""The index of shards: which images a tar or a Parquet file holds and where, and their labels.

It is read once from the headers (`moco.images.shard_headers`), and kept in one SQLite file beside
the cache of shards, under the address, size and mark of each shard. What tells a shard's content
from another's is a checksum of that and of the first bytes of its members. This room needs no
torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from moco.config import RunError
from moco.images.formats import readable
from moco.images.stores import Facts

log = logging.getLogger("moco")
_READING = "3"  # changes with what is made of the same headers, which are then read again
_TOLD = ("damaged", "links", "once")  # once, and unknown to processes of an older version
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
        damaged: Where a tar cannot be read on although there is more of it; 0: nowhere.
        links: Images and labels that are passed over, since they are links to other files.
        once: The labels as they were spelt before 2.0 was class 2, of which runs of then have the
            checksum; empty: alike. This, `damaged` and `links` are not kept in the index.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[str | None]
    starts: int = 0
    second: int = 0
    foreign: dict[str, int] = field(default_factory=dict)
    damaged: int = 0
    links: int = 0
    once: list[str | None] = field(default_factory=list)

    def checksum(self) -> int:
        """Return what tells this content from another."""
        text = json.dumps([self.names, self.sizes, self.once or self.labels])
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
    """Return a checksum of the endings that can be read here, and of how headers are read."""
    return zlib.crc32(" ".join([_READING, *sorted(readable())]).encode())


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
            raise self._refused(error) from None
        except sqlite3.DatabaseError as error:
            log.info("%s is damaged (%s) and made anew", self.path, error)
            self.path.unlink()
            return {}

    def add(self, found: list[tuple[str, Facts, Members]]) -> dict[str, Known]:
        """Keep what was found in some shards, whole or not at all; return it without members.

        Raises:
            RunError: The disk is full.
        """
        formats, rows, known = known_formats(), [], {}
        for address, facts, members in found:
            kept = {k: v for k, v in asdict(members).items() if k not in _TOLD}
            rest = zlib.compress(json.dumps(kept).encode())
            known[address] = Known(facts, len(members.names), members.checksum(), formats)
            rows.append((address, *facts, *known[address][1:], rest))
        insert = "insert or replace into indexed values (?, ?, ?, ?, ?, ?, ?)"
        try:
            with self._open() as connection:
                connection.executemany(insert, rows)
        except sqlite3.OperationalError as error:
            raise self._refused(error) from None
        return known

    def _refused(self, error: sqlite3.OperationalError) -> RunError:
        """Say that the file takes nothing, as on a full disk, or cannot be opened."""
        return RunError(
            f"{self.path} cannot be used ({error}): free the disk, or set MOCO_CACHE to a folder "
            "on another one", local=True,
        )  # fmt: skip

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
