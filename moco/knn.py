"""kNN: how good is an encoder, without training anything (1805.01978, section 3.4; the official CIFAR demo).

Features of a labelled bank vote on the labels of queries. Every score belongs to a layer, a k and a temperature.
Shapes: M bank images, Q queries, D feature, k neighbours, L classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moco import distributed

_BLOCK_BYTES = 256 * 2**20  # of similarities at a time


@torch.no_grad()
def extract_features(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Run a network in eval mode over batches of images.

    Args:
        network: Images to N x D features; its training mode is put back afterwards.
        batches: Images and labels, as `LabelledData.batches` yields them.

    Returns:
        Features M x D float32, not normalised, and labels M, of this rank's share.
    """
    training = {module: module.training for module in network.modules()}
    network.eval()
    features, labels = [], []
    for images, target in batches:
        features.append(network(images).float())
        labels.append(target)
    for module, mode in training.items():
        module.training = mode
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    """Predict a class for each query by the weighted vote of its k nearest bank features.

    Args:
        queries: Q x D; normalised here.
        bank: M x D; normalised here.
        labels: M int64.
        num_classes: L.
        k: Neighbours; at most M.
        temperature: Each votes exp(cosine / temperature).

    Returns:
        Q int64 classes.

    Raises:
        ValueError: k is above M.
    """
    if k > len(bank):
        raise ValueError(f"k {k} is above the {len(bank)} bank features: lower k")
    queries, bank = normalize(queries, dim=1), normalize(bank, dim=1)
    rows = max(1, _BLOCK_BYTES // (4 * len(bank)))
    predictions = []
    for block in queries.split(rows):
        similarity, neighbour = (block @ bank.T).topk(k, dim=1)
        # Less the best, so that small temperatures do not overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = block.new_zeros(len(block), num_classes)
        votes.scatter_add_(1, labels[neighbour], weight)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def few_shot_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    targets: Tensor,
    shots: int,
    draws: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """Classify by the nearest class mean of a few labelled images.

    Args:
        bank, queries: M x D and Q x D features; normalised here.
        labels, targets: Their classes, M and Q.
        shots: Labelled images per class; every class of the bank needs as many.
        draws: Random choices of these images to average over.

    Returns:
        Mean and standard deviation over the draws, in percent.

    Raises:
        ValueError: A class has fewer than `shots` images.
    """
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    members = [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
    smallest = min(len(m) for m in members)
    if smallest < shots:
        raise ValueError(f"shots {shots} is above the {smallest} images of the smallest class")
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        picks = [m[torch.randperm(len(m), generator=generator)[:shots].to(m.device)] for m in members]
        means = normalize(torch.stack([bank[p].mean(0) for p in picks]), dim=1)
        scores.append(((queries @ means.T).argmax(1) == targets).float().mean())
    scores = 100 * torch.stack(scores)
    return scores.mean().item(), scores.std().item()


def broadcast_buffers(network: nn.Module) -> None:
    """Give all ranks rank 0's BatchNorm statistics, the ones that a checkpoint holds."""
    if distributed.world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


def gather_ragged(rows: Tensor) -> Tensor:
    """Stack the rows of all ranks, whose counts may differ, in rank order."""
    if distributed.world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = distributed.all_gather(count).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = distributed.all_gather(padded).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
