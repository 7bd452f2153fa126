"""Judge a checkpoint: what `eval_linear.py` and `eval_knn.py` call.

Each main opens the encoder and the labelled images, runs a protocol on the encoder and on the
baselines (raw pixels, untrained networks), writes the result beside the checkpoint, and ends with
a verdict on standard error.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from moco import distributed
from moco.checkpoints.matching import checksum
from moco.evaluation.features import feature_shape
from moco.evaluation.labels import check_labels, few_labels
from moco.evaluation.opening import ReadData
from moco.evaluation.own import NOTHING, Given
from moco.evaluation.probe import SWEEP
from moco.evaluation.protocols import PROTOCOLS, fitting, knn
from moco.evaluation.references import add_references, describe
from moco.evaluation.subject import Subject, open_subject, output_path
from moco.evaluation.verdict import RAW_PIXELS, REFERENCE, UNTRAINED, Comparison, compare
from moco.judge_config import JudgeConfig, KNNConfig, LinearConfig
from moco.pixels import normalisation
from moco.whole_files import output_file

log = logging.getLogger("moco")

# Learning rates, epochs and batch size of each protocol, unless the user gives others.
DEFAULTS = {
    "cached": (SWEEP, 100, 1024),
    "views": (SWEEP, 100, 1024),
    "paper": ((30.0,), 100, 256),
    "v3": ((0.4,), 90, 1024),  # 0.1 for each 256 images
    "v3_vit": ((12.0,), 90, 1024),  # 3 for each 256 images
    "finetune": ((0.05,), 50, 256),
}


def judge_linear(
    judge: JudgeConfig, config: LinearConfig, read_data: ReadData, given: Given = NOTHING
) -> dict[str, Any]:
    """Train a linear classifier, or the whole network, and test it.

    Args:
        judge, config: Settings; 0 and [] take the protocol's own values.
        read_data: Data settings, given those of the run that made the checkpoint as defaults.

    Returns:
        The result as plain values on rank 0, also written to a file; empty on other ranks.
    """
    name = f"eval_linear-{config.protocol}-{judge.layer}"
    name += f"-{config.label_fraction:g}" if config.label_fraction < 1 else ""
    rates, epochs, batch_size = DEFAULTS[config.protocol]
    config = replace(
        config,
        learning_rates=config.learning_rates or list(rates),
        epochs=config.epochs or epochs,
        batch_size=config.batch_size or batch_size,
    )

    def score(subject: Subject) -> dict[str, Any]:
        labels = subject.bank.source.labels
        if config.label_fraction < 1:
            rows = few_labels(labels, config.label_fraction, judge.seed)
            subject.bank = subject.bank.rows(rows)
        return PROTOCOLS[config.protocol](subject, config)

    return _judge(name, config.protocol, judge, config, (read_data, given), score)


def judge_knn(
    judge: JudgeConfig, config: KNNConfig, read_data: ReadData, given: Given = NOTHING
) -> dict[str, Any]:
    """Vote by nearest neighbours, score few labels per class, and draw a gallery.

    Arguments and result as of `judge_linear`.
    """
    name = f"eval_knn-{judge.layer}"

    def score(subject: Subject) -> dict[str, Any]:
        fitting(config.k, len(subject.bank))  # which refuses before anything is computed
        gallery = output_path(judge, f"{subject.name}.png")
        return {each: knn(subject, config, each, gallery) for each in subject.networks}

    return _judge(name, "knn", judge, config, (read_data, given), score)


def _judge(
    name: str,
    protocol: str,
    judge: JudgeConfig,
    config: LinearConfig | KNNConfig,
    images: tuple[ReadData, Given],
    score: Callable[[Subject], dict[str, Any]],
) -> dict[str, Any]:
    """Open the subject, score its networks, and write the result; `name` begins its file's name."""
    start = time.perf_counter()
    with open_subject(judge, config, *images, name) as subject:
        check_labels(subject.bank.source.labels)
        references = add_references(subject)
        before = checksum(subject.networks["encoder"])
        distributed.check_alike(before, f"the weights in {judge.checkpoint}")
        scores = score(subject)
        after = checksum(subject.networks["encoder"])
        if before != after:
            raise AssertionError("the judged network changed: its score is void")
        if distributed.rank() > 0:
            return {}
        comparison = _compare(subject, protocol, scores)
        _say(subject, scores)
        result = {"script": name.partition("-")[0], **scores.pop("encoder"), **_describe(subject)}
        result |= {"protocol": protocol, "settings": asdict(config)}
        result |= {"backbone_sha256": before, "backbone_sha256_after": after}
        result |= {"baselines": scores, "comparison": comparison.as_dict()}
        result |= describe(references, subject)
        result |= {"seconds": round(time.perf_counter() - start, 1)}
        _write(result, judge, subject.name)
        for line in comparison.lines():
            log.info("%s", line)
        return result


