"""Linear probe: what a linear classifier finds in features that stay as they are.

Features are taken once; then one classifier per learning rate is trained, all together as one
stacked matrix. The rate is chosen on a held-out part of the training images, never on the test
images, and the classifier of that rate is trained again on all of them. `moco.evaluation.finetune`
trains on images that change from epoch to epoch.
Shapes: M training images, N rows of a batch, D feature, L classes, R learning rates, V views of
each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moco.config import UserError
from moco.evaluation.features import check_finite
from moco.random import permutation

# Half decades, on standardised features.
SWEEP = tuple(round(10 ** (exponent / 2), 7 - exponent // 2) for exponent in range(-8, 5))
Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass
class Reading:
    """What one learning rate came to.

    Attributes:
        rate: Learning rate.
        loss: Mean training loss of the last epoch in nats; infinite if it overflowed.
        held_out_top1: Accuracy on the held-out part in percent; None if nothing was held out.
        diverged: Whether the loss ended above log(L), that of a classifier which knows nothing.
    """

    rate: float
    loss: float
    held_out_top1: float | None
    diverged: bool


class LinearProbe:
    """A linear classifier on frozen features, with its learning rate chosen by itself.

    Standardised features, zero weights at first, SGD with momentum, a cosine per step, no weight
    decay.

    Args:
        learning_rates: R rates to try; one rate is taken as it is.
        epochs: Passes over the features.
        batch_size: Rows per step.
        sgd_momentum: Of SGD.
        held_out: Share of every class that chooses the rate.
        seed: Of the order and of the held-out part.

    Attributes:
        weight, bias: L x D and L, for features as they are: the standardisation is folded in.
        rate: The rate chosen.
        readings: One per rate, in their order.

    Example:
        probe = LinearProbe().fit(features, labels)
        accuracy = (probe.predict(test_features) == test_labels).float().mean()
    """

    def __init__(
        self,
        learning_rates: Sequence[float] = SWEEP,
        epochs: int = 100,
        batch_size: int = 1024,
        sgd_momentum: float = 0.9,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.learning_rates = tuple(learning_rates)
        self.epochs, self.batch_size, self.sgd_momentum = epochs, batch_size, sgd_momentum
        self.held_out, self.seed = held_out, seed
        self.rate = math.nan
        self.readings: list[Reading] = []
        self.weight = self.bias = torch.empty(0)

    @torch.no_grad()
    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int | None = None,
        judged: Tensor | None = None,
        track: Track = lambda epochs, label: epochs,
    ) -> LinearProbe:
        """Choose the rate and train the classifier.

        Args:
            features: M x D, or V x M x D: epoch e takes view e modulo V of every image.
            labels: M int64.
            num_classes: L; the largest label and one unless given.
            judged: M x D features on which the held-out part is scored; the first view unless
                given.
            track: Wraps the epochs of each training, for a progress bar.

        Raises:
            UserError: A feature is not finite, all labels are one class, no part can be held out,
                or every rate diverged.
        """
        views = features if features.ndim == 3 else features[None]
        check_labels(labels)
        for view in views:
            check_finite(view, "training features")
        count = num_classes or int(labels.max()) + 1
        rates, chosen = self.learning_rates, 0
        if len(rates) > 1:
            held = hold_out(labels, self.held_out, self.seed)
            stack, losses = self._train(views, labels, ~held, rates, count, track)
            logits = stack.logits((views[0] if judged is None else judged)[held])
            top1 = 100 * (logits.argmax(2) == labels[held, None]).double().mean(0)
            self.readings = read_rates(rates, losses, top1, count)
            chosen = choose(self.readings)
        self.rate = rates[chosen]
        everything = torch.ones_like(labels, dtype=torch.bool)
        stack, losses = self._train(views, labels, everything, [self.rate], count, track)
        if len(rates) == 1:
            self.readings = read_rates(rates, losses, None, count)
            choose(self.readings)
        self.weight, self.bias = stack.classifier(0)
        return self

    def predict(self, features: Tensor) -> Tensor:
        """Return the class of each row: N x D to N int64."""
        return self.logits(features).argmax(1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return N x L scores of N x D features."""
        return torch.addmm(self.bias, features.float(), self.weight.T)

    def _train(
        self,
        views: Tensor,
        labels: Tensor,
        chosen: Tensor,
        rates: Sequence[float],
        num_classes: int,
        track: Track,
    ) -> tuple[Stack, Tensor]:
        """Train one classifier per rate on the chosen rows; also return the last losses."""
        rows = chosen.nonzero()[:, 0]
        mean, std = _moments(views, rows)
        views = (views[:, rows] - mean).div_(std)
        labels = labels[rows]
        stack = Stack(views.shape[2], num_classes, rates, self.sgd_momentum, views.device)
        steps = math.ceil(len(rows) / self.batch_size)
        buffer = views.new_empty(
            self.batch_size, views.shape[2]
        )  # spares 2 ms a step of fresh pages
        losses = torch.zeros(len(rates), device=views.device)
        for epoch in track(range(self.epochs), f"{len(rates)} rates"):
            view = views[epoch % len(views)]
            order = permutation(self.seed, "probe", epoch, len(rows)).to(view.device)
            losses = torch.zeros_like(losses)
            for step, index in enumerate(order.split(self.batch_size)):
                factor = cosine((epoch * steps + step) / (self.epochs * steps))
                batch = torch.index_select(view, 0, index, out=buffer[: len(index)])
                losses += stack.step(batch, labels[index], factor, len(index))
        stack.fold(mean, std)
        return stack, losses / len(rows)


