"""Measures of features that need no labels; each says what is good, its range and its source.

Shapes: N images, V views of each, D feature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

_RIDGE = 1e-4  # of the scatter within images, as in 2312.04000


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Return the effective rank of features, 1 to min(N, D); higher is better.

    It is the exponential of the entropy of the singular values. 1 is a collapse to one direction.

    Args:
        features: N x D.

    Source: RankMe, arXiv:2210.02885, equation 1.
    """
    return _effective_number(torch.linalg.svdvals(features.double()))


@torch.no_grad()
def lidar(features: Tensor) -> float:
    """Return the effective number of directions that tell images apart; higher is better.

    It is 1 to min(N, D). Each image is a class of its own, and its views are the members: the
    eigenvalues are those of linear discriminant analysis.

    Args:
        features: N x V x D.

    Source: LiDAR, arXiv:2312.04000, section 4.
    """
    if len(features) < 2:
        return 1.0
    features = features.double()
    centres = features.mean(1)  # N D
    between = torch.cov(centres.T)
    apart = (features - centres[:, None]).flatten(0, 1)  # N*V D
    within = apart.T @ apart / max(len(features) * (features.shape[1] - 1), 1)
    within += _RIDGE * torch.eye(len(within), dtype=within.dtype, device=within.device)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.rsqrt() @ vectors.T
    return _effective_number(torch.linalg.eigvalsh(whiten @ between @ whiten))


@torch.no_grad()
def alignment(features: Tensor) -> float:
    """Return the mean squared distance of two views of one image, 0 to 4; lower is better.

    A collapse has 0 as well: it says something beside `uniformity` alone.

    Args:
        features: N x V x D; normalised here. The first two views count.

    Source: arXiv:2005.10242, equation 5 with alpha 2.
    """
    first, second = normalize(features[:, 0].double()), normalize(features[:, 1].double())
    return (first - second).square().sum(1).mean().item()


@torch.no_grad()
def uniformity(features: Tensor) -> float:
    """Return how evenly images lie on the sphere, -4 to 0; lower is better, 0 is a collapse.

    It is the logarithm of the mean of exp(-2 squared distance) over pairs of images.

    Args:
        features: N x V x D; normalised here. The first view counts.

    Source: arXiv:2005.10242, equation 6 with t 2.
    """
    unit = normalize(features[:, 0].double())
    if len(unit) < 2:
        return 0.0
    return torch.pdist(unit).square().mul(-2).exp().mean().log().item()


@torch.no_grad()
def retrieval(features: Tensor) -> float:
    """Return the percentage of images whose other view is the nearest of all; higher is better.

    Chance, and a collapse, is 100 / N.

    Args:
        features: N x V x D; normalised here. The first two views count.
    """
    first, second = normalize(features[:, 0].double()), normalize(features[:, 1].double())
    found = (first @ second.T).argmax(1)
    return 100 * (found == torch.arange(len(found), device=found.device)).double().mean().item()


def _effective_number(values: Tensor) -> float:
    """Return the exponential of the entropy of values that are scaled to sum to 1."""
    values = values.clamp(min=0)
    total = values.sum()
    if total == 0:
        return 1.0
    share = values / total
    return torch.special.entr(share).sum().exp().item()


# Name to function of N x V x D, and whether more is better.
MEASURES = {
    "rankme": (lambda features: rankme(features.flatten(0, 1)), True),
    "lidar": (lidar, True),
    "alignment": (alignment, False),
    "uniformity": (uniformity, False),
    "retrieval": (retrieval, True),
}
