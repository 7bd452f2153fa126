"""Scores as plain values, in percent: accuracies, and how every learning rate did.

Shapes: Q test images, L classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moco import distributed
from moco.evaluation.probe import RateResult

log = logging.getLogger("moco")


def accuracies(logits: Tensor, targets: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Count hits among the best one and the best five classes, and per class.

    Of classes with equal scores the one listed first comes first.

    Args:
        logits: Q x L; a class at minus infinity has no score and is never a hit.
        targets: Q int64.
        classes: L names.

    Returns:
        `top1`, `top5` (None for five classes or fewer, where it says nothing), `per_class` (None
        where a class has no image), and its mean, `mean_per_class`.
    """
    place = places(logits, targets)
    hits = (place == 0).double()
    counts = torch.bincount(targets, minlength=len(classes))
    shares = torch.bincount(targets, hits, len(classes)) / counts
    top5 = _percent((place < 5).double().mean()) if len(classes) > 5 else None
    per_class = {
        name: _percent(share) if count else None
        for name, share, count in zip(classes, shares, counts.tolist(), strict=True)
    }
    mean = _percent(shares[counts > 0].mean())
    return {
        "top1": _percent(hits.mean()),
        "top5": top5,
        "mean_per_class": mean,
        "per_class": per_class,
    }


def places(logits: Tensor, targets: Tensor) -> Tensor:
    """Count the classes that come before each image's own: Q int64, of which 0 is a hit."""
    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=targets.device) < targets[:, None]
    # A NaN is no score: it counts as a class before the right one.
    place = (~(logits <= own) | (earlier & (logits == own))).sum(1)
    place[own[:, 0].isneginf()] = logits.shape[1]
    return place


def rate_table(name: str, results: list[RateResult], rate: float) -> dict[str, Any]:
    """State the chosen rate, how every rate did, and the verdict on the chosen one.

    The verdict is "diverged" where the only rate given did so, else "good". JSON has no infinity.
    """
    table = [asdict(result) for result in results]
    for row in table:
        if row["diverged"] and distributed.rank() == 0:
            fate = "left out" if len(table) > 1 else "the only one given"
            log.info(
                "%s: learning rate %g ended above the loss of guessing (%.4g), %s",
                name,
                row["rate"],
                row["loss"],
                fate,
            )
        row["loss"] = round(row["loss"], 4) if math.isfinite(row["loss"]) else None
        if row["held_out_top1"] is not None:
            row["held_out_top1"] = round(row["held_out_top1"], 2)
    diverged = any(row["diverged"] and row["rate"] == rate for row in table)
    return {"verdict": "diverged" if diverged else "good", "rate": rate, "rates": table}


def _percent(share: Tensor) -> float:
    return round(100 * share.item(), 2)
