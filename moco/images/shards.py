"""Sets of shards: images inside tars or Parquet files, read one at a time.

A shard of tar on this machine is read where it lies; any other one comes to the cache first. An
image is a `Member`, a name to people and bytes to a decoder. What is looked at alone, for its
header, comes by a request of its own while its shard is not here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from moco.config import DataConfig, RunError, UserError
from moco.images.cache import Cache, Shard, cache_folder
from moco.images.formats import BadImage, Member, one_line
from moco.images.patterns import find_shards
from moco.images.shard_index import Index, Members, read_parquet, read_tar
from moco.images.stores import Facts, is_remote, look_up, look_up_all, read_file, read_range
from moco.log import track

log = logging.getLogger("moco")
_OPEN, _INDEXED = 128, 512  # shards whose files and members a process holds
_FEW = 256  # images that were looked at alone, of which a process keeps the bytes
_THREADS = 16  # that ask a store at a time
_AT_A_TIME = 64  # shards whose members are kept at once


class ShardSet(Sequence[Member]):
    """Images of shards, or some of them, in the order of the shards.

    Args:
        shards: The files.
        counts: n int64, the images of each.
        index: Holds their members.
        cache: Holds what cannot be read where it lies.
        chosen: Rows of the set that are taken, in their order; None: all.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        counts: np.ndarray,
        index: Index,
        cache: Cache,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.shards, self.counts, self.index, self.cache = shards, counts, index, cache
        self.chosen = chosen
        self._ends = counts.cumsum()
        self._set_up()

    def _set_up(self) -> None:
        self.members = functools.lru_cache(_INDEXED)(self._members)
        self._files: dict[int, int] = {}  # shard to its open file
        self._few: dict[int, bytes] = {}  # images that were looked at alone

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("members", "_files", "_few"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.chosen is None else len(self.chosen)

    def __getitem__(self, row: int) -> Member:
        """Return an image of the set; nothing is fetched until its content is asked for."""
        shard, place = self._locate(row)
        name = f"{self.shards[shard].address}#{self.members(shard).names[place]}"
        return Member(name, functools.partial(self._content, name, shard, place))

    def rows(self, rows: Sequence[int]) -> ShardSet:
        """Keep only some images, in the order of `rows`."""
        rows = np.asarray(rows, dtype=np.int64)
        chosen = rows if self.chosen is None else self.chosen[rows]
        return ShardSet(self.shards, self.counts, self.index, self.cache, chosen)

    def around(self, row: int) -> range:
        """Return the rows of an image's shard."""
        shard, place = self._locate(row)
        return range(row - place, row - place + int(self.counts[shard]))

    def labels(self) -> list[str | None]:
        """Return the name of each image's class; None where it has none."""
        found = [name for shard in range(len(self.shards)) for name in self._members(shard).labels]
        return found if self.chosen is None else [found[row] for row in self.chosen]

    def identify(self) -> dict[str, int]:
        """Return what tells this set from another: the count, and a checksum of names and sizes."""
        lines = [
            f"{os.path.basename(shard.address)} {shard.facts.size} {count}"
            for shard, count in zip(self.shards, self.counts.tolist(), strict=True)
        ]
        chosen = b"" if self.chosen is None else self.chosen.tobytes()
        return {"count": len(self), "crc32": crc32("\n".join(lines).encode() + chosen)}

    def warm(self, rows: Sequence[int]) -> None:
        """Fetch some images at a time, to be looked at soon."""

        def fetch(row: int) -> None:
            with contextlib.suppress(BadImage):  # which is met again where it is read
                self[row].content(False)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, rows))

    def _locate(self, row: int) -> tuple[int, int]:
        row = row if self.chosen is None else int(self.chosen[row])
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - int(self._ends[shard] - self.counts[shard])

    def _members(self, shard: int) -> Members:
        return self.index.members(self.shards[shard].address)

    def _content(self, name: str, number: int, place: int, whole: bool) -> bytes:
        """Return the bytes of an image.

        Args:
            name: Of the image.
            number, place: The shard, and the image's place in it.
            whole: Whether its shard is to be fetched for it.

        Raises:
            BadImage: It is empty, or its shard ends within it.
            RunError: Its shard cannot be fetched, or was replaced.
        """
        shard = self.shards[number]
        offset, size = self._span(number, place)
        if size == 0:
            raise BadImage(name, "is empty")
        if not whole and not shard.is_parquet and shard.is_cached and not self._is_here(number):
            key = int(self._ends[number]) - place
            if key not in self._few:
                if len(self._few) >= _FEW:
                    self._few.clear()
                self._few[key] = read_range(shard.address, offset, offset + size)
            content = self._few[key]
        else:
            content = os.pread(self._file(number), size, offset)
        if len(content) < size:
            raise BadImage(name, "is cut short: its shard ends within it")
        return content

    def _is_here(self, number: int) -> bool:
        return number in self._files or self.cache.has(self.shards[number])

    def _span(self, number: int, place: int) -> tuple[int, int]:
        """Return where an image begins in its file, and its bytes."""
        if not self.shards[number].is_parquet:
            members = self.members(number)
            return members.offsets[place], members.sizes[place]
        ends = array("q", os.pread(self._file(number), 16, 8 * (place + 1)))
        return ends[0], ends[1] - ends[0]

    def _file(self, number: int) -> int:
        """Return an open file of a shard, which is fetched for it where it does not lie here."""
        shard, file = self.shards[number], self._files.get(number)
        if file is None:
            if len(self._files) >= _OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            file = _opened(shard, self.cache)
            self._files[number] = file
        if not shard.is_cached:
            found = os.fstat(file)
            if (found.st_size, str(found.st_mtime_ns)) != shard.facts:
                raise RunError(
                    f"{shard.address} was replaced while it was read: put the former one back and "
                    "go on with --resume, or start a new run",
                    local=True,
                )
        return file


