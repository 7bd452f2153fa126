"""Saving: when a run writes checkpoints, and how it stops on a signal.

`moco.training.writing` writes them. They hold plain types only and load with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from moco import distributed, slurm
from moco.config import RunConfig, RunError, TrainConfig, UserError
from moco.run_directory import BEFORE_DECAY, BEST
from moco.training.agreement import Agreement
from moco.training.decide import Decided
from moco.training.metrics import MetricsLogger
from moco.training.quality import Quality
from moco.training.writing import AtomicCheckpointIO, name_besides, why_not

log = logging.getLogger("moco")
# Signals that stop a run; where several come, the last in this list decides the exit code. SLURM
# sends SIGUSR1 ahead of a preemption (sbatch --signal=USR1@60) and may send SIGTERM after it.
# SIGHUP says that the terminal is gone.
STOPPING = (0, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)


class Signals(pl.Callback):
    """Note which stopping signal has come.

    It is the first callback, since others may take minutes before the first step.

    Attributes:
        came: The signal, or 0.
    """

    def __init__(self) -> None:
        self.came = 0
        self._answers = self._has_begun = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Handle the signals; Lightning restores the handlers from before the run at its end.

        Python allows it in the main thread alone: a run in another thread, as in a notebook or a
        server, is left to its caller.
        """
        self._answers = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING[2:]:
                if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # nohup
                    signal.signal(number, self._note)

    def on_train_batch_start(self, *args: Any) -> None:
        """Handle Ctrl-C from the first step on: before it there is nothing to wait for."""
        if not self._has_begun and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
        self._has_begun = True

    def on_train_end(self, *args: Any) -> None:
        """Note that the state is saved: a restart would find nothing more to do."""
        slurm.restartable = False

    def _note(self, number: int, frame: Any) -> None:
        if self.came == number == signal.SIGINT:
            raise KeyboardInterrupt  # the user has pressed Ctrl-C twice and will not wait
        self.came = max(self.came, number, key=STOPPING.index)
        if self._answers:
            again = "; Ctrl-C again stops now" if number == signal.SIGINT else ""
            line = f"finishing the step, then saving{again}\n"
            # Python's own files refuse to be written to in the middle of a write to them. On a
            # terminal the cursor stands behind the bar.
            os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}".encode())


