"""Linear probe: how well a linear classifier does on features that stay as they are.

The features are taken once. One classifier per learning rate is trained on them, all together as
one stacked matrix. A held-out part of the training images, never the test images, chooses the rate,
and the classifier of that rate is trained again on all training images. `moco.evaluation.finetune`
trains on images that change from epoch to epoch.
Shapes: M training images, N rows of a batch, D feature, L classes, R learning rates, V views of
each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moco.config import UserError
from moco.evaluation.features import check_finite
from moco.evaluation.labels import check_labels, hold_out
from moco.random import permutation

# Two rates per factor of ten, for standardised features.
SWEEP = tuple(round(10 ** (exponent / 2), 7 - exponent // 2) for exponent in range(-8, 5))
Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass
class RateResult:
    """How training ended at one learning rate.

    Attributes:
        loss: Mean training loss of the last epoch in nats; infinite if it overflowed.
        held_out_top1: Accuracy on the held-out part in percent; None if nothing was held out.
        diverged: Whether the loss ended above log(L), that of a classifier which knows nothing.
    """

    rate: float
    loss: float
    held_out_top1: float | None
    diverged: bool


@dataclass(eq=False)
class LinearProbe:
    """A linear classifier on frozen features that chooses its learning rate itself.

    It standardises the features, starts from zero weights, and takes SGD steps with momentum, a
    cosine schedule per step and no weight decay.

    Attributes:
        learning_rates: R rates to try; one rate is taken as it is.
        epochs: Passes over the features.
        batch_size: Rows per step.
        sgd_momentum: Of SGD.
        held_out: Share of every class that chooses the rate.
        seed: Of the order and of the held-out part.
        rate: The rate that `fit` chose.
        results: How every rate did, in their order.
        weight, bias: L x D and L, for features as they are: the standardisation is folded in.

    Example:
        probe = LinearProbe().fit(features, labels)
        accuracy = (probe.predict(test_features) == test_labels).float().mean()
    """

    learning_rates: Sequence[float] = SWEEP
    epochs: int = 100
    batch_size: int = 1024
    sgd_momentum: float = 0.9
    held_out: float = 0.1
    seed: int = 0
    rate: float = field(default=math.nan, init=False)
    results: list[RateResult] = field(default_factory=list, init=False)
    weight: Tensor = field(init=False, repr=False)
    bias: Tensor = field(init=False, repr=False)

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
            judged: M x D features that score the held-out part; the first view unless given.
            track: Wraps the epochs of each training, for a progress bar.

        Raises:
            UserError: A feature is not finite, all labels are one class, no part can be held out,
                or every rate diverged.
        """
        views = features if features.ndim == 3 else features[None]
        check_labels(labels)
        for view in views:
            check_finite(view, "training features")
        count, rates = num_classes or int(labels.max()) + 1, self.learning_rates
        several, top1 = len(rates) > 1, None
        everything = torch.ones_like(labels, dtype=torch.bool)
        held = hold_out(labels, self.held_out, self.seed) if several else ~everything
        stack, losses = self._train(views, labels, ~held, rates, count, track)
        if several:
            logits = stack.logits((views[0] if judged is None else judged)[held])
            top1 = 100 * (logits.argmax(2) == labels[held, None]).double().mean(0)
        self.results = rate_results(rates, losses, top1, count)
        self.rate = rates[choose(self.results)]
        if several:
            stack, _ = self._train(views, labels, everything, [self.rate], count, track)
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
        # One buffer for all batches saves 2 ms per step of page faults.
        buffer = views.new_empty(self.batch_size, views.shape[2])
        losses = torch.zeros(len(rates), device=views.device)
        for epoch in track(range(self.epochs), f"{len(rates)} rates"):
            view = views[epoch % len(views)]
            order = permutation(self.seed, "probe", epoch, len(rows)).to(view.device)
            losses = torch.zeros_like(losses)
            for step, index in enumerate(order.split(self.batch_size)):
                batch = torch.index_select(view, 0, index, out=buffer[: len(index)])
                losses += stack.backward(batch, labels[index], len(index))
                stack.update(cosine((epoch * steps + step) / (self.epochs * steps)))
        stack.fold(mean, std)
        return stack, losses / len(rows)


