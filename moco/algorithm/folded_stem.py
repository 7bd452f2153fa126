"""A ResNet's first convolution as a GPU computes it fast, with the same weights.

Shapes: N images, C their channels, H W their pixels, O channels of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_unshuffle

_BLOCKS = 16  # channels to which 4 C is filled up: cuDNN is slow at numbers that 8 does not divide


class FoldedStem(nn.Conv2d):
    """Compute a 7 x 7 convolution of stride 2 as one of 4 x 4 over blocks of 2 x 2 pixels.

    A GPU is slow with three channels: 256 views of 224 px took an H200 1.8 ms, and 0.85 ms so. Only
    a step that is compiled for a GPU computes so.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return N x O x H/2 x W/2, as the plain convolution does."""
        if not _for_a_gpu(images) or images.shape[2] % 2 or images.shape[3] % 2:
            return super().forward(images)
        channels = self.in_channels
        missing = _BLOCKS - 4 * channels
        # Three rows and columns lie before an image; with a fourth of weight 0 they are two blocks.
        blocks = pad(pixel_unshuffle(images, 2), (2, 1, 2, 1, 0, missing))
        weight = pad(self.weight, (1, 0, 1, 0)).view(-1, channels, 4, 2, 4, 2)
        weight = weight.permute(0, 1, 3, 5, 2, 4).reshape(-1, 4 * channels, 4, 4)
        weight = pad(weight, (0, 0, 0, 0, 0, missing))
        form = torch.channels_last
        return conv2d(blocks.contiguous(memory_format=form), weight.contiguous(memory_format=form),
                      self.bias)  # fmt: skip


def _for_a_gpu(images: Tensor) -> bool:
    return torch.compiler.is_compiling() and images.is_cuda


def fold_stem(network: nn.Module) -> None:
    """Make each 7 x 7 convolution of stride 2 on few channels a `FoldedStem`, in place."""
    for layer in network.modules():
        if type(layer) is not nn.Conv2d or 4 * layer.in_channels > _BLOCKS or layer.groups > 1:
            continue
        shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode
        if shape == ((7, 7), (2, 2), (3, 3), (1, 1), "zeros"):
            layer.__class__ = FoldedStem
