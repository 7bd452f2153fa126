"""Sets of shards: images inside tars or Parquet files, read one at a time.

A shard of tar on this machine is read where it lies; any other one comes to the cache first. An
image is a `Member`, a name to people and bytes to a decoder. What is looked at for its header, and
an epoch's first images, come by requests of their own while their shards are not here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from moco.config import RunError
from moco.images.cache import Cache, Shard
from moco.images.formats import BadImage, Member
from moco.images.shard_index import Index, Known, Members
from moco.images.stores import REQUESTS, check_unchanged, gives_parts, is_remote, read_range

_OPEN, _INDEXED = 128, 512  # shards whose files and members a process holds
_FEW = 256  # images that were looked at alone, of which a process keeps the bytes
_SMALL = 2**20  # bytes of a shard that comes about as soon as some of its images


class ShardSet(Sequence[Member]):
    """Images of shards, or some of them, in the order of the shards.

    Args:
        known: Address to what the index tells of each shard.
        index: Holds their members.
        cache: Holds what cannot be read where it lies.
        chosen: Rows of the set that are taken, in their order; None: all.

    Attributes:
        shards: The files.
        counts: n int64, the images of each.
    """

    def __init__(
        self, known: dict[str, Known], index: Index, cache: Cache, chosen: np.ndarray | None = None
    ) -> None:
        self.known, self.index, self.cache, self.chosen = known, index, cache, chosen
        self.shards = [Shard(address, each.facts) for address, each in known.items()]
        self.counts = np.array([each.count for each in known.values()], dtype=np.int64)
        self._ends = [0, *self.counts.cumsum().tolist()]  # a list, in which Python looks up faster
        self._set_up()

    def _set_up(self) -> None:
        self.members = functools.lru_cache(_INDEXED)(self._members)
        self._files: dict[int, int] = {}  # shard to its open file
        # Images that were looked at alone, and those that were fetched alone to be trained on.
        self._few: dict[tuple[int, int], bytes] = {}
        self._alone: dict[tuple[int, int], bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("members", "_files", "_few", "_alone"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __len__(self) -> int:
        return self._ends[-1] if self.chosen is None else len(self.chosen)

    def __getitem__(self, row: int) -> Member:
        """Return an image of the set; nothing is fetched until its content is asked for."""
        shard, place = self._locate(row)
        name = f"{self.shards[shard].address}#{self.members(shard).names[place]}"
        return Member(name, functools.partial(self._content, name, shard, place))

    def rows(self, rows: Sequence[int]) -> ShardSet:
        """Keep only some images, in the order of `rows`."""
        rows = np.asarray(rows, dtype=np.int64)
        chosen = rows if self.chosen is None else self.chosen[rows]
        return ShardSet(self.known, self.index, self.cache, chosen)

    def around(self, row: int) -> range:
        """Return the rows of an image's shard."""
        shard, place = self._locate(row)
        return range(row - place, row - place + int(self.counts[shard]))

    def labels(self) -> list[str | None]:
        """Return the name of each image's class; None where it has none."""
        found = [name for shard in range(len(self.shards)) for name in self._members(shard).labels]
        return found if self.chosen is None else [found[row] for row in self.chosen]

    def identify(self) -> dict[str, int]:
        """Return what tells this set from another: the count, and a checksum of names and sizes.

        `content` is a checksum of what the index tells of the shards' content.
        """
        each = zip(self.shards, self.counts.tolist(), strict=True)
        lines = [f"{os.path.basename(s.address)} {s.facts.size} {count}" for s, count in each]
        chosen = b"" if self.chosen is None else self.chosen.tobytes()
        content = np.array([each.checksum for each in self.known.values()], dtype=np.int64)
        return {
            "count": len(self),
            "crc32": crc32("\n".join(lines).encode() + chosen),
            "content": crc32(content.tobytes()),
        }

    def warm(self, rows: Sequence[int]) -> None:
        """Fetch some images at a time, to be looked at soon."""

        def fetch(row: int) -> None:
            with contextlib.suppress(BadImage):  # which is met again where it is read
                self[row].content(False)

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(fetch, rows))

    @property
    def come_alone(self) -> bool:
        """Tell whether an epoch's first images are fetched alone: shards in a store are large."""
        is_far = lies_elsewhere(self) and gives_parts(self.shards[0].address)
        return is_far and self._is_large(0)

    def fetch_alone(self, rows: Sequence[int]) -> None:
        """Fetch those of some images whose shards are large and not here yet, without the shards.

        They are kept until the next call.

        Raises:
            RunError: One cannot be fetched, or its shard was replaced.
        """
        self._alone = {}
        places = [self._locate(row) for row in rows]
        late = {n for n in {n for n, _ in places} if self._is_large(n) and self._is_far(n)}
        places = [place for place in places if place[0] in late]
        if not places:
            return
        with ThreadPoolExecutor(REQUESTS) as pool:
            contents = list(pool.map(lambda place: self._range(*place), places))
            # Afterwards, since a shard may be replaced at any time before.
            list(pool.map(lambda number: check_unchanged(*self.shards[number]), late))
        self._alone = dict(zip(places, contents, strict=True))

    def _locate(self, row: int) -> tuple[int, int]:
        """Return the shard of an image, and the image's place in it."""
        row = row if self.chosen is None else int(self.chosen[row])
        shard = bisect_right(self._ends, row) - 1
        return shard, row - self._ends[shard]

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
        offset, size = self._span(number, place)
        if size == 0:
            raise BadImage(name, "is empty")
        content = (self._alone if whole else self._few).get((number, place))
        if content is None and not whole and self._is_far(number):
            if len(self._few) >= _FEW:
                self._few.clear()
            content = self._few[number, place] = self._range(number, place)
        if content is None:
            content = os.pread(self._file(number), size, offset)
            self._check(number)
        if len(content) < size:
            raise BadImage(name, "is cut short: its shard ends within it")
        return content

    def _is_far(self, number: int) -> bool:
        """Tell whether a shard lies in a store and not here, so that its images can come alone."""
        shard = self.shards[number]
        is_here = number in self._files or not shard.is_cached or self.cache.has(shard)
        return not (shard.is_parquet or is_here) and gives_parts(shard.address)

    def _is_large(self, number: int) -> bool:
        return self.shards[number].facts.size > _SMALL

    def _range(self, number: int, place: int) -> bytes:
        """Fetch an image alone."""
        offset, size = self._span(number, place)
        return read_range(self.shards[number].address, offset, offset + size) if size else b""

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
        return file

    def _check(self, number: int) -> None:
        """Raise RunError where a shard that is read where it lies is another one by now."""
        shard = self.shards[number]
        if not shard.is_cached:
            found = os.fstat(self._files[number])
            if (found.st_size, str(found.st_mtime_ns)) != shard.facts:
                raise RunError(
                    f"{shard.address} was replaced while it was read: put the former one back and "
                    "go on with --resume, or start a new run",
                    local=True,
                )


def _opened(shard: Shard, cache: Cache) -> int:
    """Open a shard's file; one that another process removes from the cache is brought again."""
    while True:
        path = cache.bring(shard) if shard.is_cached else Path(shard.address)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not shard.is_cached:
                raise RunError(f"{path} is gone: put it back", local=True) from None


def lies_elsewhere(paths: Sequence[str]) -> bool:
    """Tell whether images come from tars in a store, so that looking at one costs a request."""
    if not isinstance(paths, ShardSet):
        return False
    first = paths.shards[0]
    return is_remote(first.address) and not first.is_parquet
