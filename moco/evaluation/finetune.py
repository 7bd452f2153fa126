"""Classifiers trained on crops that change from epoch to epoch: the official linear protocol, and
fine-tuning.

The order of the images and their crops are functions of (seed, epoch, image), and every global
batch is dealt out to the ranks. One rank and two therefore train on the same images and, where no
BatchNorm is trained, to the same classifier.
Shapes: M training images, N images of a batch on this rank, D feature, L classes, R learning rates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moco import distributed
from moco.config import UserError
from moco.distributed import broadcast_buffers, gather_ragged
from moco.evaluation.features import check_finite, feature_shape
from moco.evaluation.labels import hold_out
from moco.evaluation.probe import RateResult, Stack, cosine, rate_results
from moco.images.labelled import RandomCrops
from moco.judge_config import LinearConfig
from moco.log import track

INITIAL_STD = 0.01  # of the official classifier's weights; its biases are 0
SGD_MOMENTUM = 0.9


class Classifiers:
    """The linear classifiers of one network, all learning rates at once.

    Args:
        feature_dim, num_classes, rates, device: As of `Stack`.
        held: The images, M bool, that `trial` does not see, or None.
        seed: Of the initial weights.

    Attributes:
        stack: R classifiers, trained on all images.
        trial: R classifiers that never saw the held-out images; None if nothing was held out.
        losses: R, mean training loss of the last epoch in nats.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        rates: Sequence[float],
        device: torch.device,
        held: Tensor | None,
        seed: int,
    ) -> None:
        args = feature_dim, num_classes, rates, SGD_MOMENTUM, device, INITIAL_STD, seed
        self.stack, self.trial = Stack(*args), None if held is None else Stack(*args)
        self.losses = torch.zeros(len(rates), device=device)
        self.held = held

    def step(
        self, features: Tensor, labels: Tensor, rows: Tensor, batch: Tensor, factor: float
    ) -> None:
        """Train on this rank's rows of a global batch, each rate times `factor`."""
        self.losses += _step(self.stack, features, labels, factor, len(batch))
        if self.trial is not None:
            mine, total = ~self.held[rows].to(labels.device), int((~self.held[batch]).sum())
            _step(self.trial, features[mine], labels[mine], factor, max(1, total))


@torch.no_grad()
def train_linear(
    networks: dict[str, tuple[nn.Module, Sequence[float]]],
    crops: RandomCrops,
    config: LinearConfig,
    device: torch.device,
) -> dict[str, Classifiers]:
    """Train linear classifiers on frozen networks by the official protocol.

    Networks stay in eval mode: BatchNorm uses its running statistics and does not update them. All
    networks and learning rates share the crops, all rates of a network its features. Weights start
    at N(0, 0.01), biases at 0; no weight decay; the rate falls tenfold at each milestone, in v3's
    protocols along a cosine, epoch by epoch. Where there are several rates, classifiers that do not
    see a held-out part are trained besides.

    Args:
        networks: Name to a network (images to N x D) and its R learning rates.
        config: Epochs, milestones, share that is held out, and images per step over all ranks.

    Source: arXiv:1911.05722, section 4.1, and arXiv:2104.02057, section 5; the official
    main_lincls.py of both.
    """
    trained: dict[str, Classifiers] = {}
    for epoch in track(range(config.epochs), ", ".join(networks)):
        factor = 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
        if config.protocol in ("v3", "v3_vit"):
            factor = cosine(epoch / config.epochs)
        batches = crops.order(epoch).split(config.batch_size)
        for classifiers in trained.values():
            classifiers.losses.zero_()
        cropped = crops.batches(epoch, batches, device)
        for batch, (images, rows) in zip(batches, cropped, strict=True):
            labels = crops.images.labels(rows).to(device)
            for name, (network, rates) in networks.items():
                features = _features(network.eval(), images)
                if name not in trained:
                    trained[name] = _start(name, features, rates, crops, config.held_out)
                trained[name].step(features, labels, rows, batch, factor)
    for classifiers in trained.values():
        classifiers.losses = gather_ragged(classifiers.losses[None]).sum(0) / len(crops.images)
    return trained


