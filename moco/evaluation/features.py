"""Features: what a network computes from images, on this rank, checked to be finite.

Shapes: N images of a batch, M images of this rank, D feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import DataConfig, UserError


@torch.no_grad()
def extract_features(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Run a network in eval mode over batches of images.

    Args:
        network: Images to N x D features; it gets its training mode back afterwards.
        batches: Images and their rows, as `LabelledData.batches` yields them, or their labels.

    Returns:
        Features M x D float32, not normalised, and rows or labels M, of this rank's share.

    Raises:
        UserError: There is no batch, or a feature is not finite, on any rank.
    """
    features, rows = [], []
    for found, part in each_batch(network, batches):
        features.append(found)
        rows.append(part)
    with distributed.together():
        if not features:
            raise UserError(
                "a device has no images to take features of: check data.root, or use fewer devices"
            )
        check_finite(found := torch.cat(features), "the encoder's features")
    return found, torch.cat(rows).to(found.device)


@torch.no_grad()
def each_batch(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a network computes from each batch, float32, and the batch's rows.

    The network runs in eval mode and gets its training mode back at the end. A batch without images
    comes back as it is.
    """
    training = {module: module.training for module in network.modules()}
    network.eval()
    for images, rows in batches:
        yield network(images).float() if len(images) else images, rows
    for module, mode in training.items():
        module.training = mode


@torch.no_grad()
def feature_shape(network: nn.Module, data: DataConfig, device: torch.device) -> tuple[int, ...]:
    """Return the shape of what a network in eval mode computes from one image: D, or D h w."""
    size = data.image_size
    return tuple(network(torch.zeros(2, data.channels, size, size, device=device)).shape[1:])


def check_finite(features: Tensor, name: str) -> None:
    """Raise UserError when rows of N x D features hold NaN or infinity."""
    bad = sum(int((~part.isfinite().all(1)).sum()) for part in features.split(2**16))
    if bad:
        raise UserError(
            f"{name} hold NaN or infinity in {bad} of {len(features)} rows: take a checkpoint from "
            "before the run diverged, and check data.mean and data.std"
        )
