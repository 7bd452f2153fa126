"""Faults: what endangers a run from outside or by its numbers, each told in one line.

`NonFiniteGuard` keeps a bad step from touching anything, `fetched` watches worker processes,
`RankLauncher` watches the other ranks, `explain` turns what a library raised into a `RunError`.
docs/faults.md lists every fault, what happens, and the test that provokes it.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader

from moco import distributed
from moco.config import DataConfig, RunError, UserError
from moco.decode import one_line, shown
from moco.rundir import last_whole
from moco.sources import ImageSource

log = logging.getLogger("moco")
PREFETCH = 4  # batches that each worker holds ready
STOPPED = (130, 138, 143)  # exit codes of a rank that was asked to stop
COLLAPSED, COLLAPSED_READINGS = 0.05, 20  # spread, and readings in a row; an even sphere has 1
SHARED_MEMORY = Path("/dev/shm")


class NonFiniteGuard(pl.Callback):
    """Leave a step out whose loss or gradient is not finite; stop, or go on up to `allowed` times.

    The device decides, and the host reads the count where it waits for the device anyway: at a
    reading and before a checkpoint (on a CPU after every step). Until then bad steps change
    nothing: fused optimisers skip an update whose `found_inf` is 1, BatchNorm's statistics are put
    back, and the queue refuses keys that are not finite.

    Args:
        allowed: Steps of the run that may be left out.
        run_dir: Where the last good checkpoint is looked for.
    """

    def __init__(self, allowed: int, run_dir: Path) -> None:
        self.allowed, self.run_dir = allowed, run_dir
        self._skipped = self._told = 0  # a tensor on the device once training has started
        self._first: Any = -1
        self._rates: dict[int, float] = {}
        self._before: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Move the counters to the device, and list what is judged and what is put back."""
        self._parameters = list(module.query_encoder.parameters())
        self._told = int(self._skipped)
        self._skipped = torch.tensor(self._told, device=module.device)
        self._first = torch.tensor(-1, device=module.device)
        self._stats = [
            buffer
            for encoder in (module.query_encoder, module.key_encoder)
            for buffer in encoder.buffers()
            if buffer.is_floating_point()
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember BatchNorm's statistics as they were before this optimiser step."""
        if batch_idx % module.accumulate == 0 and self._stats:
            self._before = torch.cat([buffer.flatten() for buffer in self._stats])

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the step on the device, alike on all ranks, and take back what it changed."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        sound = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if not optimizer.state and not sound:
            # Once per run the host asks: a first update that is skipped on the device would leave
            # SGD's momentum uninitialised (torch 2.15, optim/sgd.py, is_first_step).
            for parameter in self._parameters:
                parameter.grad = None
        # A gradient scaler raises its scale until gradients overflow: there the loss alone counts.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad = (module.bad_losses > 0) if scaled else (module.bad_losses > 0) | ~sound
        module.bad_losses.zero_()
        found = bad.float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        optimizer.found_inf = found
        bad = found > 0
        self._rates[trainer.global_step + 1] = optimizer.param_groups[0]["lr"]
        self._first = torch.where(bad & (self._first < 0), trainer.global_step + 1, self._first)
        self._skipped += bad
        if self._before is not None and (bad.device.type != "cpu" or bad):
            after = torch.cat([buffer.flatten() for buffer in self._stats])
            kept = torch.where(bad, self._before, after)
            torch._foreach_copy_(self._stats, kept.split([b.numel() for b in self._stats]))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Read the count where it costs nothing."""
        if module.wants_metrics or module.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Fetch the count; raise RunError when more steps were bad than are allowed."""
        skipped = int(self._skipped)
        rates, self._rates = self._rates, {}
        if skipped == self._told:
            return
        self._told, step = skipped, int(self._first)
        self._first.fill_(-1)
        what = f"loss or gradient is not finite at step {step} (lr {rates.get(step, math.nan):g})"
        if skipped > self.allowed:
            raise self._error(what)
        log.warning("%s: left out, %d of %d that are allowed", what, skipped, self.allowed)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Let nothing but finite numbers into a checkpoint: the last one is always a good one."""
        if isinstance(self._skipped, Tensor):
            self.read()
        state = [v for v in module.state_dict().values() if v.is_floating_point()]
        if not torch.stack(torch._foreach_norm(state)).isfinite().all():
            raise self._error(f"weights are not finite after step {trainer.global_step}")

    def _error(self, what: str) -> RunError:
        last = last_whole(self.run_dir)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return RunError(
            f"{what}, {good}: start anew with a lower optim.lr or more optim.warmup_epochs, or "
            f"leave such steps out with --resume {self.run_dir} --run.skip_nonfinite N"
        )

    def state_dict(self) -> dict[str, int]:
        """Keep the count through a resume."""
        return {"skipped": int(self._skipped)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take it back."""
        self._skipped = state["skipped"]


class Watch(pl.Callback):
    """At each reading, agree on bad files, and warn once when the embeddings have collapsed."""

    def __init__(self, bad: BadFiles) -> None:
        self.bad = bad
        self._low = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Look at the newest reading; every rank comes here at the same step."""
        if not module.wants_metrics:
            return
        self.bad.agree()
        spread = float(module.metrics["train/spread"])
        self._low = self._low + 1 if spread < COLLAPSED else 0
        if self._low == COLLAPSED_READINGS and trainer.is_global_zero:
            log.warning(
                "collapse: train/spread is %.3f after step %d and has been below %g for %d "
                "readings, so all images look alike to the encoder. Likely causes: optim.lr too "
                "high, model.key_momentum too low (0.99 and more), model.temperature too high, a "
                "model.queue_size or data.batch_size too small, or views that leave nothing to "
                "tell apart (data.crop_min, blank images)",
                spread,
                trainer.global_step,
                COLLAPSED,
                COLLAPSED_READINGS,
            )


# Files and worker processes


class BadFiles:
    """Streamed files that could not be read: counted, named once, and an error above a share.

    Args:
        source: The images.
        most: Share of them that may be bad.
        report_path: File with path, tab, reason per line; None for the log alone.
    """

    def __init__(self, source: ImageSource, most: float, report_path: str | None) -> None:
        self.source, self.most, self.report_path = source, most, report_path
        self.found: dict[int, str] = {}
        self._told: set[int] = set()

    def note(self, bad: list[tuple[int, str]]) -> None:
        """Remember what a batch met; without other ranks, tell it at once."""
        self.found.update(bad)
        if distributed.world_size() == 1:
            self.tell()

    def agree(self) -> None:
        """Tell what any rank has met; every rank calls this at the same step."""
        if distributed.world_size() == 1 or self.source.images is not None:
            return
        found: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(found, self.found)
        for part in found:
            self.found |= part
        self.tell()

    def tell(self) -> None:
        """Name the new ones; raise UserError when there are too many."""
        new = [index for index in self.found if index not in self._told]
        if not new:
            return
        self._told.update(new)
        if distributed.rank() == 0:
            self._write(new)
        first = shown(self.source.paths[new[0]])
        share = len(self.found) / len(self.source)
        count = f"{len(self.found)} of {len(self.source)} images"
        what = f"{count} of {self.source.name} cannot be read"
        if share > self.most:
            listed = f" (all are listed in {self.report_path})" if self.report_path else ""
            raise UserError(
                f"{what}, {100 * share:.3g} %, first {first}: {self.found[new[0]]}{listed}: mend "
                f"them and go on with --resume, or raise data.max_bad_fraction (now {self.most:g})"
            )
        log.warning("%s: %s is left out: %s", what, first, self.found[new[0]])

    def _write(self, new: list[int]) -> None:
        if self.report_path is None:
            return
        lines = [f"{one_line(self.source.paths[i])}\t{self.found[i]}\n" for i in new]
        try:
            with open(self.report_path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(lines)
        except OSError as error:
            log.warning("%s was not written: %s", self.report_path, error.strerror)


class _Fetching:
    """Whether the main thread waits for a worker now, and until when: only there may a worker's
    death or silence raise.
    """

    now = late = False
    deadline = float("inf")
    watched = False


def fetched(loader: DataLoader, timeout: float) -> Iterator[Any]:
    """Iterate a DataLoader; what befalls its workers is raised between batches, as a RunError.

    torch's own handler of a worker's death raises wherever the main thread stands, also in the
    middle of a step, and its timeout does not end a wait for the rest of a half written batch.

    Args:
        timeout: Seconds to wait for a batch; 0: for ever.
    """
    iterator = iter(loader)
    workers = getattr(iterator, "_workers", [])
    if workers and threading.current_thread() is threading.main_thread():
        _take_over()
    while True:
        try:
            _Fetching.deadline = time.monotonic() + timeout if timeout and workers else float("inf")
            _Fetching.now = True
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("DataLoader worker exited unexpectedly")
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            _Fetching.now = False
            raise _worker_error(error, workers) from error
        finally:
            _Fetching.now = _Fetching.late = False
        yield batch


def _take_over() -> None:
    """Let a worker's death raise only while a batch is awaited, and watch the time.

    At every start: Lightning puts all handlers back at the end of a run, torch sets its own once.
    """
    signal.signal(signal.SIGCHLD, _when_fetching)
    if not _Fetching.watched:
        _Fetching.watched = True
        threading.Thread(target=_watch_time, args=(threading.get_ident(),), daemon=True).start()


def _when_fetching(number: int, frame: Any) -> None:
    if _Fetching.now and _Fetching.late:
        raise RuntimeError("DataLoader worker timed out")
    if _Fetching.now:
        _error_if_any_worker_fails()


def _watch_time(main: int) -> None:
    while True:
        time.sleep(0.5)
        if _Fetching.now and time.monotonic() > _Fetching.deadline:
            _Fetching.late = True
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


# Ranks


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of one process per device, which names a rank that dies.

    Lightning's own observer kills everything, this process too, without a word.
    """

    @classmethod
    def replace(cls, strategy: Any) -> None:
        """Take the place of Lightning's launcher, where there is one."""
        theirs = strategy.launcher
        if isinstance(theirs, _SubprocessScriptLauncher):
            strategy._launcher = cls(
                theirs.cluster_environment, theirs.num_processes, theirs.num_nodes
            )

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kw: Any):
        """Start and watch the other ranks, or watch rank 0, and run `function`."""
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        if not self.cluster_environment.creates_processes_externally:
            os.environ["MOCO_LAUNCHER"] = str(os.getpid())
            self._call_children_scripts()
            threading.Thread(target=_watch_children, args=(self.procs,), daemon=True).start()
        elif os.environ.get("MOCO_LAUNCHER") == str(os.getppid()):
            threading.Thread(target=_watch_parent, daemon=True).start()
        return function(*args, **kw)


