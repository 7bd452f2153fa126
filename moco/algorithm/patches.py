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


def combine_features(features: Tensor, patches: int, combine: int) -> Tensor:
    """Average the features of every `combine` patches of an image.

    Args:
        features: N * patches x D, those of an image together.
        patches: Of each image, P**2.
        combine: Patches in a combination.

    Returns:
        N * R x D, where R is patches choose combine; those of an image stand together.
    """
    chosen = torch.tensor(list(combinations(range(patches), combine)), device=features.device)
    grouped = features.view(-1, patches, features.shape[1])  # N P**2 D
    return grouped[:, chosen].mean(2).flatten(0, 1)  # N R combine D -> N*R D
