"""The order of sharded sets: which image stands where, a pure function of (seed, epoch, place).

The shards lie one behind the other on a line, in an order that the seed draws, and the line is cut
into equal parts, the streams. In each epoch a stream reads its shards in another order, and
shuffles its images inside windows. A global batch takes equal parts of every stream, in the order
of the streams, so a rank's rows come from streams of its own, and every number of ranks that
divides the batch sees the same batches. A shard that lies across a cut belongs to two streams.

Nothing here is as long as the set: tables have a row for each shard, and the windows.
Shapes: n shards, M images, S streams of L images, w images of a window, B images of a batch, of
which each stream gives b.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from moco.random import combine, permutation, permutations, stream_id, uniform


class Line(NamedTuple):
    """The pieces of an epoch in the order of reading, stream after stream.

    Attributes:
        shard: Of each piece.
        first: Row in the set of its first image.
        begin: Its place on the line; stream s begins at s * L.
    """

    shard: Tensor
    first: Tensor
    begin: Tensor


class Order:
    """Global batches of a sharded set.

    Args:
        counts: n int64, the images of each shard.
        seed: Of the run.
        streams: Most streams; taken is the largest number of them that divides the batch.
        window: w, images of a stream among which its order is shuffled.
        batch_size: B.

    Attributes:
        streams: S.
        length: L; up to S - 1 images of an epoch are left out, in each epoch others.
        share: b.
        blocks: Windows of each stream.
    """

    def __init__(
        self, counts: Tensor, seed: int, streams: int, window: int, batch_size: int
    ) -> None:
        self.seed, self.window = seed, window
        self.streams = next(s for s in range(streams, 0, -1) if batch_size % s == 0)
        self.share = batch_size // self.streams
        self.total = int(counts.sum())
        self.length = self.total // self.streams
        self.blocks = -(-self.length // window)
        self._starts = counts.cumsum(0) - counts  # row in the set of each shard's first image
        self._place = permutation(seed, "shards", 0, len(counts))  # place on the line to shard
        self._bounds = counts[self._place].cumsum(0)
        # Of an object, not of the class, so that workers of another run keep none of it alive.
        self.line = functools.lru_cache(2)(self._line)
        self._window = functools.lru_cache(4)(self._windows)

    def batch(self, epoch: int, number: int) -> Tensor:
        """Return the rows in the set of the images of a global batch, B int64 in rank order."""
        place = torch.arange(number * self.share, (number + 1) * self.share)
        parts = []
        for block in range(int(place[0]) // self.window, int(place[-1]) // self.window + 1):
            inside = place[place // self.window == block] - block * self.window
            parts.append(self._window(epoch, block)[:, inside] + block * self.window)
        places = torch.cat(parts, 1) + torch.arange(self.streams)[:, None] * self.length
        line = self.line(epoch)
        places = places.flatten()
        piece = torch.searchsorted(line.begin, places, right=True) - 1
        return line.first[piece] + places - line.begin[piece]

    def block(self, number: int) -> int:
        """Return the window in which a batch ends."""
        return ((number + 1) * self.share - 1) // self.window

    def spans(self, epoch: int, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Return what some rows of the batches of an epoch need: each piece's shard, and the first
        and last window that needs it.

        Args:
            epoch: Of the run.
            rows: Places in the global batch.
        """
        line = self.line(epoch)
        end = torch.cat([line.begin[1:], torch.tensor([self.streams * self.length])])
        stream = line.begin // self.length
        mine = (stream >= rows[0] // self.share) & (stream <= rows[-1] // self.share)
        start = stream[mine] * self.length
        first = (line.begin[mine] - start) // self.window
        return line.shard[mine], first, (end[mine] - 1 - start) // self.window

    def _line(self, epoch: int) -> Line:
        """Cut the line at the ends of shards and streams, and order each stream's pieces."""
        counter = torch.tensor([epoch])
        spare = self.total - self.streams * self.length
        shift = uniform(stream_id(self.seed, "cut"), counter, 1) * (spare + 1)
        cuts = int(shift) + torch.arange(self.streams + 1) * self.length
        inside = self._bounds[(self._bounds > cuts[0]) & (self._bounds < cuts[-1])]
        points = torch.cat([cuts, inside]).unique()
        begin, size = points[:-1], points.diff()
        at = torch.searchsorted(self._bounds, begin, right=True)
        shard = self._place[at]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), self._bounds])
        first = self._starts[shard] + begin - ends[at]
        drawn = permutations(stream_id(self.seed, "pieces"), counter, len(begin))[0]
        stream = (begin[drawn] - cuts[0]) // self.length
        drawn = drawn[torch.argsort(stream, stable=True)]
        return Line(shard[drawn], first[drawn], size[drawn].cumsum(0) - size[drawn])

    def _windows(self, epoch: int, block: int) -> Tensor:
        """Return each stream's order of the images of a window: S x w, less at a stream's end."""
        counters = combine(epoch, torch.arange(self.streams) + block * self.streams)
        size = min(self.window, self.length - block * self.window)
        return permutations(stream_id(self.seed, "window"), counters, size)
