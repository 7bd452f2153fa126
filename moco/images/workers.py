"""Worker processes that decode: how many fit, and what becomes of one that dies or hangs.

`fetched` is the only way to wait for them. It takes SIGCHLD over, so nothing else here may. Workers
themselves ignore the signals that stop a run. No images and no tensors in this room.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader

from moco import distributed
from moco.config import DataConfig, RunError, UserError

log = logging.getLogger("moco")
PREFETCH = 4  # batches that each worker holds ready
SHARED_MEMORY = Path("/dev/shm")


class _Fetching:
    """Whether the main thread waits for a worker now, and until when: only there may a worker's
    death or silence raise.
    """

    now = False
    deadline = float("inf")
    watched = False


def fetched(loader: DataLoader, timeout: float) -> Iterator[Any]:
    """Iterate a DataLoader; what befalls its workers is raised between batches, as a RunError.

    torch's own handler of a worker's death raises wherever the main thread stands, also in the
    middle of a step, and its timeout does not end a wait for the rest of a half written batch.

    Args:
        timeout: Seconds to wait for a batch; 0: for ever.
    """
    last = getattr(loader, "_iterator", None)  # of the epoch before, with the same workers
    workers = getattr(last, "_workers", [])
    main = threading.current_thread() is threading.main_thread()
    if workers and main:
        _take_over()
    iterator = _awaited(lambda: iter(loader), workers, timeout)
    workers = getattr(iterator, "_workers", [])
    if workers and main:
        _take_over()  # torch has put its own handler there
    while True:
        try:
            batch = _awaited(lambda: next(iterator), workers, timeout)
        except StopIteration:
            return
        yield batch


def _awaited(call: Callable[[], Any], workers: list[Any], timeout: float) -> Any:
    """Call what waits for workers; only meanwhile may their death or silence raise."""
    try:
        _Fetching.deadline = time.monotonic() + timeout if timeout and workers else float("inf")
        _Fetching.now = True
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("DataLoader worker exited unexpectedly")
        return call()
    except (RuntimeError, OSError) as error:
        _Fetching.now = False
        raise _worker_error(error, workers) from error
    finally:
        _Fetching.now = False


def _take_over() -> None:
    """Let a worker's death raise only while a batch is awaited, and watch the time.

    At every start: Lightning puts all handlers back at the end of a run, torch sets its own once.
    """
    signal.signal(signal.SIGCHLD, _when_fetching)
    if not _Fetching.watched:
        _Fetching.watched = True
        threading.Thread(target=_watch_time, args=(threading.get_ident(),), daemon=True).start()


def _when_fetching(number: int, frame: Any) -> None:
    if not _Fetching.now:
        return
    if time.monotonic() > _Fetching.deadline:
        raise RuntimeError("DataLoader worker timed out")
    _error_if_any_worker_fails()


def _watch_time(main: int) -> None:
    while True:
        time.sleep(0.5)
        if _Fetching.now and time.monotonic() > _Fetching.deadline:
            signal.pthread_kill(main, signal.SIGCHLD)  # a signal ends any wait


def end_workers(loader: DataLoader | None) -> None:
    """Kill a loader's workers: one that hangs would hold the exit up for ever."""
    for worker in getattr(getattr(loader, "_iterator", None), "_workers", []):
        worker.kill()


def ignore_signals(worker: int) -> None:
    """Leave stopping to the main process: a signal to the whole group must not cost its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _worker_error(error: Exception, workers: list[Any]) -> Exception:
    """Say which worker did what, and what to set; other errors stay what they are."""
    text = str(error)
    time.sleep(0.1)  # a worker that was just killed has no exit code yet
    dead = {worker.pid: worker.exitcode for worker in workers if worker.exitcode}
    for worker in workers:
        worker.kill()
    if "timed out" in text:
        return RunError(
            "no worker delivered a batch within data.worker_timeout: mend the storage, "
            "raise data.worker_timeout, or set data.num_workers 0",
            local=True,
        )
    pid, code = next(iter(dead.items()), (0, 0))
    if code == -signal.SIGBUS or "shared memory" in text or "shm" in text:
        free = free_shared_memory() / 2**20
        return RunError(
            f"shared memory is exhausted ({SHARED_MEMORY} has {free:.0f} MiB free): lower "
            "data.num_workers or data.batch_size, or give the container more (--shm-size)",
            local=True,
        )
    if "DataLoader worker" not in text or "Caught" in text:
        return error
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return RunError(
        f"worker process {pid} of {len(workers)} that decode images {how}: signal 9 mostly means "
        "that memory ran out: lower data.num_workers, or set it to 0 to decode in this process",
        local=True,
    )


def free_shared_memory() -> int:
    """Return the bytes that workers may still fill; a huge number where there is no such limit."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 2**62


def worker_count(config: DataConfig) -> int:
    """Decide how many worker processes each rank starts: what fits into shared memory."""
    world = distributed.world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    count = config.num_workers
    if count < 0:
        count = max(1, (os.cpu_count() or 1) // local)
    return fitting_workers(config, count, local, world)


def fitting_workers(config: DataConfig, count: int, local_ranks: int, world: int) -> int:
    """Return how many workers of each rank fit into shared memory with the batches that they hold.

    Raises:
        UserError: `data.num_workers` was set to more.
    """
    batch = config.batch_size // world * 2 * config.channels * config.image_size**2
    free = free_shared_memory()
    fits = min(count, int(free // (local_ranks * (PREFETCH + 1) * batch)))
    if fits == count:
        return count
    need = count * local_ranks * (PREFETCH + 1) * batch / 2**20
    what = f"{count} workers would hold {need:.0f} MiB of batches ready, {SHARED_MEMORY} has"
    if config.num_workers > 0:
        raise UserError(
            f"data.num_workers is {count}: {what} {free / 2**20:.0f} MiB free: set it to {fits}, "
            "or give the container more shared memory (--shm-size)"
        )
    log.warning("%s %.0f MiB free: %d are started", what, free / 2**20, fits)
    return fits
