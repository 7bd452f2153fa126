"""kNN: how good is an encoder, without training anything (1805.01978, section 3.4; the CIFAR demo).

Features of a labelled bank vote on the labels of queries; `moco.evaluation.search` finds the
neighbours. Every score belongs to a layer, a k and a temperature.
Shapes: M bank images, Q queries, D feature, k neighbours, L classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moco.config import UserError
from moco.evaluation.search import BUDGET, nearest, nearest_sharded


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    budget: int = BUDGET,
    sharded: bool = False,
) -> Tensor:
    """Predict a class for each query by the weighted vote of its k nearest bank features.

    Args:
        queries: Q x D; normalised here.
        bank: M x D; normalised here.
        labels: M int64.
        sharded: Whether the bank holds this rank's rows alone, and the queries and the labels are
            those of all ranks, as `gather_ragged` stacks them.
        num_classes: L.
        k: Neighbours; at most M.
        temperature: Each votes exp(cosine / temperature).
        budget: Bytes of working memory, as of `nearest`; the answers do not depend on it.

    Returns:
        Q int64 classes.

    Raises:
        UserError: k is above M, or a feature is not finite.

    Source: arXiv:1805.01978, section 3.4.
    """
    search = nearest_sharded if sharded else nearest
    similarity, index = search(queries, bank, k, budget)
    rows = max(1, budget // (16 * (num_classes + k)))
    predictions = [
        vote(s, labels[i], num_classes, [k], temperature)[k].argmax(1)
        for s, i in zip(similarity.split(rows), index.split(rows), strict=True)
    ]
    return torch.cat(predictions)


def vote(
    similarity: Tensor, classes: Tensor, num_classes: int, ks: list[int], temperature: float
) -> dict[int, Tensor]:
    """Count the votes of the first k neighbours, for several k at once.

    Args:
        similarity: Q x max(ks) cosines, best first.
        classes: Q x max(ks), the neighbours' labels.
        temperature: Each votes exp(cosine / temperature).

    Returns:
        k to Q x L votes, relative to one of the nearest neighbour.
    """
    # The best cosine is subtracted so that small temperatures do not overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weight.new_zeros(len(weight), num_classes)
    result, done = {}, 0
    for k in sorted(set(ks)):
        votes = votes.scatter_add(1, classes[:, done:k], weight[:, done:k])
        result[k], done = votes, k
    return result


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
        UserError: A class has fewer than `shots` images.

    Source: prototypes as in arXiv:1703.05175, on frozen, normalised features.
    """
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    members = [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
    smallest = min(len(m) for m in members)
    if smallest < shots:
        raise UserError(f"shots {shots} is above the {smallest} images of the smallest class")
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        picks = [
            m[torch.randperm(len(m), generator=generator)[:shots].to(m.device)] for m in members
        ]
        means = normalize(torch.stack([bank[p].mean(0) for p in picks]), dim=1)
        scores.append(((queries @ means.T).argmax(1) == targets).float().mean())
    scores = 100 * torch.stack(scores)
    return scores.mean().item(), scores.std().item()
