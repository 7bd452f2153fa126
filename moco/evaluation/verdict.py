"""Verdict: is an encoder better than what needs no training, by more than chance?

The baselines are raw pixels and networks of the same architecture with fresh weights. All are
scored on the same test images, so two of them are compared image by image.
Shapes: Q test images, n draws of weights; hits are Q int8: 1 for a right answer, 0 for a wrong one,
-1 for an image that could not be read.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

FACTOR = 2.0  # standard errors; a smaller difference may be chance
WIDTH = 60  # characters of a line
UNREAD = -1
UNTRAINED, RAW_PIXELS = "untrained", "raw pixels"
REFERENCE = "reference"  # begins the name of other weights
RESAMPLINGS = 10_000  # of the test images
TRY = (
    "train longer (trainer.max_epochs), and see that the views keep what tells the classes apart "
    "(data.crop_min, data.jitter)"
)


@dataclass(frozen=True)
class Row:
    """A baseline, or the encoder itself, in points of 100.

    Attributes:
        top1: Of several draws the mean.
        error: Standard error of `top1` over test images and, of several, over draws.
        draws: Top-1 of each draw of weights; of what is not drawn there is one.
        ahead: By how much the encoder is better than this baseline.
        ahead_error: Standard error of `ahead`.
        interval: Of a reference: between what 95 % of resamplings of the test images lie.
    """

    name: str
    top1: float
    error: float
    draws: tuple[float, ...]
    ahead: float = 0.0
    ahead_error: float = 0.0
    interval: tuple[float, float] | None = None

    @property
    def side(self) -> int:
        """1 where the encoder is better by more than chance, -1 where it is worse, else 0."""
        if self.interval:
            return (self.interval[0] > 0) - (self.interval[1] < 0)
        if abs(self.ahead) <= FACTOR * self.ahead_error:
            return 0
        return 1 if self.ahead > 0 else -1

    @property
    def spread(self) -> float:
        """Return the standard deviation among the draws; 0 where there is one."""
        return float(torch.tensor(self.draws).std()) if len(self.draws) > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """An encoder beside its baselines, on the same test images.

    Attributes:
        title: What was scored.
        images: Test images that were read.
        chance: Share of the largest class in percent: what naming it every time would score.
        trained: The encoder.
        baselines: What it is compared with.
        ten_labels: Top-1 with ten labels of each class, of the encoder and of raw pixels, or None.
        void: Why there is no verdict, or empty.
    """

    title: str
    images: int
    chance: float
    trained: Row
    baselines: tuple[Row, ...]
    ten_labels: Sequence[float] | None = None
    void: str = ""

    @property
    def is_better(self) -> bool | None:
        """Tell whether the encoder beats chance and every baseline; None without a verdict."""
        if self.void:
            return None
        return self._beats_chance and all(row.side > 0 for row in self.baselines)

    @property
    def _beats_chance(self) -> bool:
        share = self.chance / 100
        error = 100 * math.sqrt(share * (1 - share) / self.images)
        return self.trained.top1 > self.chance + FACTOR * error

    def table(self) -> list[str]:
        """Return the lines of the table."""
        head = f"{self.title}, {self.images:,} test images"
        lines = [f"{head:<32}{'top-1':<12}{'ahead by':>8}"]
        for row in (self.trained, *self.baselines):
            name = row.name
            if name == UNTRAINED:
                count = len(row.draws)
                name += f", mean of {count} draws" if count > 1 else ", one draw"
            line = f"  {name:<30}{row.top1:>5.1f} ± {row.error:<4.1f}"
            if row is not self.trained:
                line += f"{row.ahead:>+8.1f} ± {row.ahead_error:.1f}"
            lines.append(line.rstrip())
            if row.interval:
                low, high = row.interval
                lines.append(f"    95 % of resamplings{'':19}{low:>+8.1f} to {high:+.1f}")
        return [*lines, f"  {'the largest class every time':<30}{self.chance:>5.1f}"]

    def sentence(self, findings: Sequence[str] = ()) -> str:
        """Say whether the encoder is better, and what to try where it is not.

        Args:
            findings: What the caller has found to be wrong, with its remedy; told first.
        """
        if self.void:
            return f"No verdict: {self.void}."
        better, even, worse = (
            _listed([row for row in self.baselines if row.side == side]) for side in (1, 0, -1)
        )
        # More test images settle what is even; they do not mend what is worse.
        tries = [] if worse else [*filter(None, map(_settle, self.baselines))]
        what_to_try = "; ".join([*findings, *(tries or [TRY]), *self._with_few_labels()])
        if not self._beats_chance:
            return f"Not better than naming the largest class every time: {what_to_try}."
        if self.is_better:
            alone = any(row.name == UNTRAINED and len(row.draws) == 1 for row in self.baselines)
            caveat = " (one draw of weights: others may differ by some points)" if alone else ""
            return f"Better than {better} by more than chance{caveat}."
        parts = [f"worse than {worse}"] if worse else []
        parts += [f"not better than {even} by more than chance"] if even else []
        parts += [f"better than {better}"] if better else []
        text = ", ".join(parts)
        return f"{text[0].upper()}{text[1:]}: {what_to_try}."

    def _with_few_labels(self) -> list[str]:
        """Say where the encoder is clearly better than raw pixels with few labels alone."""
        pixels = [row for row in self.baselines if row.name == RAW_PIXELS and row.side < 1]
        own, other = self.ten_labels or (0.0, 0.0)
        if not pixels or own - other <= FACTOR * math.hypot(self.trained.error, pixels[0].error):
            return []
        return [f"with ten labels of each class it has {own:.1f}, raw pixels {other:.1f}"]

    def lines(self, findings: Sequence[str] = ()) -> list[str]:
        """Return the table and the sentence, in lines of at most 60 characters."""
        sentence = self.sentence(findings)
        return [*self.table(), *textwrap.wrap(sentence, WIDTH, break_on_hyphens=False)]

    def as_dict(self, findings: Sequence[str] = ()) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "score": self.title,
            "test_images": self.images,
            "chance": round(self.chance, 2),
            "trained": _plain(self.trained),
            **{row.name.replace(" ", "_"): _plain(row) for row in self.baselines},
            "is_better": self.is_better,
            "sentence": self.sentence(findings),
        }


def compare(
    title: str,
    labels: Tensor,
    trained: Tensor,
    baselines: dict[str, list[Tensor]],
    ten_labels: Sequence[float] | None = None,
    void: str = "",
) -> Comparison:
    """Compare an encoder with baselines on the test images that could be read for all of them.

    The error of a difference has two parts, added as squares. That of the images is the root of
    mean(d²) / Q, where d is an image's hit less the baseline's, or less the mean hit of its draws:
    McNemar's test, which five images in favour pass at the least. That of the draws is the root of
    s² (1 + 1/n), where s is the standard deviation among the draws: the encoder began as a draw,
    too, so it has to leave the range of a further one, and not only the range of their mean. Where
    nothing was learnt, chance alone passes two such errors in 2 of 100 cases at most if it lies in
    the images, and in 9 of 100 with three draws, 6 with five and 4 with ten if it lies in the draws
    alone. One draw has no spread that could be known, which the sentence says.

    Args:
        labels: Q int64, classes of the test images.
        trained: Hits of the encoder.
        baselines: Name to the hits of each draw; of what is not drawn there is one.
        title, ten_labels, void: As of `Comparison`.

    Source: Q. McNemar, Psychometrika 12, 1947; s² (1 + 1/n) is the variance of a prediction.
    """
    drawn = [hits for draws in baselines.values() for hits in draws]
    is_read = torch.stack([trained, *drawn]).ne(UNREAD).all(0)
    own, count = trained[is_read].double(), int(is_read.sum())
    rows = []
    for name, draws in baselines.items():
        hits = torch.stack([each[is_read] for each in draws]).double()  # n Q
        difference = own - hits.mean(0)
        drawn_variance = hits.mean(1).var().item() if len(hits) > 1 else 0.0
        of_images = difference.square().mean().item() / count
        ahead_error = math.sqrt(of_images + drawn_variance * (1 + 1 / len(hits)))
        error = math.sqrt(_variance(hits.mean(0)) + drawn_variance / len(hits))
        draws_top1 = tuple((100 * hits.mean(1)).tolist())
        top1, ahead = 100 * hits.mean().item(), 100 * difference.mean().item()
        interval = resampled(difference) if name.startswith(REFERENCE) else None
        rows.append(Row(name, top1, 100 * error, draws_top1, ahead, 100 * ahead_error, interval))
    top1, error = 100 * own.mean().item(), 100 * math.sqrt(_variance(own))
    largest = torch.bincount(labels.to(is_read.device)[is_read]).max().item()
    alone = Row("trained", top1, error, (top1,))
    return Comparison(title, count, 100 * largest / count, alone, tuple(rows), ten_labels, void)


def resampled(difference: Tensor) -> tuple[float, float]:
    """Return the interval of a difference that holds 95 % of resamplings of the test images.

    A resampling of pairs is known by how many of them favour the encoder and how many the other, so
    these two numbers are drawn (the percentile bootstrap; B. Efron, Ann. Statist. 7, 1979).

    Args:
        difference: Q; 1, 0 or -1 for each image.
    """
    count = len(difference)
    favour = [(difference == sign).sum().item() / count for sign in (1, -1)]
    drawn = np.random.default_rng(0).multinomial(
        count, [*favour, max(1 - sum(favour), 0.0)], RESAMPLINGS
    )
    low, high = np.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / count, (0.025, 0.975))
    return float(low), float(high)


def by_image(hits: Tensor, rows: Tensor, count: int) -> Tensor:
    """Put answers in the order of the test images.

    Args:
        hits: Whether each answer is right.
        rows: Its image.
        count: Q.
    """
    found = torch.full((count,), UNREAD, dtype=torch.int8)
    found[rows.cpu()] = hits.cpu().to(torch.int8)
    return found


def _variance(hits: Tensor) -> float:
    """Return the variance of the mean over images: for hits of one network p (1 - p) / Q."""
    return hits.var(unbiased=False).item() / len(hits)


def _settle(row: Row) -> str:
    """Say what may settle a difference of one standard error to two; empty for any other."""
    if not row.ahead_error < row.ahead <= FACTOR * row.ahead_error:
        return ""
    if row.spread > row.ahead_error / 2:
        return (
            f"{len(row.draws)} untrained networks differ by "
            f"{max(row.draws) - min(row.draws):.1f} points, so draw more (evaluation takes "
            f"--untrained_draws {4 * len(row.draws)})"
        )
    times = math.floor(10 * (FACTOR * row.ahead_error / row.ahead) ** 2 + 1) / 10
    return f"score {times:.1f} times as many test images"


def _listed(rows: Sequence[Row]) -> str:
    """Name baselines in a sentence."""
    drawn = {1: "an untrained network"}
    names = [
        drawn.get(len(row.draws), "the untrained networks") if row.name == UNTRAINED else row.name
        for row in rows
    ]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _plain(row: Row) -> dict[str, Any]:
    values = {"top1": row.top1, "standard_error": row.error, "draws": len(row.draws)}
    if len(row.draws) > 1:
        values["top1_of_draws"] = [round(each, 2) for each in row.draws]
    if row.name != "trained":
        values |= {"ahead_by": row.ahead, "ahead_by_standard_error": row.ahead_error}
    if row.interval:
        values["ahead_by_interval_95"] = [round(each, 2) for each in row.interval]
    return {name: round(v, 2) if isinstance(v, float) else v for name, v in values.items()}
