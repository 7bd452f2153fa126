"""Saving: checkpoints that are whole or absent, when they are written, and stopping on a signal.

A checkpoint is written beside its place and moved there, so a kill or a full disk leaves the one
before. It holds plain types only and loads with ``weights_only=True``.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger("moco")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write next to the target, flush to disk, then replace; on failure keep the old file and go
    on.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`; a failure is logged and not raised: other ranks wait at a
        barrier.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch.save on a full disk raises RuntimeError
            temporary.unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:200]
            log.warning("checkpoint %s was not written, the one before stays: %s", target, reason)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: Any = True
    ) -> Any:
        """Read without unpickling code, whatever the caller or the environment says."""
        return torch.load(path, map_location=map_location, weights_only=True)


class Checkpoints(pl.Callback):
    """Save after chosen steps, and after the step in which SIGTERM or SIGINT came; then stop.

    Args:
        directory: Of the checkpoints.
        every: Steps between checkpoints; 0: at the end of each epoch.
        minutes: Between checkpoints besides; 0: none.
        keep: How many of the newest stay.
        config: Stored in each checkpoint as a plain dict.

    Attributes:
        stop_signal: The signal that came, or 0.
        seconds: Time spent saving.
    """

    def __init__(
        self, directory: Path, every: int, minutes: float, keep: int, config: dict[str, Any]
    ) -> None:
        self.directory, self.every, self.minutes, self.keep = directory, every, minutes, keep
        self.config = config
        self.stop_signal = 0
        self.seconds = 0.0
        self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take over the signals, and clear what a killed run left half written."""
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            for leftover in self.directory.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.stop_signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Save if it is time to, at the ends of optimiser steps only."""
        last_batch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if (args[2] + 1) % trainer.accumulate_grad_batches and not last_batch:
            return
        step = trainer.global_step
        self.stop_signal = self._agree(trainer, self.stop_signal)
        due = step % self.every == 0 if self.every else last_batch
        if self.minutes:
            elapsed = time.monotonic() - self._saved_at
            due = bool(self._agree(trainer, due or elapsed >= 60 * self.minutes))
        if due or self.stop_signal or step >= module.total_steps:
            self.save(trainer)
        if self.stop_signal:
            trainer.should_stop = True

    @staticmethod
    def _agree(trainer: pl.Trainer, value: int) -> int:
        """Take the largest value of all ranks, so that all of them save and stop together."""
        if trainer.world_size == 1:
            return int(value)
        tensor = torch.tensor(int(value), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def save(self, trainer: pl.Trainer) -> None:
        """Write step_N.ckpt, point last.ckpt to it, and remove old ones."""
        start = time.monotonic()
        path = self.directory / f"step_{trainer.global_step:09d}.ckpt"
        trainer.save_checkpoint(path)
        self._tidy(path)
        self._saved_at = time.monotonic()
        self.seconds += self._saved_at - start

    @rank_zero_only
    def _tidy(self, path: Path) -> None:
        if not path.is_file():
            return
        last, temporary = self.directory / "last.ckpt", self.directory / ".last.ckpt.tmp"
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)  # one file under two names: no second copy
        os.replace(temporary, last)
        for old in sorted(self.directory.glob("step_*.ckpt"))[: -self.keep]:
            old.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Store the settings with the weights."""
        checkpoint["config"] = self.config

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
