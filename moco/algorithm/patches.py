"""Patches of a view, and combinations of their features (Fast-MoCo, arXiv:2207.08220).

Shapes: N images, C channels, S side of a view, P patches along a side, D feature, R combinations.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def cut_into_patches(view: Tensor, count: int) -> Tensor:
    """Cut N x C x S x S into N * P**2 patches of S/P pixels; those of an image stand together.

    Args:
        count: P, which must divide S.
    """
    images, channels, size, _ = view.shape
    side = size // count
    parts = view.reshape(images, channels, count, side, count, side).permute(0, 2, 4, 1, 3, 5)
    patches = parts.reshape(images * count**2, channels, side, side)
    return patches.contiguous(memory_format=torch.channels_last)


def combinations_of(patches: int, combine: int) -> Tensor:
    """Say which patches stand in each combination: R x P**2, 1 where one does and else 0.

    Args:
        patches: Of each image, P**2.
        combine: Patches in a combination.
    """
    chosen = torch.tensor(list(combinations(range(patches), combine)))  # R combine
    return torch.zeros(len(chosen), patches).scatter_(1, chosen, 1.0)


def combine_features(features: Tensor, chosen: Tensor) -> Tensor:
    """Average the features of every combination of an image's patches.

    It is a product of matrices, whose gradient adds in a fixed order; that of an index does not.

    Args:
        features: N * P**2 x D, those of an image together.
        chosen: R x P**2, from `combinations_of`.

    Returns:
        N * R x D; those of an image stand together.
    """
    grouped = features.view(-1, chosen.shape[1], features.shape[1])  # N P**2 D
    sums = chosen.to(features.dtype) @ grouped  # N R D
    return sums.flatten(0, 1) / chosen[0].sum()  # N*R D
