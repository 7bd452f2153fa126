"""Advice: what the readings of a run say is wrong, in words, each with the setting to change."""

from __future__ import annotations

from math import sqrt
from statistics import median
from typing import Any

from moco.config import TrainConfig
from moco.evaluation.findings import findings
from moco.evaluation.verdict import FACTOR
from moco.reports.facts import Facts

_WAITING = 0.25  # share of the time
_FALLEN = 2.0  # points of kNN below its best


def advise(facts: Facts, count: int) -> list[str]:
    """Return sentences; empty where nothing is wrong.

    Args:
        count: Images in its set; 0 where they are not known.
    """
    config, comparison = facts.config, facts.result.get("comparison")
    found = _waiting(facts, config) + _falling(facts)
    if isinstance(comparison, dict) and comparison.get("is_better") is False:
        return [_sentence(text) for text in (comparison.get("sentence", ""), *found)]
    if not isinstance(comparison, dict):
        found += _no_gain(facts)
    if count and not config.undecided():
        batch = config.data.batch_size
        found = [*findings(facts.latest(), config.model, batch, count), *found]
    return [_sentence(text) for text in found]


def _waiting(facts: Facts, config: TrainConfig) -> list[str]:
    shares = [value for _, value in facts.curve("train/wait_share")][1:]
    if not shares or median(shares) <= _WAITING:
        return []
    remedy = "raise data.num_workers, or data.resident_budget so that the images are held decoded"
    return [f"{median(shares):.0%} of the time went by waiting for images: {remedy}"]


def _falling(facts: Facts) -> list[str]:
    curve = facts.curve("val/knn_top1")
    if len(curve) < 3:
        return []
    step, best = max(curve, key=lambda reading: reading[1])
    last, comparison = curve[-1][1], facts.result.get("comparison")
    trained = comparison.get("trained") if isinstance(comparison, dict) else None
    error = trained.get("standard_error", 0.0) if isinstance(trained, dict) else 0.0
    if step == 0 or best - last <= max(_FALLEN, FACTOR * sqrt(2) * error):
        return []  # below the first reading, `_no_gain` or the comparison says so
    remedy = "lower optim.lr, or train no longer than that"
    return [f"kNN has fallen from {best:.1f} % at step {step} to {last:.1f} %: {remedy}"]


def _no_gain(facts: Facts) -> list[str]:
    """Compare the last reading with the first, where the run has not compared them itself."""
    curve = facts.curve("val/knn_top1")
    if len(curve) < 2 or curve[0][0] > 0 or curve[-1][1] > curve[0][1]:
        return []
    remedy = "train longer (trainer.max_epochs), and see that the views keep what matters"
    return [
        f"kNN {curve[-1][1]:.1f} % is not above the {curve[0][1]:.1f} % before the first step: "
        f"{remedy}"
    ]


def _sentence(text: Any) -> str:
    text = str(text).strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
