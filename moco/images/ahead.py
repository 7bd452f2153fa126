"""Shards that are fetched before their turn: threads of the first rank of each machine.

The order tells what the machine's ranks need in each window. Shards come in that order, some at a
time, and make room at the cost of what is needed last; where all that lies in the cache is needed
sooner, the threads wait until training has moved on. What they cannot fetch is fetched again, and
told, by the worker that needs it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from moco.config import RunError, UserError
from moco.images.cache import Cache, Shard
from moco.images.streams import Order

DOWNLOADS = 16  # at a time


class Ahead:
    """Fetches the shards of the rest of an epoch while they are trained on.

    Args:
        order: Of the images.
        shards: The set's, by their numbers.
        cache: Where they come to.
        rows: Of the global batch that this machine's ranks take.
        epoch, number: The batch that comes first.
    """

    def __init__(
        self,
        order: Order,
        shards: Sequence[Shard],
        cache: Cache,
        rows: range,
        epoch: int,
        number: int,
    ) -> None:
        self.order, self.cache = order, cache
        self._block, self._stopped = order.block(number), False
        self._moved, self._turn = threading.Condition(), threading.Lock()
        # File to the window that needs it first, and to the one that needs it last.
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._named: dict[str, Shard] = {}
        for shard, first, last in zip(*(t.tolist() for t in order.spans(epoch, rows)), strict=True):
            name = shards[shard].name
            self._named[name] = shards[shard]
            self._first[name] = min(first, self._first.get(name, first))
            self._last[name] = max(last, self._last.get(name, last))
        self._plan = self._waiting()
        self._begun = False

    def start(self) -> None:
        """Begin to fetch."""
        self._begun = True
        for _ in range(DOWNLOADS):
            threading.Thread(target=self._run, daemon=True).start()

    def moved(self, number: int) -> None:
        """Note that training takes batch `number` of the epoch; begin to fetch if need be."""
        if not self._begun:
            self.start()
        block = self.order.block(number)
        if block != self._block:
            with self._moved:
                self._block = block
                self._moved.notify_all()

    def close(self) -> None:
        """Fetch nothing further; downloads that have begun still end."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def _waiting(self) -> Iterator[tuple[int, Shard]]:
        """Yield the shards that are not there in the order of need, with the window of need."""
        begun = self._block
        needs = {n: max(f, begun) for n, f in self._first.items() if self._last[n] >= begun}
        for name in sorted(needs, key=lambda name: needs[name]):
            if not self.cache.has(self._named[name]):
                yield needs[name], self._named[name]

    def _run(self) -> None:
        while not self._stopped:
            with self._turn:  # so that shards get their room in the order of need
                block, shard = next(self._plan, (0, None))
                if shard is None or not self._admit(block, shard):
                    return
            with contextlib.suppress(OSError, UserError, RunError):
                self.cache.bring(shard)

    def _admit(self, block: int, shard: Shard) -> bool:
        """Wait until there is room for a shard; return False where training has ended."""
        while not self._stopped:
            with contextlib.suppress(OSError, UserError, RunError):
                if self.cache.make_room(shard, self._use, after=block):
                    return True
            with self._moved:
                if not self._stopped:
                    self._moved.wait(1.0)  # other processes make room too
        return False

    def _use(self, path: Path) -> float:
        """Return the window that needs a file next; infinity where this epoch needs it no more."""
        if self._last.get(path.name, -1) < self._block:
            return math.inf
        return max(self._block, self._first[path.name])
