"""Cores that other programs use too: a run notices it, says so, and lets its threads sleep sooner.

torch's threads are those of GNU's OpenMP library. At the end of a parallel part, of which a step
has many, a thread spins for some milliseconds until the last one comes, and only then sleeps. Alone
that is fast. Where another program has the core of the last one, the others spin for nothing, and
it counts as their share of the cores. With more threads than cores the library spins 100 times in
the place of 300,000 (its manual, GOMP_SPINCOUNT), and threads that are idle count. So a run beside
others starts some idle threads and ends them when the cores are free. As many as before compute, so
every result stays the same, bit for bit; with another number of threads it would not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

log = logging.getLogger("moco")
WINDOW_S = 2.0  # between two looks
# The main thread's share of time in which it could run and had no core. Alone it was 2 to 11 %,
# beside two busy loops on two cores 43 to 54 % (BENCHMARKS.md).
SHARED = 0.2
# Seconds after which the run tries whether the cores are free: the longer, the more often in a row
# they were not, since beside many others that costs a slow step.
FIRST_TRY_S, LAST_TRY_S = 20.0, 320.0
SET_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


class SharedCores(pl.Callback):
    """Look every few seconds whether the run has to wait for a core, and act on it.

    Attributes:
        idle: Threads that are there to be counted.
    """

    def __init__(self) -> None:
        self.idle: list[IdleThreads] = []
        self._mark = time.monotonic(), seconds_without_core()
        self._since, self._try_after = 0.0, FIRST_TRY_S
        self._is_told = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Look at what came before the first step, which takes long where the cores are shared."""
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Look, if it is time to."""
        now = time.monotonic()
        if now - self._mark[0] < WINDOW_S:
            return
        waited = seconds_without_core()
        window, share = now - self._mark[0], (waited - self._mark[1]) / (now - self._mark[0])
        self._mark = now, waited
        if self.idle:
            if now - self._since > self._try_after:
                self._end()
                self._try_after = min(2 * self._try_after, LAST_TRY_S)
        elif share <= SHARED:
            self._try_after = FIRST_TRY_S
        else:
            self._since = now
            if module.device.type == "cpu":
                self.idle = [IdleThreads() for _ in range(teams_to_outnumber_cores())]
            if not self._is_told and trainer.is_global_zero:
                log.info(
                    "the cores are shared: this run waited %.0f %% of the last %.0f s for one, "
                    "which other programs or its own workers had",
                    100 * share,
                    window,
                )
                self._is_told = True

    def _end(self) -> None:
        for threads in self.idle:
            threads.end()
        self.idle = []

    def on_train_end(self, *args: Any) -> None:
        """End the idle threads."""
        self._end()

    def on_exception(self, *args: Any) -> None:
        """End the idle threads."""
        self._end()


class IdleThreads:
    """A thread with an OpenMP team of its own, which has computed once and then only waits."""

    def __init__(self) -> None:
        self._is_over, is_there = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._wait, args=(is_there,), daemon=True)
        self._thread.start()
        is_there.wait()

    def _wait(self, is_there: threading.Event) -> None:
        torch.zeros(2**16 * torch.get_num_threads()).add_(1)  # large enough for the whole team
        is_there.set()
        self._is_over.wait()

    def end(self) -> None:
        """End the thread; the library ends its team with it."""
        self._is_over.set()
        self._thread.join()


def teams_to_outnumber_cores() -> int:
    """Return how many more teams make more threads than there are cores.

    It is none where a single thread computes, and where the user has said how long threads spin.
    """
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if threads == 1 or threads > cores or any(name in os.environ for name in SET_BY_USER):
        return 0
    return (cores - threads) // (threads - 1) + 1


def seconds_without_core() -> float:
    """Return how long the main thread could have run and had no core; 0 where Linux is not."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0
