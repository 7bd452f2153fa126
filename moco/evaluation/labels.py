"""Labels: which images of every class are used, and which are held out. M labels, int64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moco.config import UserError
from moco.random import permutation


def check_labels(labels: Tensor) -> None:
    """Raise UserError unless there are two classes at least."""
    if len(labels.unique()) < 2:
        raise UserError(
            f"all {len(labels)} training labels are one class: give images of two or more"
        )


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Mark a share of every class, at least one image of a class that has two: M bool.

    Raises:
        UserError: No class has two images.
    """
    rows = _pick(labels, lambda n: min(max(1, round(share * n)), n - 1), "held out", seed)
    if not len(rows):
        raise UserError(
            "every class has one labelled image, so that no part can be held out to choose among "
            "learning rates: give more labels, or one rate as in --learning_rates [0.1]"
        )
    return torch.zeros_like(labels, dtype=torch.bool).index_fill_(0, rows, True)


def few_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose a fraction of every class, at least one image: rows in rising order, int64."""
    return _pick(labels, lambda n: max(1, round(fraction * n)), "labels", seed).sort()[0]


def _pick(labels: Tensor, count: Callable[[int], int], purpose: str, seed: int) -> Tensor:
    """Choose `count(n)` images at random from the n of every class."""
    rows = []
    for number in labels.unique().tolist():
        members = (labels == number).nonzero()[:, 0]
        order = permutation(seed, purpose, number, len(members)).to(members.device)
        rows.append(members[order[: count(len(members))]])
    return torch.cat(rows)
