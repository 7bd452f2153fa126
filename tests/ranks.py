"""Real gloo ranks for tests: a pool of processes that each run a function and return its result."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import FORKS, LIMIT_S, forget_start_method


class Ranks:
    """A pool of `world` processes in one gloo group; each runs the same function."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        for rank in range(self.world):
            here, there = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, self.world, str(store), there))
            process.daemon = True
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function(*args)` gives on each rank; raise what any of them raised."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(LIMIT_S):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {LIMIT_S} s")
            good, value = pipe.recv()
            if not good:
                self.close()
                raise AssertionError(f"rank {rank} raised:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        """End the processes; the next run starts new ones."""
        if not self.processes:
            return
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()
        self.pipes, self.processes = [], []


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    forget_start_method()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    while True:
        function, args = pipe.recv()
        os.chdir(Path(store).parent)  # the folder of the test before is gone
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
