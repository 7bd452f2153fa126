"""Judge a checkpoint: what `eval_linear.py` and `eval_knn.py` call.

Opens the encoder and the labelled images, refuses what cannot be judged, runs a protocol on the
encoder and on the baselines (raw pixels, the untrained network), and writes the result beside the
checkpoint.
Shapes: M training images (the bank), Q test images (the queries), D feature, L classes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.checkpoints.matching import checksum
from moco.config import (
    JudgeConfig,
    KNNConfig,
    LinearConfig,
    UserError,
    normalisation,
)
from moco.distributed import gather_ragged
from moco.evaluation.features import extract_features
from moco.evaluation.finetune import train_linear, train_whole
from moco.evaluation.gallery import draw_gallery
from moco.evaluation.knn import few_shot_accuracy, vote
from moco.evaluation.probe import (
    SWEEP,
    LinearProbe,
    Reading,
    check_labels,
    choose,
    few_labels,
    hold_out,
    read_rates,
)
from moco.evaluation.search import nearest_sharded
from moco.evaluation.subject import (
    Bench,
    ReadData,
    in_order,
    open_bench,
    output_path,
    track,
)
from moco.images.labelled import Labelled, RandomCrops

log = logging.getLogger("moco")

RATES = {"cached": SWEEP, "views": SWEEP, "paper": (30.0,), "finetune": (0.05,)}
EPOCHS = {"cached": 100, "views": 100, "paper": 100, "finetune": 50}
BATCH = {"cached": 1024, "views": 1024, "paper": 256, "finetune": 256}
# The official rate suits features of a trained ResNet; baselines get the best of these.
BASELINE_RATES = (30.0, 3.0, 0.3, 0.03, 0.003, 0.0003)


def judge_linear(judge: JudgeConfig, config: LinearConfig, read_data: ReadData) -> dict[str, Any]:
    """Train a linear classifier, or the whole network, and test it.

    Args:
        judge, config: Settings; 0 and [] take the protocol's own values.
        read_data: Data settings, given those of the run that made the checkpoint as defaults.

    Returns:
        The result as plain values on rank 0, also written to a file; empty on other ranks.

    Raises:
        UserError: Whatever the user can mend.
    """
    start = time.perf_counter()
    name = f"eval_linear-{config.protocol}-{judge.layer}"
    name += f"-{config.label_fraction:g}" if config.label_fraction < 1 else ""
    with open_bench(judge, read_data, name) as bench:
        check_labels(bench.bank.source.labels)
        if config.label_fraction < 1:
            labels = bench.bank.source.labels
            bench.bank = bench.bank.rows(few_labels(labels, config.label_fraction, judge.seed))
        before = checksum(bench.networks["encoder"])
        config = replace(
            config,
            learning_rates=config.learning_rates or list(RATES[config.protocol]),
            epochs=config.epochs or EPOCHS[config.protocol],
            batch_size=config.batch_size or BATCH[config.protocol],
        )
        protocol = _on_crops if config.protocol in ("paper", "finetune") else _cached
        scores = protocol(bench, config)
        after = checksum(bench.networks["encoder"])
        if before != after:
            raise AssertionError("the judged network changed: its score is void")
        if distributed.rank() > 0:
            return {}
        result = _describe(bench, "eval_linear", scores.pop("encoder"))
        result |= {"protocol": config.protocol, "settings": asdict(config)}
        result |= {"backbone_sha256": before, "backbone_sha256_after": after}
        result |= {"baselines": scores, "seconds": round(time.perf_counter() - start, 1)}
        return _write(result, judge, name)


def judge_knn(judge: JudgeConfig, config: KNNConfig, read_data: ReadData) -> dict[str, Any]:
    """Vote by nearest neighbours, score few labels per class, and draw a gallery.

    Arguments, result and errors as of `judge_linear`.
    """
    start = time.perf_counter()
    name = f"eval_knn-{judge.layer}"
    with open_bench(judge, read_data, name) as bench:
        check_labels(bench.bank.source.labels)
        if max(config.k) > len(bench.bank):
            raise UserError(
                f"k {max(config.k)} is above the {len(bench.bank)} training images: "
                f"give smaller ones, as in --k [{min(10, len(bench.bank))}]"
            )
        before = checksum(bench.networks["encoder"])
        scores = {each: _knn_scores(bench, config, each, name) for each in bench.networks}
        if distributed.rank() > 0:
            return {}
        result = _describe(bench, "eval_knn", scores.pop("encoder"))
        result |= {"protocol": "knn", "settings": asdict(config)}
        result |= {"backbone_sha256": before, "baselines": scores}
        result["seconds"] = round(time.perf_counter() - start, 1)
        return _write(result, judge, name)


# Protocols


def _cached(bench: Bench, config: LinearConfig) -> dict[str, Any]:
    """Take features once, of the images or of several crops of each, and sweep rates on rank 0."""
    scores = {}
    for name in bench.networks:
        centre, labels = bench.all_features(name, bench.bank)
        features = _crop_features(bench, config, name) if config.protocol == "views" else centre
        queries, targets = bench.all_features(name, bench.queries)
        if distributed.rank() > 0:
            continue
        probe = LinearProbe(
            config.learning_rates,
            config.epochs,
            config.batch_size,
            held_out=config.held_out,
            seed=bench.judge.seed,
        )
        probe.fit(features, labels, len(bench.classes), centre, track)
        del features, centre
        scores[name] = _score(bench, probe.logits(queries), targets)
        scores[name] |= _rates(name, probe.readings, probe.rate)
    return scores


def _crop_features(bench: Bench, config: LinearConfig, name: str) -> Tensor:
    """Take features of `num_views` random crops of each image: V x M x D."""
    crops = RandomCrops(bench.data, bench.bank, config.crop_min, bench.judge.seed)
    rows = torch.arange(len(bench.bank)).split(256 * distributed.world_size())
    views = []
    for view in range(config.num_views):
        batches = track(
            crops.batches(view, rows, bench.device), f"{name} view {view + 1}", len(rows)
        )
        found, _ = extract_features(bench.networks[name], batches)
        views.append(in_order(found, len(bench.bank)))
    return torch.stack(views)


def _on_crops(bench: Bench, config: LinearConfig) -> dict[str, Any]:
    """Train on fresh crops: `paper` all networks at once, `finetune` one after another."""
    crops = RandomCrops(bench.data, bench.bank, config.crop_min, bench.judge.seed)
    scores = {}
    linear = list(bench.networks)
    if config.protocol == "finetune":
        linear = [name for name in linear if name == "raw_pixels"]  # has nothing to fine-tune
        for name in bench.networks:
            if name not in linear:
                scores[name] = _finetuned(bench, config, name)
    rates = {
        name: config.learning_rates if name == "encoder" else BASELINE_RATES for name in linear
    }
    labels = bench.bank.source.labels
    held = (
        hold_out(labels, config.held_out, bench.judge.seed)
        if any(len(r) > 1 for r in rates.values())
        else None
    )
    trained = (
        train_linear(
            {name: (bench.networks[name], rates[name]) for name in linear},
            crops,
            {name: held if len(rates[name]) > 1 else None for name in linear},
            len(bench.classes),
            config.epochs,
            config.batch_size,
            config.milestones,
            0.9,
            bench.device,
            track,
        )
        if linear
        else {}
    )
    for name, result in trained.items():
        top1 = None
        if result.trial is not None:
            part = bench.bank.rows(held.nonzero()[:, 0])
            found, targets = bench.all_features(name, part)
            hits = result.trial.logits(found).argmax(2) == targets[:, None]
            top1 = 100 * hits.double().mean(0)
        readings = read_rates(rates[name], result.losses, top1, len(bench.classes))
        chosen = _chosen(readings, name)
        if chosen is None:
            scores[name] = None
            continue
        found, targets = bench.all_features(name, bench.queries)
        scores[name] = _score(bench, result.stack.logits(found)[:, chosen], targets)
        scores[name] |= _rates(name, readings, rates[name][chosen])
    return scores


def _chosen(readings: list[Reading], name: str) -> int | None:
    """Choose a rate; a baseline that diverges at all of them has no score."""
    if name == "encoder":
        return choose(readings)
    with contextlib.suppress(UserError):
        return choose(readings)
    return None


def _finetuned(bench: Bench, config: LinearConfig, name: str) -> dict[str, Any]:
    """Fine-tune; of several rates the best on a held-out part is trained again on everything."""
    rates, rate = config.learning_rates, config.learning_rates[0]
    seed, labels = bench.judge.seed, bench.bank.source.labels

    def train(images: Labelled, rate: float) -> tuple[nn.Module, Reading]:
        crops = RandomCrops(bench.data, images, config.crop_min, seed)
        network = bench.networks[name]
        width = _width(network, bench)
        return train_whole(
            network,
            width,
            crops,
            len(bench.classes),
            rate,
            config.epochs,
            config.batch_size,
            bench.device,
            track,
        )

    readings = []
    if len(rates) > 1:
        held = hold_out(labels, config.held_out, seed)
        part = bench.bank.rows(held.nonzero()[:, 0])
        for each in rates:
            model, reading = train(bench.bank.rows((~held).nonzero()[:, 0]), each)
            found, targets = _all_logits(bench, model, part)
            top1 = 100 * (found.argmax(1) == targets).double().mean().item()
            readings.append(replace(reading, held_out_top1=top1))
        rate = rates[choose(readings)]
    model, reading = train(bench.bank, rate)
    if len(rates) == 1:
        choose(readings := [reading])
    return _score(bench, *_all_logits(bench, model, bench.queries)) | _rates(name, readings, rate)


def _all_logits(bench: Bench, model: nn.Module, images: Labelled) -> tuple[Tensor, Tensor]:
    found, targets = extract_features(model, bench.batches(images))
    return in_order(found, len(images)), in_order(targets, len(images))


@torch.no_grad()
def _width(network: nn.Module, bench: Bench) -> int:
    side = bench.data.image_size
    return network.eval()(
        torch.zeros(2, bench.data.channels, side, side, device=bench.device)
    ).shape[1]


def _knn_scores(bench: Bench, config: KNNConfig, name: str, file: str) -> dict[str, Any]:
    """Search a bank that stays spread over the ranks, and vote."""
    bank, labels = bench.features(name, bench.bank)
    queries, targets = bench.all_features(name, bench.queries)
    budget = int(config.budget * 2**30)
    similarity, place = nearest_sharded(queries, bank, max(config.k), config.backend, budget)
    count, world = len(bench.bank), distributed.world_size()
    row = torch.cat([torch.arange(r, count, world) for r in range(world)])[place.cpu()]
    classes = bench.bank.source.labels[row].to(bench.device)
    votes = vote(similarity, classes, len(bench.classes), config.k, config.temperature)
    scores: dict[str, Any] = {"top1": None}
    scores["by_k"] = {str(k): _score(bench, votes[k], targets, per_class=False) for k in votes}
    last = max(votes)  # the best k would be chosen on the test images
    scores["top1"], scores["k"] = scores["by_k"][str(last)]["top1"], last
    scores["temperature"] = config.temperature
    if name == "encoder":
        scores["per_class"] = _score(bench, votes[last], targets)["per_class"]
    scores["few_shot"] = _few_shot(bench, config, bank, labels, queries, targets)
    if name == "encoder" and config.gallery and distributed.rank() == 0:
        scores["gallery"] = draw_gallery(
            output_path(bench.judge, f"{file}.png"), bench, similarity.cpu(), row
        )
    return scores


def _few_shot(
    bench: Bench, config: KNNConfig, bank: Tensor, labels: Tensor, queries: Tensor, targets: Tensor
) -> dict[str, Any]:
    """Score few labels per class, drawn from a part of the bank that is gathered on every rank."""
    stored = bench.bank.source.labels
    wanted = max(config.shots) * config.draws
    fraction = [min(1.0, wanted / max(1, n)) for n in torch.bincount(stored).tolist()]
    pool = few_labels(stored, max(fraction), bench.judge.seed)
    chosen = torch.zeros(len(stored), dtype=torch.bool)
    chosen[pool] = True
    mine = chosen[distributed.rank() :: distributed.world_size()].to(bank.device)
    order = torch.cat(
        [
            torch.arange(r, len(stored), distributed.world_size())
            for r in range(distributed.world_size())
        ]
    )
    order = order[chosen[order]].argsort().to(bank.device)
    bank, labels = gather_ragged(bank[mine])[order], gather_ragged(labels[mine])[order]
    smallest = int(torch.bincount(labels).min())
    scores = {}
    for shots in config.shots:
        if shots > smallest:
            log.info("%d shots left out: the smallest class has %d images", shots, smallest)
            scores[str(shots)] = None
            continue
        mean, std = few_shot_accuracy(
            bank, labels, queries, targets, shots, config.draws, bench.judge.seed
        )
        scores[str(shots)] = {"mean": round(mean, 2), "std": round(std, 2), "draws": config.draws}
    return scores


# Scores and results


def _score(bench: Bench, logits: Tensor, targets: Tensor, per_class: bool = True) -> dict[str, Any]:
    """Count hits with torchmetrics, in percent; top-5 says nothing of five classes or fewer."""
    from torchmetrics.functional.classification import multiclass_accuracy

    count = len(bench.classes)

    def accuracy(**options: Any) -> Tensor:
        return 100 * multiclass_accuracy(logits, targets, num_classes=count, **options)

    top5 = round(accuracy(average="micro", top_k=5).item(), 2) if count > 5 else None
    result: dict[str, Any] = {
        "top1": round(accuracy(average="micro").item(), 2),
        "top5": top5,
    }
    if per_class:
        shares = accuracy(average="none").tolist()
        result["per_class"] = {
            name: round(share, 2) for name, share in zip(bench.classes, shares, strict=True)
        }
    return result


def _rates(name: str, readings: list[Reading], rate: float) -> dict[str, Any]:
    """Tell the chosen rate and what every rate came to; JSON knows no infinity."""
    for reading in readings:
        if reading.diverged and distributed.rank() == 0:
            fate = "left out" if len(readings) > 1 else "the only one given"
            log.info(
                "%s: learning rate %g diverged (loss %.3g), %s",
                name,
                reading.rate,
                reading.loss,
                fate,
            )
    table = [asdict(reading) for reading in readings]
    for row in table:
        row["loss"] = round(row["loss"], 4) if math.isfinite(row["loss"]) else None
        if row["held_out_top1"] is not None:
            row["held_out_top1"] = round(row["held_out_top1"], 2)
    return {"rate": rate, "rates": table}


def _describe(bench: Bench, script: str, scores: dict[str, Any]) -> dict[str, Any]:
    loaded, data = bench.loaded, bench.data
    mean, std = normalisation(data)
    return {
        "script": script,
        **scores,
        "layer": bench.judge.layer,
        "encoder": loaded.encoder,
        "checkpoint": bench.judge.checkpoint,
        "layout": loaded.layout,
        "backbone": loaded.model.backbone,
        "epoch": loaded.epoch,
        "feature_dim": _width(bench.networks["encoder"], bench),
        "precision": bench.judge.precision,
        "seed": bench.judge.seed,
        "devices": distributed.world_size(),
        "data": {
            "dataset": data.dataset,
            "root": data.root,
            "image_size": data.image_size,
            "mean": mean,
            "std": std,
            "train_images": len(bench.bank),
            "test_images": len(bench.queries),
            "classes": len(bench.classes),
        },
    }


def _write(result: dict[str, Any], judge: JudgeConfig, name: str) -> dict[str, Any]:
    """Write the result whole or not at all."""
    path = output_path(judge, f"{name}.json")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    log.info("written to %s", path)
    return result
