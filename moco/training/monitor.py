"""Monitors of training: metrics, kNN and the progress bar, as Lightning callbacks.

Nothing here changes what is computed. The device computes metrics, and the host fetches them once
every few steps: that is a reading.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from moco import distributed
from moco.algorithm import optim
from moco.config import RunConfig
from moco.distributed import broadcast_buffers, gather_ragged
from moco.evaluation.features import extract_features
from moco.evaluation.knn import (
    few_shot_accuracy,
    knn_predict,
)
from moco.images.labelled import LabelledData
from moco.images.loader import PretrainData

log = logging.getLogger("moco")
_SHOTS = 10
_READINGS = {"first", "last", "read_at", "is_loaded"}
_RAW_LIMIT = 2**29  # values of raw pixels that the baseline may hold


class MetricsLogger(pl.Callback):
    """Log loss, contrast accuracy, queue, spread, rates and waiting every few steps.

    Args:
        data: It tells how long training has waited for its loader.
        every: Optimiser steps between readings.

    Attributes:
        latest: Name to value of the last readings of all callbacks.
        read_at: Name to the step of that reading.
        paused: Seconds spent on kNN and checkpoints; their callbacks add them.
        images, seconds: Trained on in this process, without the pauses.
    """

    def __init__(self, data: PretrainData, every: int) -> None:
        self.data, self.every = data, every
        self.latest: dict[str, float] = {}
        self.read_at: dict[str, int] = {}
        self.paused = 0.0
        self.images, self.seconds = 0, 0.0
        self._mark = (0.0, 0.0, 0)
        self._start = 0.0

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
        module.wants_metrics = due and batch_idx + 1 == module.window_end(batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Fetch and log the metrics if they are due."""
        self.images += self.data.config.batch_size
        now = time.perf_counter() - self.paused
        self.seconds = now - self._start
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

    def publish(self, trainer: pl.Trainer, module: Any, values: dict[str, float]) -> None:
        """Send metrics to every logger and remember them."""
        step = trainer.global_step
        self.latest |= values
        self.read_at |= dict.fromkeys(values, step)
        epoch = round(step / module.steps_per_epoch, 3)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **values}, step=step)

    def rate(self) -> float:
        """Return images per second over the whole training time, over all devices."""
        return self.images / self.seconds if self.seconds else 0.0