class Checkpoints(pl.Callback):
    """Save after chosen steps; stop after the step in which a signal came, and save then too.

    Args:
        signals: Tells which signal came.
        metrics: Its clock stops while a checkpoint is written.
        quality: Tells whether a reading is the best so far.
        directory: Of the checkpoints.
        config: Says when, and how many of the newest stay.
        before_decay: A step after which the checkpoint stays as before_decay.ckpt; 0: none.
        extras: Stored in each checkpoint: name to plain values, such as the settings.
        agreement: Of the ranks.

    Attributes:
        stop_signal: The signal that came on any rank, or 0.
        seconds: Time for which saving has held up training.
        saved_step: Optimiser steps in the newest checkpoint that this process has written.
    """

    def __init__(
        self,
        signals: Signals,
        metrics: MetricsLogger,
        quality: Quality,
        directory: Path,
        config: RunConfig,
        before_decay: int,
        extras: dict[str, Any],
        agreement: Agreement,
    ) -> None:
        self.signals, self.metrics = signals, metrics
        self.quality, self.agreement = quality, agreement
        self.directory, self.config = directory, config
        self.before_decay, self.extras = before_decay, extras
        self.stop_signal, self.saved_step = 0, 0
        self._tried = 0  # the last step after which it was to be saved
        self.seconds = 0.0
        self._in_step = False
        self._saved_at = time.monotonic()
        self._saves = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remove what a killed run left half written, and begin to agree with the other ranks."""
        self._saved_at = time.monotonic()
        self.saved_step = self._tried = trainer.global_step
        if trainer.is_global_zero:
            for leftover in self.directory.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        self.agreement.open(trainer)

    def on_train_batch_start(self, *args: Any) -> None:
        """Note that weights and counters are about to change."""
        self._in_step = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an optimiser step if it is time to."""
        last_batch = batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last_batch:
            return
        step = trainer.global_step
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        due = step % every == 0 if every > 0 else every < 0 and last_batch
        late = 0 < 60 * minutes <= time.monotonic() - self._saved_at
        came = STOPPING.index(self.signals.came)
        wanted = self._saves + 1 if late else 0  # the number of the save that the clock asks for
        # Several ranks get the answer of the step before, whose save may have been made meanwhile.
        signal_place, wanted = self.agreement.largest_before(came, wanted)
        finished = step >= module.total_steps
        self.stop_signal = 0 if finished else STOPPING[signal_place]
        kept = self.quality.is_best or step == self.before_decay
        if due or wanted > self._saves or self.stop_signal or finished or kept:
            self.save(trainer)
        self._in_step = False
        if self.stop_signal or finished:
            trainer.strategy.checkpoint_io.wait()
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save where another callback has stopped the run after a step of this epoch."""
        if trainer.should_stop:
            self._save_the_end(trainer)

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Take the last answer of the ranks, so that none is left waiting, and end what is written.

        Another callback may have stopped or shortened the run at the end of an epoch.
        """
        self._save_the_end(trainer)
        self.agreement.close()
        trainer.strategy.checkpoint_io.wait()

    def _save_the_end(self, trainer: pl.Trainer) -> None:
        """Save a run that ends unless its last step is saved, or was to be."""
        if self._tried < trainer.global_step:
            self.save(trainer)

    def store_length(self, step: int, config: TrainConfig, decided: Decided) -> None:
        """Keep the checkpoint of this step, from which the rate falls, and store other settings."""
        self.before_decay = step
        self.extras |= {"config": asdict(config), "decided": asdict(decided)}

    def save(self, trainer: pl.Trainer) -> None:
        """Write step_N.ckpt, point last.ckpt to it, and remove old ones."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()  # the steps before are still computed: that is no saving
        start, self._tried = time.monotonic(), trainer.global_step
        path = self.directory / f"step_{trainer.global_step:09d}.ckpt"
        names = [BEST] if self.quality.is_best else []
        names += [BEFORE_DECAY] if trainer.global_step == self.before_decay else []
        trainer.save_checkpoint(path, storage_options=partial(self._tidy, names))
        if not trainer.is_global_zero:
            self.saved_step = trainer.global_step
        self._saves += 1
        self._saved_at = time.monotonic()
        self.seconds += self._saved_at - start
        self.metrics.paused += self._saved_at - start

    def _tidy(self, names: list[str], path: Path) -> None:
        """Note that a checkpoint is written: on rank 0, which alone writes, by its thread.

        Args:
            names: What it is besides the last one; decided when its state was taken.
            path: Its file.
        """
        last = self.directory / "last.ckpt"
        self.saved_step = int(path.stem.removeprefix("step_"))
        try:
            for name in (*names, last.name):
                name_besides(path, self.directory / name)
            # By age: steps of an earlier attempt may be higher, and must not outlive this one's.
            steps, keep = self.directory.glob("step_*.ckpt"), self.config.keep_checkpoints
            for old in sorted(steps, key=lambda step: step.stat().st_mtime_ns)[:-keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays as it was: %s", last, why_not(error, self.directory))

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Save what an error between two steps would lose; within a step nothing whole is there.

        Several ranks save only after an error that all of them raise, as they save together.
        """
        writer = trainer.strategy.checkpoint_io
        if not isinstance(writer, AtomicCheckpointIO):
            return  # the Trainer is another's, and the error came before the run was prepared
        writer.wait()
        known = isinstance(exception, UserError | RunError) and not getattr(exception, "local", 0)
        between = not self._in_step and trainer.global_step > self.saved_step
        if not between or (trainer.world_size > 1 and not known):
            return
        try:
            self.save(trainer)
            writer.wait()
        except RunError as error:  # numbers that are not finite
            log.warning("not saved after step %d: %s", trainer.global_step, error)
        if self.saved_step == trainer.global_step:
            log.info("saved after step %d: go on with --resume", trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Store the settings beside the weights, and counters that a second resume can trust."""
        checkpoint.update(self.extras)
        loop = checkpoint["loops"]["fit_loop"]
        checkpoint["epoch"] = set_counters(loop, trainer.num_training_batches)


def end_together() -> None:
    """Wait after a signal until rank 0 has saved: the first end has torchrun end the other ranks.

    A further signal ends none of those that wait, and one that has gone keeps no result back.
    """
    waits = distributed.rank() > 0 and threading.current_thread() is threading.main_thread()
    ignored = {n: signal.signal(n, signal.SIG_IGN) for n in STOPPING[2:]} if waits else {}
    with contextlib.suppress(RuntimeError):  # torch's, where a rank was killed
        distributed.from_first(lambda: None)
    for number, handler in ignored.items():
        signal.signal(number, handler or signal.SIG_DFL)


def set_counters(loop: dict[str, Any], batches: int) -> int:
    """Set Lightning's counters to those of a run that never stopped; return its whole epochs.

    After a resume from the end of an epoch Lightning 2.6 counts one epoch too few, so that a second
    resume loses its place. The number of batches that the run has taken gives all counters.

    Args:
        loop: State of the fit loop after the last batch of an optimiser step; changed in place.
        batches: Per epoch.
    """
    taken = loop["epoch_loop.batch_progress"]["total"]["ready"]
    epoch, here = (taken - 1) // batches, (taken - 1) % batches + 1
    loop["epoch_loop.batch_progress"] = {
        "total": _counts(taken, taken - 1),
        "current": _counts(here, here - 1),
        "is_last_batch": here == batches,
    }
    started = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    loop["epoch_progress"] = {"total": dict(started), "current": dict(started)}
    return taken // batches


def _counts(taken: int, completed: int) -> dict[str, int]:
    return {"ready": taken, "started": taken, "processed": taken, "completed": completed}
