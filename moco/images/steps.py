"""The loader of steps: which images each step takes, from wherever the run stands.

Shapes: N images per device, W devices, B = N*W, C channels, S side of a view.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moco import distributed
from moco.images.ahead import Ahead
from moco.images.workers import as_it_is, end_workers, fetched, worker_loader
from moco.random import permutations, stream_id

_AHEAD = 3  # steps that a GPU may be behind the loader of streamed images


@dataclass
class Indices:
    """What a loader yields: which images, and for streamed sets their cuts.

    Attributes:
        epoch, step: Of the run; the batch number counts from the run's start. They are int64
            scalars where the step is one graph.
        index: B int64, the global batch in rank order.
        crops: N x 2 x C x S x S uint8 of this rank, two cuts of each image; None for resident sets.
        size: S; 0: that of the largest views.
    """

    epoch: int | Tensor
    step: int | Tensor
    index: Tensor
    crops: Tensor | None = None
    size: int = 0


class StepLoader:
    """Yields the rest of an epoch's batches from wherever the run stands.

    Args:
        position: Tells how many batches the run has taken so far. It is asked whenever an iteration
            starts, so that a resumed epoch begins where it was left.
    """

    def __init__(self, data: Any, position: Callable[[], int]) -> None:
        self.data, self.position = data, position
        self._workers: DataLoader | None = None
        self._planned = _Shares()
        self._ahead: Ahead | None = None
        self._stream: torch.cuda.Stream | None = None
        self._begun: deque[torch.cuda.Event] = deque()  # of steps, where the GPU comes to them

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[Indices]:
        batches = self._batches(*self._place())
        if self.data.streams:
            batches = self._streamed(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            self._stay_close()
            yield batch

    def _stay_close(self) -> None:
        """Wait until the GPU is at most some steps behind, since batches that it is given take its
        memory, and those that workers have made are used up."""
        if self._stream is None:
            return
        self._begun.append(torch.cuda.current_stream(self.data.device).record_event())
        if len(self._begun) > _AHEAD:
            self._begun.popleft().synchronize()

    def _place(self) -> tuple[int, int]:
        """Return the epoch in which the run stands, and its next batch there."""
        return divmod(self.position(), len(self))

    def _batches(self, epoch: int, start: int) -> Iterator[Indices]:
        """Slice the epoch's order into global batches."""
        data, size = self.data, self.data.config.batch_size
        if data.order is not None:
            for number in range(start, len(self)):
                index = data.order.batch(epoch, number)
                step = epoch * len(self) + number
                yield Indices(epoch, step, index, size=data.view_size(epoch, number))
            return
        images = data.source.images
        resident = images is not None and images.device == data.device
        counter = torch.full((1,), epoch, device=data.device if resident else "cpu")
        # On the device from the start, so that no step copies anything there.
        order = permutations(stream_id(data.seed, "order"), counter, len(data.source))[0]
        for number in range(start, len(self)):
            index = order[number * size : (number + 1) * size]
            step = epoch * len(self) + number
            yield Indices(epoch, step, index, size=data.view_size(epoch, number))

    def _streamed(self, batches: Iterator[Indices]) -> Iterator[Indices]:
        """Have workers cut this rank's share of each batch."""
        data = self.data
        planned, self._planned.batches = itertools.tee(batches)
        if self._workers is None:
            self._workers = worker_loader(
                data.cuts(),
                data.config,
                persistent=True,
                batch_sampler=self._planned,
                pin_memory=data.device.type == "cuda",
                collate_fn=as_it_is,
            )
        self._planned.count = data.config.batch_size // distributed.world_size()
        made = fetched(self._workers, data.config.worker_timeout, self._fetch_ahead)
        for plan, (crops, bad) in zip(planned, made, strict=True):
            data.bad.note(bad)
            if self._ahead is not None:
                self._ahead.moved(plan.step % len(self))
            yield replace(plan, crops=self._copied(crops) if crops.is_pinned() else crops)

    def _copied(self, crops: Tensor) -> Tensor:
        """Copy to the GPU on a stream of its own, while the step before is still computed there."""
        self._stream = self._stream or torch.cuda.Stream(self.data.device)
        with torch.cuda.stream(self._stream):
            crops = crops.to(self.data.device, non_blocking=True)
        training = torch.cuda.current_stream(self.data.device)
        training.wait_stream(self._stream)
        crops.record_stream(training)
        return crops

    def _fetch_ahead(self) -> None:
        """Begin to fetch what the machine needs in the rest of the epoch, on its first rank."""
        data, paths = self.data, self.data.source.paths
        local, machine = distributed.own_machine()
        if data.order is None or not paths.shards[0].is_cached or local > 0:
            return
        if self._ahead is not None:
            self._ahead.close()
        count = data.config.batch_size // distributed.world_size()
        rows = range(machine[0] * count, (machine[-1] + 1) * count)
        self._ahead = Ahead(data.order, paths.shards, paths.cache, rows, *self._place())
        if not paths.come_alone:  # else the first batch has the network to itself
            self._ahead.start()

    def close(self) -> None:
        """End the workers."""
        if self._ahead is not None:
            self._ahead.close()
        end_workers(self._workers)


class _Shares:
    """This rank's shares of the batches of an epoch, as workers take them.

    Attributes:
        batches: What is left of the epoch.
        count: Images of a share.
    """

    batches: Iterable[Indices] = ()
    count = 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        for plan in self.batches:
            yield plan.epoch, distributed.local_rows(plan.index, self.count).numpy(), plan.size