class KNNMonitor(pl.Callback):
    """Read kNN of the query backbone before the first step, every few epochs and after the last.

    Args:
        data: Bank and queries with labels, or None: then nothing is read.
        config: k, temperature and how often.
        metrics: Logs the results.

    Attributes:
        first, last: Top-1 in percent before the first step and at the newest reading.
        read_at: The step of the newest reading.
        is_loaded: Whether the first reading is of weights from a checkpoint (`--init_from`).
        few_shot: Name to percent with ten labels per class, for features and raw pixels; filled
            after the last step.
    """

    def __init__(
        self,
        data: tuple[LabelledData, LabelledData] | None,
        config: RunConfig,
        metrics: MetricsLogger,
    ) -> None:
        self.data, self.config, self.metrics = data, config, metrics
        if data and config.knn_k > len(data[0]):
            log.info(
                "run.knn_k is %d: kNN takes all %d training images", config.knn_k, len(data[0])
            )
        self.first: float | None = None
        self.last: float | None = None
        self.read_at: int | None = None
        self.is_loaded = False
        self.few_shot: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Read the network as it starts, to which later readings are compared."""
        if self._enabled and trainer.global_step == 0:
            self.read(trainer, module, final=False)
            if not self.is_loaded and trainer.is_global_zero:
                log.info(
                    "kNN %.1f %% before the first step: one draw of weights, others differ",
                    self.first,
                )

    @property
    def _enabled(self) -> bool:
        return self.data is not None and self.config.knn_every > 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read at the ends of the chosen epochs, and tell the plateau schedule."""
        step, per_epoch = trainer.global_step, module.steps_per_epoch
        final = step >= module.total_steps
        epoch_end = batch_idx + 1 == trainer.num_training_batches
        if not (epoch_end or final):
            return
        due = round(step / per_epoch) % max(self.config.knn_every, 1) == 0
        is_read = self._enabled and (due or final)
        if is_read:
            self.read(trainer, module, final)
        if epoch_end:
            module.read_plateau(self.last if is_read else None)

    def read(self, trainer: pl.Trainer, module: Any, final: bool) -> None:
        """Extract features on all ranks, vote, and log."""
        start = time.perf_counter()
        network, device = module.query_encoder.backbone, module.device
        buffers = list(network.buffers())
        own = [buffer.clone() for buffer in buffers]
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            broadcast_buffers(network)
            (bank, labels), (queries, targets) = (
                self._features(network, images, device) for images in self.data
            )
            for buffer, before in zip(buffers, own, strict=True):
                buffer.copy_(before)  # of ranks above 0
        bank, labels = gather_ragged(bank), gather_ragged(labels)
        k = min(self.config.knn_k, len(bank))
        num_classes = len(self.data[0].source.classes)
        temperature = self.config.knn_temperature
        found = knn_predict(queries, bank, labels, num_classes, k, temperature)
        hits = gather_ragged((found == targets).float())
        self.last, self.read_at = 100 * hits.mean().item(), trainer.global_step
        self.first = self.last if self.first is None else self.first
        if final:
            queries, targets = gather_ragged(queries), gather_ragged(targets)
            self.few_shot = self._few_shot(bank, labels, queries, targets, device)
        self.metrics.paused += time.perf_counter() - start
        self.metrics.publish(trainer, module, {"val/knn_top1": self.last})

    def results(self) -> dict[str, float | int | None]:
        """Return the readings by name; the newest one is null where only the first was taken."""
        start = "knn_top1_init_from" if self.is_loaded else "knn_top1_untrained"
        step = self.read_at or None
        is_drawn = self.first is not None and not self.is_loaded
        return {
            "knn_top1": self.last if step else None,
            "knn_top1_step": step,
            start: self.first,
            **({"knn_top1_untrained_draws": 1} if is_drawn else {}),
            **self.few_shot,
        }

    def _few_shot(self, bank, labels, queries, targets, device) -> dict[str, float]:
        """Score ten labels per class on features and on raw pixels, if all classes have ten."""
        if int(torch.bincount(labels).min()) < _SHOTS:
            return {}
        scores = {"ten_shot": few_shot_accuracy(bank, labels, queries, targets, _SHOTS)[0]}
        config = self.data[0].config
        pixels = len(bank) * config.channels * config.image_size**2
        if pixels <= _RAW_LIMIT and distributed.world_size() == 1:
            raw = [self._features(nn.Flatten(), images, device) for images in self.data]
            scores["ten_shot_raw_pixels"] = few_shot_accuracy(*raw[0], *raw[1], _SHOTS)[0]
        return scores

    def _features(self, network, images, device) -> tuple[Tensor, Tensor]:
        """Return features and labels of this rank's share of the images that can be read."""
        features, rows = extract_features(network, images.batches(device))
        return features, images.labels(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the readings for the checkpoint."""
        return {name: getattr(self, name) for name in _READINGS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the readings from a checkpoint."""
        for name in _READINGS & state.keys():  # an older version stored two of them
            setattr(self, name, state[name])


class Progress(pl.Callback):
    """Show one bar over the whole run on a terminal, and elsewhere a line every ten seconds."""

    def __init__(self, metrics: MetricsLogger) -> None:
        self.metrics = metrics
        self._bar: Any = None
        self._spoke = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Open the bar."""
        if not trainer.is_global_zero:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=module.total_steps,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            )
        self._spoke = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Move the bar."""
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.n = trainer.global_step
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
        for name, label in (
            ("train/loss", "loss {:.3f}"),
            ("train/contrast_top1", "contrast {:.0%}"),
            ("val/knn_top1", "kNN {:.1f}%"),
            ("train/images_per_second", "{:,.0f} images/s"),
        ):
            if name in latest:
                parts.append(label.format(latest[name]))
        if self._bar is None and self.metrics.rate():
            left = (module.total_steps - step) * module.accumulate
            left *= self.metrics.data.config.batch_size
            parts.append(f"{left / self.metrics.rate() / 60:.1f} min left")
        return ", ".join(parts)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
