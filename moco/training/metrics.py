"""Metrics of training, as Lightning callbacks: readings for the loggers, and the progress bar.

Nothing here changes what is computed. The device computes metrics, and the host fetches them once
every few steps: that is a reading.
"""

from __future__ import annotations

import sys
import time
from itertools import accumulate
from typing import Any

import pytorch_lightning as pl
import torch

from moco import distributed
from moco.algorithm import optim
from moco.images.loader import PretrainData
from moco.log import columns, is_terminal


class MetricsLogger(pl.Callback):
    """Log loss, contrast accuracy, queue, spread, rates and waiting every few steps.

    Args:
        data: It tells how long training has waited for its loader.
        every: Optimiser steps between readings.
        at_epochs: Whether the end of each epoch is read too, for callbacks that look then.

    Attributes:
        latest: Name to value of the last readings of all callbacks.
        read_at: Name to the step of that reading.
        paused: Seconds spent on kNN and checkpoints; their callbacks add them.
        images, seconds: Trained on in this process, without the pauses.
        seconds_left: Until the last step at the pace so far; None before the second step is done,
            since the first one compiles, and tells nothing.
    """

    def __init__(self, data: PretrainData, every: int, at_epochs: bool = False) -> None:
        self.data, self.every, self.at_epochs = data, every, at_epochs
        self.latest: dict[str, float] = {}
        self.read_at: dict[str, int] = {}
        self.paused = 0.0
        self.images, self.seconds = 0, 0.0
        self.seconds_left: float | None = None
        self._mark = (0.0, 0.0, 0)
        self._start = 0.0
        self._first: tuple[int, float] | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._reset()
        self._start = self._mark[0]

    def _reset(self) -> None:
        self._mark = (time.perf_counter() - self.paused, self.data.wait_seconds, self.images)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have the step's last batch compute metrics if a reading is due after it."""
        step = trainer.global_step + 1
        due = step % self.every == 0 or step in (1, module.total_steps)
        due |= self.at_epochs and batch_idx + 1 == trainer.num_training_batches
        module.wants_metrics = due and batch_idx + 1 == module.window_end(batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fetch and log the metrics if they are due."""
        self.images += self.data.config.batch_size
        now = time.perf_counter() - self.paused
        self.seconds = now - self._start
        if batch_idx + 1 == module.window_end(batch_idx):
            self._look_ahead(trainer.global_step, module.total_steps)
        if not module.wants_metrics:
            return
        values = torch.stack([v.float() for v in module.metrics.values()])
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= distributed.world_size()
        values = dict(zip(module.metrics, values.tolist(), strict=True))
        start, waited, images = self._mark
        elapsed = max(now - start, 1e-9)
        step = trainer.global_step
        values |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/key_momentum": optim.key_momentum(
                module.model_config, step - 1, module.total_steps
            ),
            "train/images_per_second": (self.images - images) / elapsed,
            "train/wait_share": (self.data.wait_seconds - waited) / elapsed,
        }
        self._reset()
        self.publish(trainer, module, values)

    def _look_ahead(self, step: int, total_steps: int) -> None:
        """Estimate the time left: steps with small views take less than those to come."""
        self._first = self._first or (step, self.seconds)
        first, seconds = self._first
        if step > first:
            work = self.data.growth.work
            self.seconds_left = (
                (self.seconds - seconds) / work(first, step) * work(step, total_steps)
            )

    def publish(self, trainer: pl.Trainer, module: Any, values: dict[str, float]) -> None:
        """Send metrics to every logger and remember them."""
        step = trainer.global_step
        self.latest |= values
        self.read_at |= dict.fromkeys(values, step)
        epoch = round(step / module.steps_per_epoch, 3)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **values}, step=step)
        # For callbacks that follow a metric, such as Lightning's EarlyStopping.
        trainer.callback_metrics.update({n: torch.tensor(float(v)) for n, v in values.items()})

    def rate(self) -> float:
        """Return images per second over the whole training time, over all devices."""
        return self.images / self.seconds if self.seconds else 0.0


# What the progress tells, the first the most important: a narrow terminal has no room for the last.
_READINGS = (
    ("train/loss", "loss {:.3f}"),
    ("val/knn_top1", "kNN {:.1f}%"),
    ("train/contrast_top1", "contrast {:.0%}"),
    ("train/images_per_second", "{:,.0f} images/s"),
)
_BAR_COLUMNS = 33  # for `100%|####| 1:00:00, 10:00:00 left`


def in_notebook() -> bool:
    """Tell whether this is a kernel of Jupyter, which shows bars though it is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _width() -> int:
    return columns() or 100  # of a notebook, whose cells are about as wide


class Progress(pl.Callback):
    """Show one bar over the whole run on a terminal or in a notebook, and elsewhere a line every
    ten seconds."""

    def __init__(self, metrics: MetricsLogger) -> None:
        self.metrics = metrics
        self._bar: Any = None
        self._spoke = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Open the bar."""
        if not trainer.is_global_zero:
            return
        if is_terminal() or in_notebook():
            from tqdm.auto import tqdm

            work = self.metrics.data.growth.work  # smaller views take less time
            self._bar = tqdm(
                total=work(0, module.total_steps),
                initial=work(0, trainer.global_step),
                nrows=24,  # on a terminal that names no height tqdm draws nothing
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            )
        self._spoke = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Move the bar."""
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.ncols = _width() - 2  # a terminal shows ^C behind it
            work = self.metrics.data.growth.work
            self._bar.total = work(0, module.total_steps)  # which the clock may decide meanwhile
            self._bar.n = work(0, trainer.global_step)
            self._bar.set_postfix_str(self._text(trainer, module), refresh=False)
            self._bar.update(0)
        elif time.monotonic() - self._spoke > 10 or trainer.global_step >= module.total_steps:
            self._spoke = time.monotonic()
            print(self._text(trainer, module), file=sys.stderr, flush=True)

    def _text(self, trainer: pl.Trainer, module: Any) -> str:
        latest, step = self.metrics.latest, trainer.global_step
        epochs = module.total_steps / module.steps_per_epoch
        digits = 1 if epochs >= 1 else 3
        parts = [f"epoch {step / module.steps_per_epoch:.{digits}f}/{round(epochs, digits):g}"]
        for name, label in _READINGS:
            if name in latest:
                parts.append(label.format(latest[name]))
        if self._bar is not None:
            room = _width() - _BAR_COLUMNS
            lengths = accumulate(len(part) + 2 for part in parts)
            parts = [part for part, length in zip(parts, lengths, strict=True) if length <= room]
        elif step < module.total_steps and self.metrics.seconds_left is not None:
            parts.append(f"{self.metrics.seconds_left / 60:.1f} min left")
        return ", ".join(parts)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Close the bar, so that what is said next has a line of its own."""
        self.on_train_end(trainer, module)