def _compare(subject: Subject, protocol: str, scores: dict[str, Any]) -> Comparison:
    """Compare the encoder with its baselines.

    Further draws of the untrained network are counted here, and leave the scores.
    """
    for name in [each for each in scores if each.startswith(f"{UNTRAINED} ")]:
        del scores[name]
    hits = subject.hits
    drawn = [each for name, each in hits.items() if name.startswith(UNTRAINED)]
    baselines = {UNTRAINED: drawn} if drawn else {}
    baselines |= {RAW_PIXELS: [hits["raw_pixels"]]} if "raw_pixels" in hits else {}
    baselines |= {name: [each] for name, each in hits.items() if name.startswith(REFERENCE)}
    title = {"knn": f"kNN (k {scores['encoder'].get('k')})", "finetune": "fine-tuned"}
    few = [_ten_labels(scores.get(name)) for name in ("encoder", "raw_pixels")]
    void = ""
    if scores["encoder"].get("verdict") == "diverged":
        void = "the learning rate diverged, give smaller --learning_rates, or more --epochs"
    elif not baselines:
        void = "nothing was judged beside the encoder, leave --baselines at true"
    comparison = compare(
        title.get(protocol, "linear"),
        subject.queries.source.labels,
        hits["encoder"],
        baselines,
        None if None in few else few,
        void,
    )
    idle = _untaught(scores, len(subject.classes))
    if comparison.is_better and idle:
        void = f"the classifier of {idle[0]} learnt nothing at any rate, give more --epochs"
    return replace(comparison, void=void)


def _untaught(scores: dict[str, Any], classes: int) -> list[str]:
    """Name baselines whose classifier ended within 1 % of the loss of guessing, at every rate."""
    least, found = 0.99 * math.log(classes), []
    for name, score in scores.items():
        losses = [rate["loss"] for rate in (score or {}).get("rates", ())]
        got_nowhere = losses and all(loss is None or loss >= least for loss in losses)
        if name != "encoder" and (score is None or got_nowhere):
            found.append(name.replace("_", " "))
    return found


def _ten_labels(score: dict[str, Any] | None) -> float | None:
    """Return top-1 with ten labels of each class, where that was scored."""
    found = ((score or {}).get("few_shot") or {}).get("10")
    return found and found["mean"]


def _say(subject: Subject, scores: dict[str, Any]) -> None:
    """Say how many images were scored, and the mean over classes where these are unbalanced."""
    for images in (subject.bank, subject.queries):
        if images.num_unread:
            total = images.num_read + images.num_unread
            log.info("%s: %d of %d images were read", images.source.name, images.num_read, total)
    counts = torch.bincount(subject.queries.source.labels)
    if counts.max() < 2 * counts.min():
        return
    log.info("the classes have %d to %d test images:", counts.min(), counts.max())
    for name, score in scores.items():
        if score:
            top1, mean = score["top1"], score["mean_per_class"]
            log.info("%s: top-1 %.2f, mean over classes %.2f", name, top1, mean)


def _describe(subject: Subject) -> dict[str, Any]:
    """State what was judged, and on which images."""
    loaded, data = subject.loaded, subject.data
    mean, std = normalisation(data)
    return {
        "layer": subject.judge.layer,
        "encoder": loaded.encoder,
        "checkpoint": subject.judge.checkpoint,
        "layout": loaded.layout,
        "backbone": loaded.model.backbone,
        "epoch": loaded.epoch,
        "feature_dim": feature_shape(subject.networks["encoder"], data, subject.device)[0],
        "precision": subject.judge.precision,
        "seed": subject.judge.seed,
        "devices": distributed.world_size(),
        "data": {
            "dataset": data.dataset,
            "root": data.root,
            "image_size": data.image_size,
            "mean": mean,
            "std": std,
            "train_images": subject.bank.num_read,
            "test_images": subject.queries.num_read,
            "train_images_unread": subject.bank.num_unread,
            "test_images_unread": subject.queries.num_unread,
            "classes": len(subject.classes),
        },
    }


def _write(result: dict[str, Any], judge: JudgeConfig, name: str) -> None:
    """Write the result whole or not at all."""
    path = output_path(judge, f"{name}.json")
    with output_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    log.info("written to %s", path)