class Stack:
    """R linear classifiers that see the same features, each with its own learning rate.

    Their weights stand above each other in one R*L x D matrix, so that a step is two matrix
    products. The gradient
    is written out: softmax less one-hot, times features. SGD is torch's: v <- mu v + g, w <- w - lr
    v.

    Args:
        learning_rates: R.
        initial_std: Of normal weights (seeded with `seed`, the same for every rate); biases are 0.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        learning_rates: Sequence[float],
        sgd_momentum: float,
        device: torch.device | str,
        initial_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.num_classes, self.sgd_momentum = num_classes, sgd_momentum
        self.rates = torch.tensor(learning_rates, device=device)
        generator = torch.Generator().manual_seed(seed)
        first = initial_std * torch.randn(num_classes, feature_dim, generator=generator)
        self.weight = first.repeat(len(learning_rates), 1).to(device)  # R*L x D
        self.bias = self.weight.new_zeros(len(self.weight), 1)
        self._row_rates = self.rates.repeat_interleave(num_classes)[:, None]
        self._weight_velocity = torch.zeros_like(self.weight)
        self._bias_velocity = torch.zeros_like(self.bias)

    def _scores(self, features: Tensor) -> Tensor:
        """Score N x D features: R x L x N, the order in which a softmax over L is fast."""
        scores = torch.addmm(self.bias, self.weight, features.T)
        return scores.view(len(self.rates), self.num_classes, len(features))

    def logits(self, features: Tensor) -> Tensor:
        """Return N x R x L scores."""
        return self._scores(features).permute(2, 0, 1)

    def gradient(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the cross-entropy's gradient over N rows.

        Returns:
            R*L x D for the weights, R*L x 1 for the biases, and R summed losses in nats.
        """
        log_p = self._scores(features).log_softmax(1)
        target = labels.expand(len(self.rates), 1, -1)
        losses = -log_p.gather(1, target).sum((1, 2))
        error = log_p.exp_().scatter_add_(1, target, log_p.new_tensor(-1.0).expand(target.shape))
        error = error.flatten(0, 1)
        return error @ features, error.sum(1, keepdim=True), losses

    def update(self, weight: Tensor, bias: Tensor, factor: float) -> None:
        """Take one SGD step along mean gradients, each rate times `factor`."""
        self._weight_velocity.mul_(self.sgd_momentum).add_(weight)
        self._bias_velocity.mul_(self.sgd_momentum).add_(bias)
        rates = self._row_rates * -factor
        self.weight.addcmul_(self._weight_velocity, rates)
        self.bias.addcmul_(self._bias_velocity, rates)

    def step(self, features: Tensor, labels: Tensor, factor: float, total: int) -> Tensor:
        """Train on one batch on this process alone; returns R summed losses."""
        weight, bias, losses = self.gradient(features, labels)
        self.update(weight.div_(total), bias.div_(total), factor)
        return losses

    def fold(self, mean: Tensor, std: Tensor) -> None:
        """Take a standardisation of the features into the weights."""
        self.weight /= std
        self.bias -= self.weight @ mean[:, None]

    def classifier(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the weight L x D and the bias L of one rate."""
        rows = slice(number * self.num_classes, (number + 1) * self.num_classes)
        return self.weight[rows].clone(), self.bias[rows, 0].clone()


def cosine(share: float) -> float:
    """Return the factor of the rate after a share of all steps, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))


def _moments(views: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over views and rows; a constant keeps its scale."""
    mean = torch.stack([view[rows].mean(0) for view in views]).mean(0)
    variance = torch.stack([(view[rows] - mean).square().mean(0) for view in views]).mean(0)
    std = variance.sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)


def check_labels(labels: Tensor) -> None:
    """Raise UserError unless there are two classes at least."""
    found = labels.unique()
    if len(found) < 2:
        raise UserError(
            f"all {len(labels)} training labels are one class: nothing to tell apart, "
            "give two or more"
        )


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Mark a share of every class, at least one image of a class that has two: M bool.

    Raises:
        UserError: No class has two images.
    """
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for number in labels.unique().tolist():
        members = (labels == number).nonzero()[:, 0]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = permutation(seed, "held out", number, len(members))[:count]
        held[members[order.to(members.device)]] = True
    if not held.any():
        raise UserError(
            "every class has one labelled image, so that no part can be held out to choose among "
            "learning rates: give more labels, or one rate as in --learning_rates [0.1]"
        )
    return held


def few_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose a fraction of every class, at least one image: rows in rising order, int64."""
    rows = []
    for number in labels.unique().tolist():
        members = (labels == number).nonzero()[:, 0]
        count = max(1, round(fraction * len(members)))
        rows.append(members[permutation(seed, "labels", number, len(members))[:count]])
    return torch.cat(rows).sort()[0]


def read_rates(
    rates: Sequence[float], losses: Tensor, held_out_top1: Tensor | None, num_classes: int
) -> list[Reading]:
    """Note what each rate came to."""
    top1: Sequence[Any] = [None] * len(rates) if held_out_top1 is None else held_out_top1.tolist()
    return [
        Reading(
            rate,
            loss if math.isfinite(loss) else math.inf,
            accuracy,
            not loss <= math.log(num_classes),
        )
        for rate, loss, accuracy in zip(rates, losses.tolist(), top1, strict=True)
    ]


def choose(readings: list[Reading]) -> int:
    """Return the place of the best rate that did not diverge; the smaller of equals.

    Raises:
        UserError: All diverged; one rate alone may end above log(L), as long as it is finite.
    """
    alone = len(readings) == 1 and math.isfinite(readings[0].loss)
    places = [n for n, reading in enumerate(readings) if alone or not reading.diverged]
    if not places:
        rates = ", ".join(f"{reading.rate:g}" for reading in readings)
        raise UserError(f"every learning rate diverged ({rates}): give smaller --learning_rates")
    return max(places, key=lambda n: (readings[n].held_out_top1 or 0.0, -readings[n].rate))
