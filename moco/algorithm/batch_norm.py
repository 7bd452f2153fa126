"""Kinds of BatchNorm: statistics over one device's batch, over groups of it, or over all devices.

Shapes: N images per device, C channels, H W pixels (or none, in a head), G BatchNorm groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from moco.config import UserError

# Rooms of libraries whose layers `SplitBatchNorm` knows how to part.
_KNOWN = ("torch.nn.modules.batchnorm", "timm.layers.norm_act")


class SplitBatchNorm:
    """Normalise G groups of the batch apart, as G devices would; eval mode is the layer's own.

    Keys must be normalised in other groups than their queries (1911.05722, section 3.3). With all
    images of one device in a single group, shuffling them would not change the groups.
    `set_batch_norm` mixes this class into that of an existing layer, so that timm's BatchNorm with
    activation can be split too. The running statistics are the mean over the groups.
    """

    num_splits: int

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        assert len(images) % self.num_splits == 0, f"{len(images)} in {self.num_splits} groups"
        one_kernel = torch.compiler.is_compiling()
        images = self._fused(images) if one_kernel else self._group_by_group(images)
        if self.running_mean is not None:
            self.num_batches_tracked.add_(1)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            images = getattr(self, name)(images) if hasattr(self, name) else images
        return images

    def _group_by_group(self, images: Tensor) -> Tensor:
        """Call torch's BatchNorm once per group, the fastest way without a compiler."""
        groups, mean, var = self.num_splits, self.running_mean, self.running_var
        tracked = mean is not None
        means = mean.repeat(groups, 1) if tracked else [None] * groups
        variances = var.repeat(groups, 1) if tracked else [None] * groups
        settings = (self.weight, self.bias, True, self.momentum, self.eps)
        parts = zip(images.chunk(groups), means, variances, strict=True)
        normed = torch.cat([batch_norm(part, m, v, *settings) for part, m, v in parts])
        if tracked:
            with torch.no_grad():
                mean.copy_(means.mean(0))
                var.copy_(variances.mean(0))
        return normed

    def _fused(self, images: Tensor) -> Tensor:
        """Write BatchNorm in operations that a compiler fuses to two passes over the images."""
        groups, batch = self.num_splits, images.shape
        precise = torch.promote_types(images.dtype, torch.float32)
        grouped = images.view(groups, -1, *batch[1:]).to(precise)  # G N/G C H W
        places = (1, *range(3, grouped.dim()))
        var, mean = torch.var_mean(grouped, places, correction=0)  # G C
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        if self.running_mean is not None:
            with torch.no_grad():
                count = grouped[0].numel() // batch[1]
                unbiased = var.mean(0) * (count / (count - 1))
                self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        shape = (groups, 1, batch[1], *[1] * (len(batch) - 2))
        normed = grouped * scale.view(shape) + shift.view(shape)
        # In mixed precision no view comes last: ReLU in place on a view costs copies backward.
        return normed.view(batch).to(images.dtype)


def set_batch_norm(module: nn.Module, kind: str, num_splits: int) -> nn.Module:
    """Make every BatchNorm of an encoder `plain`, `split` or `sync`; its state dict stays the same.

    Returns:
        The module, changed in place, or for `sync` another object where it is a BatchNorm itself.

    Raises:
        UserError: A layer of the user's own normalises in another way, which would be lost.
    """
    for child in module.modules():
        if not isinstance(child, _BatchNorm):
            continue
        is_changed = kind in ("split", "sync") or isinstance(child, nn.SyncBatchNorm)
        if is_changed and type(child).forward.__module__ not in _KNOWN:
            raise UserError(
                f"the backbone's {type(child).__name__} normalises in a way of its own, which "
                f"model.key_bn or model.query_bn {kind} would leave out: take torch's BatchNorm"
            )
        if isinstance(child, nn.SyncBatchNorm):  # of the user's: over all devices keys would leak
            child.__class__ = _OneDevice if not hasattr(child, "act") else _with_activation()
        if kind == "split":
            kind_of = type(child)
            child.__class__ = type(f"Split{kind_of.__name__}", (SplitBatchNorm, kind_of), {})
            child.num_splits = num_splits
    if kind == "sync":
        from timm.layers import convert_sync_batchnorm  # torch's own drops the fused activation

        return convert_sync_batchnorm(module)
    return module


class _OneDevice(_BatchNorm):
    """What SyncBatchNorm is on one device: BatchNorm of any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None: ...


def _with_activation() -> type[nn.Module]:
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d


@contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch as in training, but keep its running statistics."""
    layers = [layer for m in modules for layer in m.modules() if isinstance(layer, _BatchNorm)]
    buffers = [layer._buffers for layer in layers]
    for layer in layers:
        layer._buffers = {
            name: None if buffer is None else buffer.clone()
            for name, buffer in layer._buffers.items()
        }
    try:
        yield
    finally:
        for layer, own in zip(layers, buffers, strict=True):
            layer._buffers = own