def _watch_children(children: list[subprocess.Popen]) -> None:
    """End this process and the other ranks when a rank has ended badly."""
    while any(child.poll() is None for child in children):
        end_if_dead(children)
        time.sleep(0.5)
    end_if_dead(children)


def end_if_dead(children: list[subprocess.Popen]) -> None:
    """Name the first rank that died and end all others with exit code 1."""
    for rank, child in enumerate(children, 1):
        code = child.poll()
        if not code or code in STOPPED:
            continue
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(
            f"error: rank {rank} (process {child.pid}) {how}, so the others are ended: go on with "
            "--resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        for other in children:
            other.kill()
        os._exit(1)


def _watch_parent() -> None:
    """End this rank when rank 0, which started it, is gone: its collectives may wait for ever."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    print("error: rank 0 died, so this rank ends", file=sys.stderr, flush=True)
    os._exit(1)


def free_port() -> None:
    """Replace a MASTER_PORT that is taken; without one Lightning finds a free port by itself."""
    wanted = os.environ.get("MASTER_PORT", "")
    if not wanted.isdigit() or "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted)))
            return
        except (OSError, OverflowError):
            probe.bind(("", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    log.info("MASTER_PORT %s is taken: %s is used", wanted, os.environ["MASTER_PORT"])


# What libraries raise


def explain(error: Exception, trainer: pl.Trainer, module: Any, data: DataConfig) -> Exception:
    """Turn what a library raised during training into a RunError; other errors stay."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        share = data.batch_size // trainer.world_size
        fits = fitting_batch(trainer, module, share, data) * trainer.world_size
        advice = f"about {fits} would fit" if fits else "not even a small one would fit"
        return RunError(
            f"out of memory on {module.device} with data.batch_size {data.batch_size}, {share} per "
            f"device: {advice}; or set trainer.precision bf16-mixed, a smaller model.backbone, or "
            "a smaller batch with trainer.accumulate_grad_batches",
            local=True,
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return RunError(
            f"memory ran out with data.batch_size {data.batch_size}: lower it, data.num_workers or "
            "data.resident_budget, or set data.resident off",
            local=True,
        )
    lost = ("onnection closed", "onnection reset", "Broken pipe", "NCCL", "gloo")
    if trainer.world_size > 1 and any(words in text for words in lost):
        for _ in range(20):  # the launcher, if it is ours, can tell which
            end_if_dead(getattr(trainer.strategy.launcher, "procs", []))
            time.sleep(0.1)
        return RunError(
            f"another rank died or cannot be reached ({text[:120]}): go on with --resume from the "
            "last checkpoint",
            local=True,
        )
    return error


def fitting_batch(trainer: pl.Trainer, module: Any, tried: int, data: DataConfig) -> int:
    """Measure what batch per device fits: a step's memory grows with the batch along a line.

    The run has failed, so gradients are thrown away. 0 where not even an eighth fits.
    """
    module.zero_grad(set_to_none=True)
    small, large = max(2, tried // 8), max(4, tried // 4)
    try:
        low, high = (peak_memory(trainer, module, count, data) for count in (small, large))
    except torch.OutOfMemoryError:
        return 0
    slope = max(high - low, 1) / (large - small)
    most = small + (0.9 * device_memory(module.device) - low) / slope
    return max(small, min(int(most), tried - 1) // 8 * 8)


def peak_memory(trainer: pl.Trainer, module: Any, count: int, data: DataConfig) -> int:
    """Return the bytes that a forward and a backward pass on `count` images take at most."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(module.device)
    size = data.image_size
    images = torch.zeros(count, data.channels, size, size, device=module.device)
    with trainer.precision_plugin.forward_context():
        with torch.no_grad():
            module.key_encoder(images)
        module.query_encoder(images).float().sum().backward()
    module.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(module.device)


def device_memory(device: torch.device) -> int:
    """Return the bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory
