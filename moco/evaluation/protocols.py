"""Protocols: how the networks of a subject are scored.

Each protocol takes a subject and settings, and returns the scores of every network by its name.
`PROTOCOLS` lists those of `eval_linear.py`; `knn` is that of `eval_knn.py`.
Shapes: M training images (the bank), D feature, L classes, V views.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import RunError, UserError
from moco.distributed import gather_ragged
from moco.evaluation.features import extract_features
from moco.evaluation.finetune import train_linear, train_whole
from moco.evaluation.gallery import draw_gallery
from moco.evaluation.knn import few_shot_accuracy, vote
from moco.evaluation.labels import few_labels, hold_out
from moco.evaluation.probe import LinearProbe, RateResult, choose, rate_results
from moco.evaluation.scores import accuracies, places, rate_table
from moco.evaluation.search import nearest_sharded
from moco.evaluation.subject import Subject, in_order
from moco.evaluation.verdict import by_image
from moco.images.labelled import LabelledData, RandomCrops
from moco.judge_config import KNNConfig, LinearConfig
from moco.log import track

log = logging.getLogger("moco")

# The official rate suits features of a trained ResNet; baselines get the best of these.
BASELINE_RATES = (30.0, 3.0, 0.3, 0.03, 0.003, 0.0003)


def cached(subject: Subject, config: LinearConfig) -> dict[str, Any]:
    """Take features once, of the images or of several crops of each, and sweep rates on rank 0."""
    scores: dict[str, Any] = {}
    if config.protocol == "views":
        subject.bank = subject.bank.readable(subject.device)
    for name in subject.networks:
        features, rows = subject.all_features(name, subject.bank)
        labels, centre = subject.bank.labels(rows), features
        if config.protocol == "views":
            features = _crop_features(subject, config, name, rows)
        queries, rows = subject.all_features(name, subject.queries)
        with distributed.together():
            if distributed.rank() == 0:
                options = {"held_out": config.held_out, "seed": subject.judge.seed}
                args = config.learning_rates, config.epochs, config.batch_size
                probe = LinearProbe(*args, **options)
                probe.fit(features, labels, len(subject.classes), centre, track)
                scores[name] = _score(subject, name, probe.logits(queries), rows)
                scores[name] |= rate_table(name, probe.results, probe.rate)
        del features, centre
    return scores


def _crop_features(subject: Subject, config: LinearConfig, name: str, rows: Tensor) -> Tensor:
    """Take features of `num_views` random crops of each image, given by its row: V x M x D."""
    crops = RandomCrops(subject.bank, config.crop_min, subject.judge.seed)
    parts = rows.cpu().split(256 * distributed.world_size())
    views = []
    for view in range(config.num_views):
        batches = crops.batches(view, parts, subject.device)
        batches = track(batches, f"{name} view {view + 1}", len(parts))
        found, read = in_order(*extract_features(subject.networks[name], batches))
        if not torch.equal(read, rows):
            raise RunError(
                "training images that could be read at first cannot be read any more: "
                "mend the storage and run the command again"
            )
        views.append(found)
    return torch.stack(views)


def paper(subject: Subject, config: LinearConfig) -> dict[str, Any]:
    """Train linear classifiers of all networks at once on fresh crops."""
    return _linear_on_crops(subject, config, list(subject.networks))


def finetune(subject: Subject, config: LinearConfig) -> dict[str, Any]:
    """Fine-tune one network after another; raw pixels get a linear classifier."""
    scores = {}
    subject.bank = subject.bank.readable(subject.device)
    for name in subject.networks:
        if name == "raw_pixels":
            scores |= _linear_on_crops(subject, config, [name])
        else:
            scores[name] = _fine_tuned(subject, config, name)
    return scores


PROTOCOLS = {
    "cached": cached,
    "views": cached,
    "paper": paper,
    "v3": paper,
    "v3_vit": paper,
    "finetune": finetune,
}


def _linear_on_crops(
    subject: Subject, config: LinearConfig, names: Sequence[str]
) -> dict[str, Any]:
    """Train linear classifiers on the same crops, and choose each network's rate."""
    subject.bank = subject.bank.readable(subject.device)
    crops = RandomCrops(subject.bank, config.crop_min, subject.judge.seed)
    rates = {n: config.learning_rates if n == "encoder" else BASELINE_RATES for n in names}
    networks = {n: (subject.networks[n], rates[n]) for n in names}
    trained = train_linear(networks, crops, config, subject.device)
    scores: dict[str, Any] = {}
    for name, classifiers in trained.items():
        top1 = None
        if classifiers.trial is not None:
            part = subject.bank.rows(classifiers.held.nonzero()[:, 0])
            found, rows = subject.all_features(name, part)
            hits = classifiers.trial.logits(found).argmax(2) == part.labels(rows)[:, None]
            top1 = 100 * hits.double().mean(0)
        results = rate_results(rates[name], classifiers.losses, top1, len(subject.classes))
        if name != "encoder" and all(result.diverged for result in results):
            scores[name] = None  # a baseline that diverges at all rates has no score
            continue
        chosen = choose(results)
        found, rows = subject.all_features(name, subject.queries)
        logits = classifiers.stack.logits(found)[:, chosen]
        scores[name] = _score(subject, name, logits, rows)
        scores[name] |= rate_table(name, results, rates[name][chosen])
    return scores


def _fine_tuned(subject: Subject, config: LinearConfig, name: str) -> dict[str, Any]:
    """Fine-tune; of several rates the best on a held-out part is trained again on everything."""
    seed = subject.judge.seed

    def train(images: LabelledData, rate: float) -> tuple[nn.Module, RateResult]:
        crops = RandomCrops(images, config.crop_min, seed)
        return train_whole(subject.networks[name], crops, rate, config, subject.device)

    def logits(model: nn.Module, images: LabelledData) -> tuple[Tensor, Tensor]:
        return in_order(*extract_features(model, images.batches(subject.device)))

    rates, results = config.learning_rates, []
    rate = rates[0]
    if len(rates) > 1:
        held = hold_out(subject.bank.source.labels, config.held_out, seed)
        rest, part = (subject.bank.rows(mask.nonzero()[:, 0]) for mask in (~held, held))
        for each in rates:
            model, result = train(rest, each)
            found, rows = logits(model, part)
            top1 = 100 * (found.argmax(1) == part.labels(rows)).double().mean().item()
            results.append(replace(result, held_out_top1=top1))
        rate = rates[choose(results)]
    model, result = train(subject.bank, rate)
    if len(rates) == 1:
        choose(results := [result])
    scores = _score(subject, name, *logits(model, subject.queries))
    return scores | rate_table(name, results, rate)


def _score(subject: Subject, name: str, logits: Tensor, rows: Tensor) -> dict[str, Any]:
    """Score a network on the test images of these rows, and keep its hits for the verdict."""
    targets = subject.queries.labels(rows)
    hits = places(logits, targets) == 0
    subject.hits[name] = by_image(hits, rows, len(subject.queries))
    return accuracies(logits, targets, subject.classes)


def knn(subject: Subject, config: KNNConfig, name: str, gallery: Path) -> dict[str, Any]:
    """Search a bank that stays spread over the ranks, vote, and draw the encoder's gallery."""
    bank, bank_rows = subject.features(name, subject.bank)
    queries, query_rows = subject.all_features(name, subject.queries)
    targets = subject.queries.labels(query_rows)
    budget = int(config.budget * 2**30)
    every_row = gather_ragged(bank_rows)
    numbers = fitting(config.k, len(every_row))
    if numbers != config.k and name == "encoder":
        log.info("k above the %d training images is left out: it is %s", len(every_row),
                 " and ".join(map(str, numbers)))  # fmt: skip
    similarity, place = nearest_sharded(queries, bank, max(numbers), budget)
    rows = every_row[place]
    neighbours = subject.bank.labels(rows)
    votes = vote(similarity, neighbours, len(subject.classes), numbers, config.temperature)
    # A class without a vote has no place among the best five. k rises: the verdict is on the last.
    scored = {str(k): found.masked_fill(found == 0, -torch.inf) for k, found in votes.items()}
    by_k = {k: _score(subject, name, found, query_rows) for k, found in scored.items()}
    last = str(max(votes))  # the best k would be chosen on the test images
    per_class = {k: score.pop("per_class") for k, score in by_k.items()}[last]
    scores = {each: by_k[last][each] for each in ("top1", "mean_per_class")}
    scores |= {"by_k": by_k, "k": int(last), "temperature": config.temperature}
    if name == "encoder":
        scores["per_class"] = per_class
    scores["few_shot"] = _few_shot(subject, config, bank, bank_rows, queries, targets)
    if name == "encoder" and config.gallery and distributed.rank() == 0:
        found = (query_rows, similarity, rows)
        scores["gallery"] = draw_gallery(gallery, subject, *(part.cpu() for part in found))
    return scores


def fitting(numbers: list[int], images: int) -> list[int]:
    """Leave out those of the usual numbers of neighbours that are more than the training images.

    Raises:
        UserError: Other numbers were asked for, and are more.
    """
    if max(numbers) <= images:
        return numbers
    least = min(10, images)
    if numbers != KNNConfig().k:
        raise UserError(
            f"k {max(numbers)} is above the {images} training images: give smaller ones, as in "
            f"--k [{least}]"
        )
    return [number for number in numbers if number <= images] or [least]


def _few_shot(
    subject: Subject,
    config: KNNConfig,
    bank: Tensor,
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
) -> dict[str, Any]:
    """Score few labels per class, drawn from a part of the bank that is gathered on every rank."""
    stored, seed = subject.bank.source.labels, subject.judge.seed
    wanted = max(config.shots) * config.draws
    smallest = int(torch.bincount(stored).clamp(min=1).min())  # none of a class may be readable
    pool = few_labels(stored, min(1.0, wanted / smallest), seed)
    mine = torch.isin(rows, pool.to(rows.device))
    bank, rows = in_order(bank[mine], rows[mine])
    labels = subject.bank.labels(rows)
    smallest = int(torch.bincount(labels, minlength=len(subject.classes)).min())
    scores: dict[str, Any] = {}
    for shots in config.shots:
        scores[str(shots)] = None
        if shots <= smallest:
            found = few_shot_accuracy(bank, labels, queries, targets, shots, config.draws, seed)
            mean, std = (round(value, 2) for value in found)
            scores[str(shots)] = {"mean": mean, "std": std, "draws": config.draws}
        else:
            log.info("%d shots left out: the smallest class has %d images", shots, smallest)
    return scores
