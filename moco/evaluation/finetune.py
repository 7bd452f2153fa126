"""Classifiers trained on images that change from epoch to epoch: the official linear protocol, and
fine-tuning.

The order of the images and their crops are functions of (seed, epoch, image), and every global
batch is dealt out to the ranks, so that one rank and two train on the same images and, where no
BatchNorm is trained, to the same classifier.
Shapes: M training images, N images of a batch on this rank, D feature, L classes, R learning rates,
W ranks, S side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moco import distributed
from moco.config import UserError
from moco.distributed import broadcast_buffers, gather_ragged
from moco.evaluation.features import check_finite
from moco.evaluation.probe import Reading, Stack, Track, cosine, read_rates
from moco.images.labelled import RandomCrops

INITIAL_STD = 0.01  # of the official classifier's weights; its biases are 0


@dataclass
class Trained:
    """What `train_linear` made of one network.

    Attributes:
        stack: R classifiers, trained on all images.
        trial: R classifiers that never saw the held-out images; None if nothing was held out.
        losses: R, mean training loss of the last epoch in nats.
    """

    stack: Stack
    trial: Stack | None
    losses: Tensor


@torch.no_grad()
def train_linear(
    networks: dict[str, tuple[nn.Module, Sequence[float]]],
    crops: RandomCrops,
    held: dict[str, Tensor | None],
    num_classes: int,
    epochs: int,
    batch_size: int,
    milestones: Sequence[int],
    sgd_momentum: float,
    device: torch.device,
    track: Track,
) -> dict[str, Trained]:
    """Train linear classifiers on frozen networks by the official protocol.

    Networks stay in eval mode: BatchNorm uses its running statistics and does not update them. All
    networks and learning rates share the crops, all rates of a network its features. Weights start
    at N(0, 0.01), biases at 0; no weight decay; the rate falls tenfold at each milestone.

    Args:
        networks: Name to a network (images to N x D) and its R learning rates.
        crops: Training images.
        held: Name to the images, M bool, that its trial classifiers do not see, or to None.
        batch_size: Images per step over all ranks; the last batch of an epoch may be smaller.

    Source: arXiv:1911.05722, section 4.1; the official main_lincls.py.
    """
    trained: dict[str, Trained] = {}
    for epoch in track(range(epochs), ", ".join(networks)):
        factor = 0.1 ** sum(epoch >= milestone for milestone in milestones)
        batches = crops.order(epoch).split(batch_size)
        for result in trained.values():
            result.losses.zero_()
        for batch, (images, rows) in zip(
            batches, crops.batches(epoch, batches, device), strict=True
        ):
            labels = crops.labels[rows].to(device)
            for name, (network, rates) in networks.items():
                features = _features(network.eval(), images)
                if name not in trained:
                    check_finite(features, f"features ({name})")
                    trained[name] = _start(features, num_classes, rates, sgd_momentum, held[name])
                result = trained[name]
                result.losses += _step(result.stack, features, labels, factor, len(batch))
                if result.trial is not None:
                    seen = ~held[name]
                    mine, total = seen[rows].to(device), int(seen[batch].sum())
                    _step(result.trial, features[mine], labels[mine], factor, max(1, total))
    for result in trained.values():
        result.losses /= len(crops.images)
    return trained


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network, also on no images at all: a rank may get none of a ragged batch."""
    if len(images):
        return network(images).float()
    return network(images.new_zeros(2, *images.shape[1:])).float()[:0]


def _start(
    features: Tensor, classes: int, rates: Sequence[float], momentum: float, held: Tensor | None
) -> Trained:
    stacks = [
        Stack(features.shape[1], classes, rates, momentum, features.device, INITIAL_STD)
        for _ in range(2)
    ]
    losses = torch.zeros(len(rates), device=features.device)
    return Trained(stacks[0], None if held is None else stacks[1], losses)


def _step(stack: Stack, features: Tensor, labels: Tensor, factor: float, total: int) -> Tensor:
    """Take one step on a batch that is spread over the ranks; returns its R summed losses."""
    sums = stack.gradient(features, labels)
    if distributed.world_size() > 1:
        flat = torch.cat([part.flatten() for part in sums])
        torch.distributed.all_reduce(flat)
        parts = flat.split([part.numel() for part in sums])
        sums = tuple(part.view_as(like) for part, like in zip(parts, sums, strict=True))
    weight, bias, losses = sums
    stack.update(weight / total, bias / total, factor)
    return losses


def train_whole(
    network: nn.Module,
    feature_dim: int,
    crops: RandomCrops,
    num_classes: int,
    rate: float,
    epochs: int,
    batch_size: int,
    device: torch.device,
    track: Track,
) -> tuple[nn.Module, Reading]:
    """Fine-tune a copy of a network, and a linear classifier on it, with labels.

    SGD with Nesterov momentum 0.9, a cosine per step, no weight decay, BatchNorm in train mode
    (each rank its own batch), as in SimCLR's fine-tuning; an epoch's images are split into batches
    of nearly one size.

    Args:
        network: Images to N x D; not changed.
        rate: Learning rate of all layers.
        batch_size: Most images per step over all ranks.

    Returns:
        Images to N x L, in eval mode and the same on every rank, and what the rate came to.

    Source: arXiv:2002.05709, appendix B.5.
    """
    model = nn.Sequential(copy.deepcopy(network), nn.Linear(feature_dim, num_classes)).to(device)
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    model.train()
    parameters = [p.requires_grad_() for p in model.parameters()]
    optimiser = torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True)
    count, world = len(crops.images), distributed.world_size()
    steps = math.ceil(count / batch_size)
    if count // steps // world < 2:
        raise UserError(
            f"{count} labelled images in batches of {batch_size} leave a device fewer than 2, "
            "too few for BatchNorm: use fewer devices, a larger batch_size or more labels"
        )
    for epoch in track(range(epochs), f"rate {rate:g}"):
        batches = crops.order(epoch).tensor_split(steps)
        total_loss = torch.zeros((), device=device)
        for step, (images, rows) in enumerate(crops.batches(epoch, batches, device)):
            optimiser.param_groups[0]["lr"] = rate * cosine(
                (epoch * steps + step) / (epochs * steps)
            )
            labels = crops.labels[rows].to(device)
            loss = cross_entropy(model(images).float(), labels, reduction="sum")
            optimiser.zero_grad()
            (loss / len(batches[step])).backward()
            _sum_gradients(parameters)
            optimiser.step()
            total_loss += loss.detach()
    broadcast_buffers(model)
    losses = gather_ragged(total_loss.reshape(1)).sum(0, keepdim=True) / count
    return model.eval(), read_rates([rate], losses, None, num_classes)[0]


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up the gradients of all ranks in one message."""
    if distributed.world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
