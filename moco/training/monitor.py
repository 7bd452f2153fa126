"""kNN accuracy while a run trains, as a Lightning callback; it changes nothing that is computed.

Shapes: M images of the bank, D feature.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import RunConfig
from moco.distributed import broadcast_buffers, gather_ragged
from moco.evaluation.features import extract_features
from moco.evaluation.knn import few_shot_accuracy, knn_predict
from moco.images.labelled import LabelledData
from moco.training.metrics import MetricsLogger

log = logging.getLogger("moco")
_SHOTS = 10
_READINGS = {"first", "last", "read_at", "is_loaded"}
_RAW_LIMIT = 2**29  # values of raw pixels that the baseline may hold


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
            count = sum(map(len, self.data))
            log.info("kNN reads %d images with the network as it starts", count)
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
