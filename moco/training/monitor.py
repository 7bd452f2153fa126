"""kNN accuracy while a run trains, as a Lightning callback; it changes nothing that is computed.

The bank stays spread over the ranks: only queries and candidates travel.

After the last checkpoint the untrained network and raw pixels are read too, for the verdict.

Shapes: M images of the bank, D feature.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from moco import distributed
from moco.algorithm.encoder import Encoder, build_encoder, lay_channels_last
from moco.algorithm.names import is_own
from moco.config import RunConfig
from moco.distributed import gather_ragged
from moco.evaluation.features import extract_features, rank_0_statistics
from moco.evaluation.knn import few_shot_accuracy, knn_predict
from moco.evaluation.subject import PIXEL_SIDE, Pixels
from moco.evaluation.verdict import RAW_PIXELS, UNREAD, UNTRAINED, Comparison, by_image, compare
from moco.images.labelled import LabelledData
from moco.images.sources import identify
from moco.training.metrics import MetricsLogger
from moco.training.saving import Signals

log = logging.getLogger("moco")
_SHOTS = 10
_READINGS = {"first", "first_hits", "last", "read_at", "is_loaded", "about"}
_RAW_LIMIT = 2**29  # values of raw pixels that the baseline may hold
MOST_DRAWS, SHARE = 10, 0.03  # of untrained networks, and of the training time that they may take


class KNNMonitor(pl.Callback):
    """Read kNN of the query encoder before the first step, every few epochs and after the last.

    Args:
        data: Bank and queries with labels, or None: then nothing is read.
        config: k, temperature and how often.
        metrics: Logs the results, and knows how long training took.
        signals: Once one has come, no further network is drawn.

    Attributes:
        first, last: Top-1 in percent before the first step and at the newest reading.
        first_hits: Of the test images before the first step, as of `moco.evaluation.verdict`.
        read_at: The step of the newest reading.
        is_loaded: Whether the first reading is of weights from a checkpoint (`--init_from`).
        few_shot: Name to percent with ten labels per class, for features and raw pixels; filled
            after the last step.
        comparison: The trained network beside its baselines; None before the end.
    """

    def __init__(
        self,
        data: tuple[LabelledData, LabelledData] | None,
        config: RunConfig,
        metrics: MetricsLogger,
        signals: Signals,
    ) -> None:
        self.data, self.config, self.metrics, self.signals = data, config, metrics, signals
        if data and config.knn_k > len(data[0]):
            log.info(
                "run.knn_k is %d: kNN takes all %d training images", config.knn_k, len(data[0])
            )
        self.first: float | None = None
        self.first_hits: Tensor | None = None
        self.last: float | None = None
        self.read_at: int | None = None
        self.is_loaded = False
        self.few_shot: dict[str, float] = {}
        self.comparison: Comparison | None = None
        self._hits, self._seconds = torch.empty(0), 0.0  # of the newest reading, without few labels

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Read the network as it starts, to which later readings are compared."""
        if self._enabled and self.config.knn_first and trainer.global_step == 0:
            count = sum(map(len, self.data))
            log.info("kNN reads %d images with the network as it starts", count)
            self.read(trainer, module, final=False)
            self.first, self.first_hits = self.last, self._hits
            if not self.is_loaded and trainer.is_global_zero:
                log.info(
                    "kNN %.1f %% before the first step: one draw of weights, others differ",
                    self.first,
                )

    @property
    def _enabled(self) -> bool:
        return self.data is not None and self.config.knn_every > 0

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What is read and how; empty where nothing is."""
        if not self._enabled:
            return {}
        bank, queries = (identify(part.source, "") for part in self.data)
        how = {name: getattr(self.config, f"knn_{name}") for name in ("k", "temperature", "layer")}
        return {"bank": bank, "queries": queries, **how}

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
        network = self._network(module.query_encoder)
        with rank_0_statistics(network):
            self._hits = self.judge(trainer, module.device, network, "ten_shot" if final else "")
        self.last, self.read_at = _top1(self._hits), trainer.global_step
        self.metrics.paused += time.perf_counter() - start
        self.metrics.publish(trainer, module, {"val/knn_top1": self.last})

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Read what needs no training, and compare; the last checkpoint is written by now.

        Of untrained networks as many are drawn as 3 % of the training time pays, and ten at most.
        The network as the run began is one of them, unless it had weights from a checkpoint.
        """
        if not self._enabled or self.read_at != module.total_steps:
            return
        baselines: dict[str, list[Tensor]] = {}
        draws = [] if self.is_loaded or self.first_hits is None else [self.first_hits]
        if self.is_loaded and self.first_hits is not None:
            baselines["the weights it started from"] = [self.first_hits]
        paid = int(SHARE * self.metrics.seconds / max(self._seconds, 1e-9))
        if is_own(module.model_config.backbone):  # only its author can draw it anew
            paid = 0
        wanted = distributed.from_first(lambda: min(MOST_DRAWS, len(draws) + paid))
        if wanted > len(draws):
            log.info("reading kNN of more untrained networks: %d", wanted - len(draws))
        for number in range(len(draws), wanted):
            if distributed.from_first(lambda: self.signals.came):
                break
            draws.append(self.judge(trainer, module.device, self._untrained(module, number)))
        baselines |= {UNTRAINED: draws} if draws else {}
        bank, queries = self.data
        side = min(bank.config.image_size, PIXEL_SIDE)
        if len(bank) * bank.config.channels * side**2 <= _RAW_LIMIT:
            hits = self.judge(trainer, module.device, Pixels(), "ten_shot_raw_pixels")
            baselines[RAW_PIXELS] = [hits]
        few = [*self.few_shot.values()] if len(self.few_shot) == 2 else None
        layer = ", head" if self.config.knn_layer == "head" else ""
        title, labels = f"kNN (k {self._k(len(bank))}{layer})", queries.source.labels
        self.comparison = compare(title, labels, self._hits, baselines, few)

    def _network(self, encoder: Encoder) -> nn.Module:
        """Return what is read: the backbone, or with its head, of whole images."""
        if self.config.knn_layer == "backbone":
            return encoder.backbone
        return nn.Sequential(encoder.backbone, encoder.head)

    def _untrained(self, module: Any, number: int) -> nn.Module:
        """Build the network as the run with a later seed would begin with it."""
        data = self.data[0].config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + number)
            encoder = build_encoder(module.model_config, data.channels, data.image_size)
        lay_channels_last(encoder)
        return self._network(encoder.to(module.device))

    def judge(
        self, trainer: pl.Trainer, device: torch.device, network: nn.Module, few_shot: str = ""
    ) -> Tensor:
        """Return the hits of a network on the test images.

        Args:
            few_shot: Name under which the score of ten labels per class is kept, or empty.
        """
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            (bank, rows), (queries, query_rows) = (
                extract_features(network, images.batches(device)) for images in self.data
            )
        labels, classes = gather_ragged(self.data[0].labels(rows)), self.data[0].source.classes
        queries, query_rows = gather_ragged(queries), gather_ragged(query_rows)
        targets = self.data[1].labels(query_rows)
        options = self._k(len(labels)), self.config.knn_temperature
        found = knn_predict(queries, bank, labels, len(classes), *options, sharded=True)
        hits = by_image((found == targets).to(torch.int8), query_rows, len(self.data[1]))
        self._seconds = time.perf_counter() - start
        if few_shot and int(torch.bincount(labels).min()) >= _SHOTS:
            bank = gather_ragged(bank)
            self.few_shot[few_shot] = few_shot_accuracy(bank, labels, queries, targets, _SHOTS)[0]
        return hits

    def _k(self, most: int) -> int:
        return min(self.config.knn_k, most)

    def results(self) -> dict[str, float | int | None]:
        """Return the readings by name; the newest one is null where only the first was taken.

        `knn_top1_untrained` is the mean over as many draws as `knn_top1_untrained_draws` says.
        """
        start = "knn_top1_init_from" if self.is_loaded else "knn_top1_untrained"
        step = self.read_at or None
        found = {"knn_top1": self.last if step else None, "knn_top1_step": step, start: self.first}
        if self.first is not None and not self.is_loaded:
            found["knn_top1_untrained_draws"] = 1
        for row in self.comparison.baselines if self.comparison else ():
            if row.name == UNTRAINED:
                found |= {"knn_top1_untrained": row.top1}
                found |= {"knn_top1_untrained_draws": len(row.draws)}
        return found | self.few_shot

    def state_dict(self) -> dict[str, Any]:
        """Return the readings for the checkpoint."""
        return {name: getattr(self, name) for name in _READINGS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the readings from a checkpoint, if they are of what this run reads."""
        before = state.get("about") or self.about  # an older version did not store it
        if self._enabled and before != self.about:
            log.info("kNN reads other images than before, or in another way: it is not compared "
                     "with what was read before the resume")  # fmt: skip
            self.is_loaded = state.get("is_loaded", False)
            return
        for name in _READINGS & state.keys():  # an older version stored two of them
            setattr(self, name, state[name])
        self.about = before


def _top1(hits: Tensor) -> float:
    """Return the share of hits among the images that were read, in percent."""
    return 100 * hits[hits != UNREAD].float().mean().item()
