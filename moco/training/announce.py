"""What a run says: its first and last lines, the results that it returns, and its page."""

from __future__ import annotations

import logging
import math
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco.algorithm.names import is_own
from moco.algorithm.own_backbone import warn_of_classifier
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, TrainConfig
from moco.evaluation.findings import findings
from moco.evaluation.verdict import WIDTH
from moco.idle import idle_in_training
from moco.images.loader import PretrainData
from moco.log import log_to_stderr, reason_of
from moco.training.build import Run, why_in_parts
from moco.training.decide import Decided

log = logging.getLogger("moco")


def set_up_logging() -> None:
    """Send our own lines to standard error, and silence what libraries chat."""
    log_to_stderr()
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # Products of float32 are the loss's, or what trainer.precision 32-true asks for.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def say_what_was_decided(
    config: TrainConfig, decided: Decided, module: MoCo, data: PretrainData, run_dir: Path
) -> None:
    """Log what the run is and what was decided, in its first lines."""
    # `auto` and shuffle may have come to split, and split alone heeds model.bn_splits.
    came_to = replace(config.model, key_bn=decided.key_bn, query_bn=decided.query_bn)
    used = {"run.minutes": 0.0} if "trainer.max_epochs" in decided.settings else {}
    if idle := idle_in_training(replace(config, model=came_to).changed(used)):
        log.info("%s", idle)
    why, streamed = decided.reasons, decided.resident == "streamed"
    log.info(
        "%s: %d images, %s (%s); views %s at %s, %d steps per epoch",
        data.source.name,
        len(data.source),
        "streamed by workers" if streamed else f"resident in {decided.resident}",
        why["resident"],
        config.data.views,
        data.growth.in_words(),
        module.steps_per_epoch,
    )
    if data.source.reading.reason:
        log.info("%s", data.source.reading)
    _say_network(config.model, module)
    log.info(
        "%d %s device(s), %s (%s); global batch %d, per device %d%s; lr %g",
        decided.world,
        decided.accelerator,
        decided.precision,
        why["precision"],
        config.data.batch_size,
        config.data.batch_size // decided.world,
        f" in {config.data.chunks} chunks" if config.data.chunks > 1 else "",
        config.optim.lr,
    )
    log.info("key BatchNorm: %s (%s)", decided.key_bn, why["key_bn"])
    if decided.query_bn != "plain" or config.model.query_bn != "plain":
        log.info("query BatchNorm: %s (%s)", decided.query_bn, why["query_bn"])
    if data.in_graph:
        log.info("the step, its views included: compiled to one graph (%s)", why["compile"])
    else:
        compiled = "compiled" if decided.compile else "not compiled"
        apart = f"; not to one graph: {why_in_parts(config, decided)}" if decided.compile else ""
        log.info("encoders and views: %s (%s)%s", compiled, why["compile"], apart)
    log.info("run directory: %s", run_dir)
    if (config.optim.schedule, config.optim.plateau_metric) == ("plateau", "val/knn_top1"):
        log.warning(
            "optim.plateau_metric val/knn_top1: the labels of the test images steer the rate, so "
            "this run's scores on them are too good; train/loss needs no labels"
        )


def _say_network(model: ModelConfig, module: MoCo) -> None:
    """Log what is trained, and by which contrast."""
    encoder = module.query_encoder
    if is_own(model.backbone) and (
        warning := warn_of_classifier(encoder.backbone, encoder.feature_dim)
    ):
        log.warning("%s", warning)
    millions = sum(p.numel() for p in module.query_encoder.parameters()) / 1e6
    log.info(
        "%s, %.2f M parameters; head %s%s%s, %s, temperature %g, key momentum %g",
        model.backbone,
        millions,
        model.head,
        ", predictor" if model.predictor != "none" else "",
        f", {model.patches} x {model.patches} patches" if model.patches > 1 else "",
        _negatives(model),
        model.temperature,
        model.key_momentum,
    )


