"""Quality without labels while a run trains, as a Lightning callback; nothing computed changes.

The measures are taken on images that are not trained on: those of the test split, or some that were
set aside (`run.held_out`). Of each, the views are the same at every reading.
Shapes: N images, V views, D feature.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch

from moco import distributed
from moco.config import TrainConfig, UserError
from moco.evaluation.features import rank_0_statistics
from moco.evaluation.measures import MEASURES
from moco.evaluation.quality import BATCH, fresh_views, view_features
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.sources import identify
from moco.training.metrics import MetricsLogger

log = logging.getLogger("moco")
MOST_IMAGES = 512  # of a reading: it shall take less than a fiftieth of the training time


def held_out_views(
    config: TrainConfig, data: PretrainData, held: ImageSource | None
) -> PretrainData | None:
    """Prepare fresh views of held-out images; None where there are too few, or none are wanted.

    Args:
        config: Settings of the run.
        data: Of the run; its device makes the views.
        held: The images that are not trained on.
    """
    if held is None or held.is_sharded or config.run.knn_every == 0:
        return None
    count = min(len(held), MOST_IMAGES)
    unit = distributed.world_size() * 2
    batch = min(BATCH, count) // unit * unit
    if batch == 0:
        return None
    generator = torch.Generator().manual_seed(config.run.seed)
    rows = torch.randperm(len(held), generator=generator)[: count // batch * batch]
    # As many files may be bad as in the whole set, of which this is a small part.
    most = data.config.max_bad_fraction * (len(data.source) + len(held)) / len(rows)
    changes = {"batch_size": unit, "resident": "auto", "max_bad_fraction": min(most, 1.0)}
    images, settings = held.rows(rows.sort().values), replace(data.config, **changes)
    views = fresh_views(images, settings, config.run.seed, data.own_views)
    read = 0
    try:
        views.prepare(data.device)
        read = len(views.source)
    except UserError as error:  # files that cannot be read
        log.info("quality without labels is not read: %s", error)
    counts = distributed.all_gather(torch.tensor([read], device=data.device)).tolist()
    if read == 0 or len({*counts}) > 1:  # a file that one machine alone cannot read
        return None
    batch = min(batch, read) // unit * unit  # bad files are left out by now
    views.config = replace(views.config, batch_size=batch)
    return views


def check_select(config: TrainConfig, has_labels: bool, has_views: bool) -> None:
    """Raise UserError where the reading that is to choose the best checkpoint is never taken."""
    name = config.run.select
    if not name or (has_labels if name == "knn_top1" else has_views):
        return
    missing = "labels" if name == "knn_top1" else "held-out images"
    if config.run.knn_every == 0:
        raise UserError(f"run.select is {name!r}, and run.knn_every 0 reads nothing: set one")
    raise UserError(
        f"run.select is {name!r}, which is never read here, since there are no {missing}: "
        "leave it out, or give a set with a test split (run.knn_root may be one)"
    )


class Quality(pl.Callback):
    """Read the measures with the network as it starts, every few epochs and after the last step.

    Args:
        views: Of held-out images, or None: then nothing is read.
        config: Settings of the run.
        metrics: Logs the readings.
        knn: What kNN reads, where that chooses `best.ckpt`, as of `KNNMonitor`.

    Attributes:
        first, last: Name to value, before the first step and at the newest reading.
        best: The best value so far of the measure that chooses `best.ckpt`, or None.
        is_best: Whether the newest reading is that one.
    """

    def __init__(
        self,
        views: PretrainData | None,
        config: TrainConfig,
        metrics: MetricsLogger,
        knn: dict[str, Any] | None = None,
    ) -> None:
        self.views, self.config, self.metrics = views, config.run, metrics
        self.images = identify(views.source, "") if views else {}
        by_knn = self.config.select == "knn_top1"
        self.chosen_by = {"select": self.config.select} | (knn or {} if by_knn else self.images)
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best: float | None = None
        self.is_best = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Read the network as it starts."""
        if self.views and self.config.knn_first and trainer.global_step == 0:
            self.read(trainer, module)
            self.first = self.last

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read at the ends of the epochs at which kNN is read, and compare with the best so far."""
        self.is_best = False
        step = trainer.global_step
        final = step >= module.total_steps
        epoch_end = batch_idx + 1 == trainer.num_training_batches
        if self.config.knn_every == 0 or not (epoch_end or final):
            return
        if final or round(step / module.steps_per_epoch) % self.config.knn_every == 0:
            if self.views:
                self.read(trainer, module)
            self._compare()

    def read(self, trainer: pl.Trainer, module: Any) -> None:
        """Take features of the held-out views on all ranks, measure and log."""
        start = time.perf_counter()
        network = module.query_encoder.backbone
        with trainer.precision_plugin.forward_context(), rank_0_statistics(network):
            features = view_features(network, self.views)
        is_finite = bool(features.isfinite().all())
        self.last = {n: measure(features) for n, (measure, _) in MEASURES.items() if is_finite}
        self.metrics.paused += time.perf_counter() - start
        named = {f"val/{name}": value for name, value in self.last.items()}
        self.metrics.publish(trainer, module, named)

    def _compare(self) -> None:
        """Note whether the chosen reading is the best so far; rank 0 decides."""
        name = self.config.select
        value = self.last.get(name) if name in MEASURES else self.metrics.latest.get(f"val/{name}")
        if not name or value is None:
            return
        sign = 1 if MEASURES.get(name, (None, True))[1] else -1
        is_better = self.best is None or sign * value > sign * self.best
        self.is_best = distributed.from_first(lambda: is_better)
        self.best = value if self.is_best else self.best

    def results(self) -> dict[str, float]:
        """Return the newest reading and the first one by name, as plain values."""
        start = {f"{name}_at_start": value for name, value in self.first.items()}
        return self.last | start

    def state_dict(self) -> dict[str, Any]:
        """Return the readings for the checkpoint."""
        about = {"images": self.images, "chosen_by": self.chosen_by}
        return {"first": self.first, "last": self.last, "best": self.best, **about}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the readings from a checkpoint, those that are of what this run reads."""
        self.images = self.images or state.get("images", {})  # nothing is read for a while
        if state.get("images", self.images) == self.images:
            self.first, self.last = state["first"], state["last"]
        if state.get("chosen_by", self.chosen_by) == self.chosen_by:
            self.best = state["best"]
