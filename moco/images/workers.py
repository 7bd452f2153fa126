"""Worker processes that decode: how many fit, and what becomes of one that dies or hangs.

Workers ignore the signals that stop a run. No images and no tensors in this room.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from moco import distributed
from moco.config import DataConfig, RunError, UserError

log = logging.getLogger("moco")
PREFETCH = 4  # batches that each worker holds ready
SHARED_MEMORY = Path("/dev/shm")


def worker_loader(
    dataset: Dataset, config: DataConfig, persistent: bool = False, **options: Any
) -> DataLoader:
    """Build a DataLoader with as many workers as fit; iterate it by `fetched`.

    Args:
        config: Tells how many there are.
        persistent: Whether they live from epoch to epoch, with PREFETCH batches ready.
        options: Further arguments of DataLoader.
    """
    count = worker_count(config)
    if persistent and count:
        options |= {"persistent_workers": True, "prefetch_factor": PREFETCH}
    return DataLoader(_Told(dataset), num_workers=count, worker_init_fn=_set_up, **options)


class _Told(Dataset):
    """A dataset whose workers hand over a RunError or UserError as it is, without a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: Any) -> Any:
        try:
            return self.dataset.__getitems__(batch)
        except (RunError, UserError) as error:
            return error


def fetched(
    loader: DataLoader, timeout: float, begun: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """Iterate a DataLoader; what befalls its workers is raised between batches, as a RunError.

    A DataLoader looks every five seconds whether its workers live. Its own timeout is of no use
    where a worker hangs (docs/faults.md): it does not end the wait for a tensor that a stopped
    worker has announced and does not hand over. So a timer kills late workers, which ends any wait.

    Args:
        loader: From `worker_loader`.
        timeout: Seconds to wait for a batch; 0: for ever.
        begun: Called when the workers run, before the first batch is waited for.
    """
    late = threading.Event()
    before = signal.getsignal(signal.SIGCHLD)
    # Persistent workers of the epoch before are waited for here.
    iterator = _awaited(lambda: iter(loader), _workers(loader), timeout, late)
    _remove_handler(before)
    begun()
    workers = getattr(iterator, "_workers", [])
    while True:
        try:
            batch = _awaited(lambda: next(iterator), workers, timeout, late)
        except StopIteration:
            return
        if isinstance(batch, RunError | UserError):
            raise batch
        yield batch


def _remove_handler(before: Any) -> None:
    """Put `before` in the place of torch's handler of SIGCHLD, whichever loader brought it.

    That handler raises wherever the main thread stands when a worker dies, also in the middle of a
    step, where the state that is then saved is in motion (docs/faults.md).
    """
    now = signal.getsignal(signal.SIGCHLD)
    is_torchs = (getattr(now, "__module__", None) or "").startswith("torch.")
    if is_torchs and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before in (now, None) else before)


def _awaited(
    call: Callable[[], Any], workers: list[Any], timeout: float, late: threading.Event
) -> Any:
    """Return what `call` waits for; raise RunError if the workers that deliver it die or hang."""
    timer = threading.Timer(timeout, _kill, [workers, late])
    if timeout and workers:
        timer.start()
    try:
        return call()
    except (RuntimeError, OSError, EOFError) as error:
        raise _worker_error(error, workers, late.is_set()) from error
    finally:
        timer.cancel()


def _kill(workers: list[Any], late: threading.Event) -> None:
    late.set()
    for worker in workers:
        worker.kill()


def _workers(loader: DataLoader | None) -> list[Any]:
    """Return the processes of a loader's persistent workers: torch has no public name for them."""
    return getattr(getattr(loader, "_iterator", None), "_workers", [])


def as_it_is(batch: Any) -> Any:
    """Collate nothing: return what the dataset made of a batch."""
    return batch


def end_workers(loader: DataLoader | None) -> None:
    """Kill a loader's workers: one that hangs would hold the exit up for ever."""
    _remove_handler(signal.SIG_DFL)  # Lightning puts back the handlers of before the run
    for worker in _workers(loader):
        worker.kill()


def _set_up(worker: int) -> None:
    """Leave stopping to the main process: a signal to the whole group must not cost its step."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # what is garbage in the main process, as an earlier run's loaders, is its own
    sys.excepthook = _tell_unless_left


def _tell_unless_left(kind: type, error: BaseException, trace: Any) -> None:
    """Print a traceback, unless the main process went away while a worker handed it a tensor.

    The thread of multiprocessing that hands tensors over is the only one that calls this hook.
    """
    if not issubclass(kind, OSError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _worker_error(error: Exception, workers: list[Any], late: bool) -> Exception:
    """Say which worker did what, and what to set; other errors stay what they are."""
    text = str(error)
    # One just killed has no exit code yet; where it was handing a tensor over, it must be dead.
    seconds = 5.0 if isinstance(error, ConnectionError | EOFError) else 0.1
    ended = wait([worker.sentinel for worker in workers], seconds)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(5)  # its pipes close before its exit code can be read
    dead = {worker.pid: worker.exitcode for worker in workers if worker.exitcode}
    for worker in workers:
        worker.kill()
    if late:
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
    if not dead:
        return error
    how = f"ended with exit code {code}, and its own words stand above"
    why = "a script that starts workers by spawn needs `if __name__ == '__main__':`"
    if code < 0:
        how = f"was killed by signal {-code}"
        why = "signal 9 mostly means that memory ran out: lower data.num_workers"
    return RunError(
        f"a worker process ({pid}, one of {len(workers)} that decode images) {how}: {why}, or set "
        "data.num_workers 0 to decode in this process",
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
        count = max(1, _own_cores() // local)
    return fitting_workers(config, count, local, world)


def _own_cores() -> int:
    """Return the cores that this process may use, in a container perhaps few of the machine."""
    known = hasattr(os, "sched_getaffinity")  # of Linux
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def fitting_workers(config: DataConfig, count: int, local_ranks: int, world: int) -> int:
    """Return how many workers of each rank fit into shared memory with the batches that they hold.

    Raises:
        UserError: `data.num_workers` was set to more.
    """
    batch = config.batch_size // world * 2 * config.channels * config.view_side**2
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
