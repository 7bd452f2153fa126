"""The batch that a step of MoCo takes; `moco.images.loader` makes it.

Shapes: N images per device, W devices, B = N*W, C channels, S side of a view.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """View pairs, ready for the encoders.

    Attributes:
        query_views: One view, or two if symmetric; each N x C x S x S float, normalised.
        key_views: The matching other views, in shuffled places.
        key_order: B, the places that the keys were shuffled to; None if they were not shuffled.
    """

    query_views: list[Tensor]
    key_views: list[Tensor]
    key_order: Tensor | None
