"""A trial before the first step: whether the encoder can take the images at all.

Torch's meta device computes shapes and no numbers, so it takes a second at most, no memory, and no
kernel that could abort the process.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import PatchEmbed
from torch import nn

from moco.algorithm.encoder import Encoder
from moco.config import TrainConfig, UserError
from moco.images.growth import view_sizes
from moco.log import reason_of
from moco.training.build import size_unit

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check_encoder(encoder: Encoder, config: TrainConfig) -> None:
    """Try one forward and backward pass on a copy of the encoder.

    Args:
        encoder: On the CPU; it stays as it is.
        config: Settings of the images.

    Raises:
        UserError: The backbone cannot take images of this size, or would leave a part of them out.
    """
    data = config.data
    for size in view_sizes(data, size_unit(encoder))[::-1]:
        is_last = size == data.view_side
        name = data.view_side_setting if is_last else "data.image_size_start"
        _check_size(encoder, config, name, size)
    if data.view_side != data.image_size:  # which the backbone alone takes
        _check_size(encoder.backbone, config, "data.image_size", data.image_size)


def _check_size(network: nn.Module, config: TrainConfig, name: str, size: int) -> None:
    """Try one size of the images, which follows from the setting NAME."""
    backbone = config.model.backbone
    for layer in network.modules():
        if isinstance(layer, PatchEmbed) and layer.proj.in_channels == config.data.channels:
            _check_patches(backbone, name, size, layer)
    try:
        changed = _pass(network, config, size, "meta")
    except Exception:  # some networks do what only real tensors can
        try:
            changed = _pass(network, config, size, "cpu")
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            reason = reason_of(error)
            raise UserError(
                f"model.backbone {backbone} cannot take images of {name} {size} "
                f"({reason}): take another size or backbone"
            ) from error
    if changed and config.data.chunks > 1:
        raise UserError(
            f"data.chunks is {config.data.chunks}, and the backbone changes its {changed[0]} in "
            "each pass, as spectral_norm does, so that a second one has another gradient: set it "
            "to 1"
        )


def _check_patches(backbone: str, name: str, size: int, layer: PatchEmbed) -> None:
    """Raise UserError when patches do not cover the image: its last rows would never be seen."""
    patch = layer.patch_size[0]
    if size % patch == 0 or layer.dynamic_img_pad:
        return
    below = size // patch * patch
    near = f"{below} or {below + patch}" if below else str(patch)
    raise UserError(
        f"{name} {size} is no multiple of the {patch} pixels of a patch of "
        f"model.backbone {backbone}, so the last {size % patch} rows and columns would never reach "
        f"it: take {near}"
    )


def _pass(network: nn.Module, config: TrainConfig, side: int, device: str) -> list[str]:
    """Take one training pass of two images for each BatchNorm group on a copy.

    Returns: The buffers that it changed, but for running statistics, on which no pass depends.
    """
    trial = copy.deepcopy(network).to(device).train()
    for layer in trial.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.eval()  # it would ask for other ranks
    before = {
        name: (buffer, buffer._version)
        for name, buffer in trial.named_buffers()
        if not name.endswith(_STATISTICS)
    }
    with torch.random.fork_rng(devices=[]):
        images = torch.zeros(2 * config.model.bn_splits, config.data.channels, side, side)
        trial(images.to(device)).sum().backward()
    after = dict(trial.named_buffers())
    return [
        name
        for name, (b, version) in before.items()
        if after[name] is not b or b._version != version
    ]