def _start(
    name: str, features: Tensor, rates: Sequence[float], crops: RandomCrops, share: float
) -> Classifiers:
    """Build the classifiers of a network once its first features have been seen to be finite."""
    with distributed.together():
        check_finite(features, f"features ({name})")
    source, seed = crops.images.source, crops.seed
    held = hold_out(source.labels, share, seed) if len(rates) > 1 else None
    size = features.shape[1], len(source.classes)
    return Classifiers(*size, rates, features.device, held, seed)


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network, also on no images at all: a rank may get none of a ragged batch."""
    some = images if len(images) else images.new_zeros(2, *images.shape[1:])
    return network(some).float()[: len(images)]


def _step(stack: Stack, features: Tensor, labels: Tensor, factor: float, total: int) -> Tensor:
    """Take one step on a batch that is spread over the ranks; return this rank's summed losses."""
    losses = stack.backward(features, labels, total)
    _sum_gradients(stack.parameters)
    stack.update(factor)
    return losses


def train_whole(
    network: nn.Module, crops: RandomCrops, rate: float, config: LinearConfig, device: torch.device
) -> tuple[nn.Module, RateResult]:
    """Fine-tune a copy of a network, and a linear classifier on it, with labels.

    SGD with Nesterov momentum 0.9, a cosine per step, no weight decay, BatchNorm in train mode
    (each rank its own batch), as in SimCLR's fine-tuning; an epoch's images are split into batches
    of nearly one size.

    Args:
        network: Images to N x D; not changed.
        rate: Learning rate of all layers.
        config: Epochs, and most images per step over all ranks.

    Returns:
        Images to N x L, in eval mode and the same on every rank, and how the rate did.

    Source: arXiv:2002.05709, appendix B.5.
    """
    count = len(crops.images)
    steps = math.ceil(count / config.batch_size)
    if count // steps // distributed.world_size() < 2:
        raise UserError(
            f"{count} labelled images in batches of {config.batch_size} leave a device fewer than "
            "2, too few for BatchNorm: use fewer devices, a larger batch_size or more labels"
        )
    num_classes = len(crops.images.source.classes)
    width = feature_shape(network.eval(), crops.images.config, device)[0]
    classifier = nn.Linear(width, num_classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(copy.deepcopy(network), classifier).to(device)
    total_loss = _fit(model.train().requires_grad_(), crops, rate, steps, config.epochs, device)
    broadcast_buffers(model)
    losses = gather_ragged(total_loss[None]).sum(0, keepdim=True) / count
    return model.eval(), rate_results([rate], losses, None, num_classes)[0]


def _fit(
    model: nn.Module, crops: RandomCrops, rate: float, steps: int, epochs: int, device: torch.device
) -> Tensor:
    """Train a model with `steps` steps an epoch; return this rank's summed loss of the last one."""
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(parameters, rate, SGD_MOMENTUM, nesterov=True)
    for epoch in track(range(epochs), f"rate {rate:g}"):
        batches = crops.order(epoch).tensor_split(steps)
        total_loss = torch.zeros((), device=device)
        for step, (images, rows) in enumerate(crops.batches(epoch, batches, device)):
            done = (epoch * steps + step) / (epochs * steps)
            optimiser.param_groups[0]["lr"] = rate * cosine(done)
            labels = crops.images.labels(rows).to(device)
            loss = cross_entropy(model(images).float(), labels, reduction="sum")
            optimiser.zero_grad()
            (loss / len(batches[step])).backward()
            _sum_gradients(parameters)
            optimiser.step()
            total_loss += loss.detach()
    return total_loss


def _sum_gradients(parameters: list[Tensor]) -> None:
    """Add up the gradients of all ranks in one message."""
    if distributed.world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
