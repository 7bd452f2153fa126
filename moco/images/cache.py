"""The cache of shards: whole files on a local disk, bounded, shared by the processes of a machine.

A shard comes under a name of its own and gets its final name when it is whole, so a kill leaves no
torn one. One process at a time brings a shard, and others wait for it. What makes room is the
shard that the order needs last, or where nobody knows an order the one that was longest unused.
Parquet becomes a plain file of images on the way, which single images can be read from.
This room needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from moco.config import RunError, UserError
from moco.images.parquet import is_whole, unpack
from moco.images.stores import Facts, check_unchanged, download, is_remote

log = logging.getLogger("moco")
PART = ".part"
_FILE = re.compile(r"[0-9a-f]{24}-\d+(\.raw)?(\.part)?")
_SLOTS = 256  # locks; two shards that share one only wait for each other
_POLL_S, _POLLS = 0.05, 200  # between looks for room, and looks until parts may be left ones


class Shard(NamedTuple):
    """A file of images: its address and facts."""

    address: str
    facts: Facts

    @property
    def name(self) -> str:
        """Return its file's name in a cache; it ends with the bytes that it takes."""
        digest = blake2b(repr(self).encode(), digest_size=12).hexdigest()
        return f"{digest}-{self.facts.size}"

    @property
    def is_parquet(self) -> bool:
        """Tell whether it is Parquet, else a tar."""
        return self.address.endswith(".parquet")

    @property
    def is_cached(self) -> bool:
        """Tell whether it is read from a cache, and not where it lies."""
        return is_remote(self.address) or self.is_parquet


class Cache:
    """Shards in a folder, up to a number of bytes.

    Args:
        folder: Of this machine; made when the first shard comes.
        limit: Bytes of shards that may lie there.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit

    def path(self, shard: Shard) -> Path:
        """Return where a shard lies once it is there."""
        return self.folder / shard.name

    def has(self, shard: Shard) -> bool:
        """Tell whether a shard is there."""
        return self.path(shard).exists()

    def _has_whole(self, shard: Shard) -> bool:
        return is_whole(self.path(shard), shard.facts.size, shard.is_parquet)

    def bring(self, shard: Shard) -> Path:
        """Return a shard's file, which is fetched if it is not there.

        Raises:
            RunError: It cannot be fetched, or there is no room for it.
        """
        path = self.path(shard)
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used now
        if self._has_whole(shard):
            return path
        self._wait_for_room(shard)  # without the lock, for which those wait who have room
        with self._locked(f"{int(shard.name[:8], 16) % _SLOTS:02x}.lock"):
            if not self._has_whole(shard):
                if path.exists():
                    log.info("warning: %s was cut short and is fetched again", path)
                    path.unlink(missing_ok=True)
                self._fetch(shard)
        return path

    def _fetch(self, shard: Shard) -> None:
        """Bring a shard for which there is room; the caller holds its lock."""
        part = self._part(shard)
        try:
            try:
                _copy(shard, part)
            except OSError as error:
                _check_room(error, self.folder, shard)
                self._evict(shard.facts.size)  # the disk is fuller than the cache knows
                try:
                    _copy(shard, part)
                except OSError as again:
                    _check_room(again, self.folder, shard)
                    raise RunError(
                        f"{self.folder} has no room left for {shard.address} ({shard.facts.size} "
                        "bytes): free the disk, or set MOCO_CACHE to a folder on another one",
                        local=True,
                    ) from None
            with self._locked("room.lock"):
                os.replace(part, self.path(shard))
        finally:
            part.unlink(missing_ok=True)

    def _wait_for_room(self, shard: Shard) -> None:
        if shard.facts.size > self.limit:
            raise RunError(
                f"{shard.address} has {shard.facts.size} bytes, more than data.cache_gib "
                f"{self.limit / 2**30:.3g}: raise it, or make smaller shards",
                local=True,
            )
        polls = itertools.count(1)
        while not self.make_room(shard):
            if next(polls) % _POLLS == 0:
                self.tidy()  # one of them may have been killed
            time.sleep(_POLL_S)  # what others are fetching can make room when it has come

    def make_room(
        self, shard: Shard, use: Callable[[Path], float] | None = None, after: float = -math.inf
    ) -> bool:
        """Keep room for a shard; return whether there is enough.

        Args:
            shard: What is to come.
            use: Tells of a file when it is needed next; by default, for how long it was not used.
            after: Only files that are needed later than this are removed.
        """
        self._check_writable()
        with self._locked("room.lock"):
            if self.has(shard):
                return True
            part = self._part(shard)
            files = [path for path in self._files() if path != part]
            excess = sum(map(_size, files)) + shard.facts.size - self.limit
            if excess > 0:
                excess -= self._evict(excess, use, after)
            if excess > 0:
                return False
            part.touch()
            return True

    def _evict(
        self, size: float, use: Callable[[Path], float] | None = None, after: float = -math.inf
    ) -> int:
        """Remove whole files, those used last first, until `size` bytes are free; return these."""
        freed = 0
        uses = {path: (use or _unused)(path) for path in self._files() if path.suffix != PART}
        for path in sorted(uses, key=lambda path: uses[path], reverse=True):
            if freed >= size or uses[path] <= after:
                break
            path.unlink(missing_ok=True)
            freed += _size(path)
        return freed

    def tidy(self) -> None:
        """Remove what a kill has left half fetched; files that are being fetched stay."""
        for path in self._files():
            if path.suffix == PART:
                slot = f"{int(path.name[:8], 16) % _SLOTS:02x}.lock"
                with contextlib.suppress(BlockingIOError), self._locked(slot, wait=False):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the other processes of this machine out of the same block."""
        self._check_writable()
        with self._locked("index.lock"):
            yield

    def _files(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [p for p in self.folder.iterdir() if _FILE.fullmatch(p.name)]
        return []

    def _part(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}{PART}"

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        with open(self.folder / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                yield
            finally:  # a worker that was forked meanwhile holds the file open
                fcntl.flock(file, fcntl.LOCK_UN)

    def _check_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "room.lock").touch()
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot hold shards ({error.strerror}): set MOCO_CACHE to a folder "
                "that can"
            ) from None


def cache_folder() -> Path:
    """Return the folder of the index and the cache: $MOCO_CACHE, or moco in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MOCO_CACHE") or f"{base}/moco").expanduser().absolute()


def _unused(path: Path) -> float:
    """Return for how long a file was not used, in seconds."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


def _size(path: Path) -> int:
    """Return the bytes that a file's name says it takes, whether or not it is whole."""
    return int(path.name.partition(".")[0].rpartition("-")[2])


def _check_room(error: OSError, folder: Path, shard: Shard) -> None:
    """Pass on an error that is none of a full disk."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise RunError(
            f"{shard.address} cannot be kept in {folder}: {error.strerror or error}", local=True
        ) from None


def _copy(shard: Shard, target: Path) -> None:
    """Bring a shard's file to `target`, Parquet as plain images.

    Raises:
        RunError: It cannot be fetched or read.
        OSError: It cannot be written.
    """
    if not shard.is_parquet:
        download(shard.address, target, shard.facts)
    elif is_remote(shard.address):
        raw = target.with_name(f"{target.stem}.raw{PART}")
        try:
            download(shard.address, raw, shard.facts)
            unpack(str(raw), target, shard.address)
        finally:
            raw.unlink(missing_ok=True)
    else:
        unpack(shard.address, target, shard.address)
        check_unchanged(shard.address, shard.facts)