def _opened(shard: Shard, cache: Cache) -> int:
    """Open a shard's file; one that another process removes from the cache is brought again."""
    while True:
        path = cache.bring(shard) if shard.is_cached else Path(shard.address)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not shard.is_cached:
                raise RunError(f"{path} is gone: put it back", local=True) from None


def open_shards(data: DataConfig, held_out: bool = False) -> ShardSet | None:
    """Open one split of `data.root`; shards that are not indexed yet, or changed, are read for it.

    Returns:
        None where there are no held-out shards.

    Raises:
        UserError: There are no shards or no images, or a shard is none.
    """
    splits = find_shards(data)
    addresses = splits.held_out if held_out else splits.train
    if not addresses:
        return None
    cache = Cache(cache_folder(), data.cache_gib * 2**30)
    index = Index(cache.folder / "index.sqlite")
    with cache.alone():  # one process of this machine reads what the others find then
        cache.tidy()
        facts, counts = _indexed(index, addresses)
    total = np.array([counts[address] for address in addresses], dtype=np.int64)
    if not total.sum():
        raise UserError(
            f"data.root {data.root!r}: its {len(addresses)} shards hold no images that can be "
            "read here: give tars in WebDataset's layout (KEY.jpg, KEY.cls)"
        )
    return ShardSet([Shard(a, facts[a]) for a in addresses], total, index, cache)


def _indexed(index: Index, addresses: list[str]) -> tuple[dict[str, Facts], dict[str, int]]:
    """Return facts and counts of shards; those that the index lacks are read and kept in it."""
    known = index.known()
    facts = look_up_all(addresses)
    with ThreadPoolExecutor(_THREADS) as pool:
        rest = [address for address in addresses if address not in facts]
        facts |= zip(rest, pool.map(look_up, rest), strict=True)
        new = [a for a in addresses if a not in known or known[a][0] != facts[a]]
        counts = {a: known[a][1] for a in addresses if a in known}
        if new:
            log.info("reading the headers of %d shards, once", len(new))
        found: list[tuple[str, Facts, Members]] = []
        read = track(pool.map(_read, new), "index of shards", len(new)) if new else []
        for address, members in zip(new, read, strict=True):
            counts[address] = len(members.names)
            found.append((address, facts[address], members))
            if len(found) == _AT_A_TIME:
                index.add(found)
                found = []
        index.add(found)
    return facts, counts


def _read(address: str) -> Members:
    read: Callable[..., Members] = read_parquet if address.endswith(".parquet") else read_tar
    try:
        return read_file(address, lambda file: read(file, address))
    except (UserError, RunError):
        raise
    except Exception as error:  # a broken Parquet file raises pyarrow's classes
        raise UserError(f"{address} cannot be read: {one_line(str(error))}") from None


def lies_elsewhere(paths: Sequence[str]) -> bool:
    """Tell whether images come from tars in a store, so that looking at one costs a request."""
    if not isinstance(paths, ShardSet):
        return False
    first = paths.shards[0]
    return is_remote(first.address) and not first.is_parquet