def _negatives(model: ModelConfig) -> str:
    """Say where a run takes its negatives from."""
    if model.queue_size == 0:
        return "negatives of the batch"
    return f"{model.queue_size} keys queued" + (" for each view" if model.queues == 2 else "")


def results(run: Run, run_dir: Path, seconds: float) -> dict[str, Any]:
    """Return what a run came to, as plain values, with the step that a figure was read at."""
    comparison = run.monitor.comparison
    return {
        **{name: _rounded(value) for name, value in run.monitor.results().items()},
        "quality": {name: _rounded(v) for name, v in run.quality.results().items()} or None,
        "comparison": comparison and comparison.as_dict(_findings(run)),
        "loss": _rounded(run.metrics.latest.get("train/loss"), 4),
        "loss_step": run.metrics.read_at.get("train/loss"),
        "images_per_second": _rounded(run.metrics.rate(), 1),
        "seconds": _rounded(seconds, 1),
        "steps": run.trainer.global_step,
        "run_dir": str(run_dir),
        "checkpoint": str(run_dir / "checkpoints" / "last.ckpt"),
    }


def say_verdict(run: Run) -> None:
    """Log whether the network got better, or what was read where no labels tell it."""
    if run.monitor.comparison:
        lines = run.monitor.comparison.lines(_findings(run))
    elif run.monitor.data is None:
        lines = textwrap.wrap(_without_labels(run), WIDTH, break_on_hyphens=False)
    else:
        return
    for line in lines:
        log.info("%s", line)


def _without_labels(run: Run) -> str:
    """Say that there is no verdict, why, and what was read instead."""
    if run.monitor.config.knn_every == 0:
        why = "run.knn_every is 0, so no labels were read (eval_knn.py reads them)"
    else:
        why = "no labelled train and test images (run.knn_root names others)"
    latest = run.metrics.latest
    if "train/loss" not in latest:
        return f"No verdict: {why}."
    return (
        f"No verdict: {why}. Read instead: loss {latest['train/loss']:.2f} (of a network that "
        f"cannot tell images apart {latest['train/chance_loss']:.2f}), the own key first in "
        f"{latest['train/contrast_top1']:.0%} of queries, spread {latest['train/spread']:.2f} "
        f"(1: even, 0: collapsed){_held_out(run)}{'; '.join(['', *_findings(run)])}."
    )


def _held_out(run: Run) -> str:
    """Say what the network does with images that it was not trained on; empty if none was read."""
    quality = run.quality
    if not quality.last:
        return ""

    def pair(name: str, form: str) -> str:
        start = f" ({form.format(quality.first[name])} at the start)" if quality.first else ""
        return form.format(quality.last[name]) + start

    count = len(quality.views.source)
    return (
        f", of {count} held-out images another view the nearest of all for "
        f"{pair('retrieval', '{:.0f}%')}, RankMe {pair('rankme', '{:.1f}')}"
    )


def _findings(run: Run) -> list[str]:
    """Name what the last readings and the settings show to be wrong, each with its remedy."""
    data = run.data
    model, batch = run.module.model_config, data.config.batch_size
    return findings(run.metrics.latest, model, batch, len(data.source))


def write_page(config: TrainConfig, run_dir: Path) -> dict[str, str]:
    """Write the page of a finished run; whatever goes wrong there is one line, and no more.

    Returns: `report`, the page's path; empty where there is none.
    """
    if not config.run.report:
        return {}
    try:
        from moco.reports.page import write_report  # charts take a second to import

        log.info("writing the report; Ctrl-C leaves it out")
        path = write_report([run_dir])["report"]
    except (Exception, KeyboardInterrupt) as error:
        reason = reason_of(error)
        log.warning(
            "no report was written (%s): python -m moco report %s makes it", reason, run_dir
        )
        return {}
    log.info("report: %s", path)
    return {"report": path}


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