class Stack:
    """R linear classifiers that see the same features, each with its own learning rate.

    Their weights stand above each other in one R*L x D matrix, so that one matrix product scores
    all of them. A step of SGD is proportional to the gradient: each classifier's gradient is
    multiplied by its rate, and one optimiser, whose rate is the schedule's factor, serves all.

    Args:
        learning_rates: R.
        initial_std: Of normal weights (seeded with `seed`, the same for every rate); biases are 0.

    Attributes:
        weight, bias: R*L x D and R*L x 1.
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
        self.num_classes = num_classes
        self.rates = torch.tensor(learning_rates, device=device)
        self._row_rates = self.rates.repeat_interleave(num_classes)[:, None]
        generator = torch.Generator().manual_seed(seed)
        first = initial_std * torch.randn(num_classes, feature_dim, generator=generator)
        self.weight = first.repeat(len(learning_rates), 1).to(device)
        self.bias = self.weight.new_zeros(len(self.weight), 1)
        self.parameters = [self.weight, self.bias]
        self._optimiser = torch.optim.SGD(self.parameters, 1.0, sgd_momentum, fused=True)

    def _scores(self, features: Tensor) -> Tensor:
        """Score N x D features: R x L x N, the order in which a softmax over L is fast."""
        scores = torch.addmm(self.bias, self.weight, features.T)
        return scores.view(len(self.rates), self.num_classes, len(features))

    def logits(self, features: Tensor) -> Tensor:
        """Return N x R x L scores."""
        return self._scores(features).permute(2, 0, 1)

    def backward(self, features: Tensor, labels: Tensor, total: int) -> Tensor:
        """Set the gradients that N rows of a batch of `total` give; return R summed losses.

        The gradient of the cross-entropy is written out: softmax less one-hot, times features. By
        autograd a sweep of 13 rates on 50,000 x 512 features takes 1.2 times as long (one thread).
        """
        log_p = self._scores(features).log_softmax(1)
        target = labels.expand(len(self.rates), 1, -1)
        losses = -log_p.gather(1, target).sum((1, 2))
        minus_one = log_p.new_full((), -1.0).expand(target.shape)
        error = log_p.exp_().scatter_add_(1, target, minus_one).flatten(0, 1)
        scale = self._row_rates / total
        self.weight.grad = (error @ features).mul_(scale)
        self.bias.grad = error.sum(1, keepdim=True).mul_(scale)
        return losses

    def update(self, factor: float) -> None:
        """Take one SGD step with each rate times `factor`."""
        self._optimiser.param_groups[0]["lr"] = factor
        self._optimiser.step()

    def fold(self, mean: Tensor, std: Tensor) -> None:
        """Change the weights to take features that are not standardised."""
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
    """Return mean and deviation of each feature over views and rows; a constant keeps its scale."""
    mean = torch.stack([view[rows].mean(0) for view in views]).mean(0)
    variance = torch.stack([(view[rows] - mean).square().mean(0) for view in views]).mean(0)
    std = variance.sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)


def rate_results(
    rates: Sequence[float], losses: Tensor, held_out_top1: Tensor | None, num_classes: int
) -> list[RateResult]:
    """Collect R mean losses, and R accuracies if a part was held out, by learning rate."""
    top1: Sequence[Any] = [None] * len(rates) if held_out_top1 is None else held_out_top1.tolist()
    chance = math.log(num_classes)
    return [
        RateResult(rate, loss if math.isfinite(loss) else math.inf, accuracy, not loss <= chance)
        for rate, loss, accuracy in zip(rates, losses.tolist(), top1, strict=True)
    ]


def choose(results: list[RateResult]) -> int:
    """Return the place of the best rate that did not diverge; of equals the smaller rate.

    Raises:
        UserError: All diverged; one rate alone may end above log(L), as long as it is finite.
    """
    alone = len(results) == 1 and math.isfinite(results[0].loss)
    places = [n for n, result in enumerate(results) if alone or not result.diverged]
    if not places:
        rates = ", ".join(f"{result.rate:g}" for result in results)
        raise UserError(
            f"no learning rate ended below the loss of a classifier that knows nothing ({rates}): "
            "they diverged, so give smaller --learning_rates, or the smallest got nowhere in so "
            "few steps, so give more --epochs"
        )
    return max(places, key=lambda n: (results[n].held_out_top1 or 0.0, -results[n].rate))
