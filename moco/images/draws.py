"""What happens to each sample: the recipes of the papers, and parameters drawn from them.

Drawn numbers are pure functions of (seed, epoch, image index, view number): see `moco.random`.
`moco.images.views` does what is drawn here. On a GPU nothing synchronises, and all of it compiles.

Shapes: N images, H W their pixels, S the side of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moco.config import UserError
from moco.config.data import PER_VIEW, DataConfig, per_view
from moco.pixels import centre_box
from moco.random import combine, stream_id, uniform

_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries as often before it falls back
_MAX_RATIO = 4 / 3
_BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class ViewRecipe:
    """Probabilities and strengths of one augmentation chain."""

    crop_min: float
    flip: float
    jitter: float
    strengths: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    grey: float
    blur: float
    solarise: float = 0.0
    grey_first: bool = False
    interpolation: str = "bilinear"


_V3 = ViewRecipe(0.2, 0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1.0)
_SAME = {
    "v1": ViewRecipe(0.2, 0.5, 1.0, (0.4, 0.4, 0.4, 0.4), 0.2, 0.0, grey_first=True),  # 1911.05722
    "v2": ViewRecipe(0.2, 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5),  # 2003.04297
    "cifar": ViewRecipe(0.08, 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.0),  # the official demo
}
RECIPES = {name: (recipe, recipe) for name, recipe in _SAME.items()} | {
    "v3": (_V3, replace(_V3, blur=0.1, solarise=0.2))  # 2104.02057
}


@dataclass
class Crops:
    """Boxes in pixels, and whether to mirror them; each N."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


@dataclass
class Colours:
    """What happens to the colours of each sample.

    Attributes:
        order: N x 4, which operation stands in each of the four places of the jitter.
        factors: N x 4, of brightness, contrast, saturation, and the hue's shift in turns.
        jitter, grey, blur, solarise: N bool, whether the step applies.
        sigma: N, of the blur, in pixels.
    """

    order: Tensor
    factors: Tensor
    jitter: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarise: Tensor


def view_recipes(data: DataConfig) -> tuple[ViewRecipe, ViewRecipe]:
    """Take the named recipe of each view with the user's own probabilities put in.

    Raises:
        UserError: Greyscale asked for on images that are not RGB.
    """
    own: list[dict[str, Any]] = [{"interpolation": data.interpolation} for _ in range(2)]
    for name in PER_VIEW:
        if (value := getattr(data, name)) is not None:
            for view, one in zip(own, per_view(value), strict=True):
                view[name] = one
    if any(view.get("grey") for view in own) and data.channels != 3:
        raise UserError(
            f"data.grey is {data.grey} but data.channels is {data.channels}: greyscale needs "
            "RGB, leave it out"
        )
    first, second = (replace(r, **v) for r, v in zip(RECIPES[data.views], own, strict=True))
    return first, second


def view_streams(seed: int, view: int) -> tuple[int, int]:
    """Return the streams of random numbers for the boxes and for the colours of view 0 or 1."""
    return stream_id(seed, f"crop-{view}"), stream_id(seed, f"colour-{view}")


def draw_crops(
    recipe: ViewRecipe,
    stream: int,
    epoch: int | Tensor,
    index: Tensor,
    height: int | Tensor,
    width: int | Tensor,
) -> Crops:
    """Draw the boxes of torchvision's RandomResizedCrop, ratio 3/4 to 4/3.

    Args:
        stream: The first of `view_streams`.
        epoch: Number, or int64 scalar where the chain is compiled.
        index: N int64, the images' places in the data set.
        height, width: Of the images in pixels; N int64 where they differ.
    """
    several = isinstance(height, Tensor)
    h_all, w_all = (height[:, None], width[:, None]) if several else (height, width)
    u = uniform(stream, combine(epoch, index), 2 * _ATTEMPTS + 3)
    area = h_all * w_all * (recipe.crop_min + (1 - recipe.crop_min) * u[:, :_ATTEMPTS])
    ratio = torch.exp(math.log(_MAX_RATIO) * (2 * u[:, _ATTEMPTS : 2 * _ATTEMPTS] - 1))
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= w_all) & (heights > 0) & (heights <= h_all)
    first = fits.int().argmax(1, keepdim=True)
    # No attempt fitted: the largest centred box whose ratio is in range.
    smaller, nearest = (torch.minimum, torch.round) if several else (min, round)
    fallback_w = smaller(width, nearest(height * _MAX_RATIO))
    fallback_h = smaller(height, nearest(width * _MAX_RATIO))
    none = ~fits.any(1)
    w = torch.where(none, fallback_w, widths.gather(1, first)[:, 0]).long()
    h = torch.where(none, fallback_h, heights.gather(1, first)[:, 0]).long()
    left = torch.where(none, (width - w) // 2, (u[:, -3] * (width - w + 1)).long())
    top = torch.where(none, (height - h) // 2, (u[:, -2] * (height - h + 1)).long())
    return Crops(top, left, h, w, u[:, -1] < recipe.flip)


def centre_crops(count: int, height: int, width: int, size: int, device: torch.device) -> Crops:
    """Make the evaluation box: 7/8 of the short side, centred; images no larger than S whole."""
    # differs: the official chain resizes to 256, then cuts 224; to cut first moves it by < 1 pixel
    sides = centre_box(height, width, size)
    no_flip = torch.zeros(count, dtype=torch.bool, device=device)
    return Crops(*(torch.full((count,), side, device=device) for side in sides), no_flip)


def draw_colours(recipe: ViewRecipe, stream: int, epoch: int | Tensor, index: Tensor) -> Colours:
    """Draw what happens to the colours of each sample, from the second of `view_streams`."""
    u = uniform(stream, combine(epoch, index), 13)
    low, high = _BLUR_SIGMA
    factors = [
        centre + strength * (2 * u[:, 4 + i] - 1)  # no tensor of constants: making one would wait
        for i, (centre, strength) in enumerate(zip((1, 1, 1, 0), recipe.strengths, strict=True))
    ]
    return Colours(
        order=u[:, :4].argsort(1),
        factors=torch.stack(factors, 1),
        jitter=u[:, 8] < recipe.jitter,
        grey=u[:, 9] < recipe.grey,
        blur=u[:, 10] < recipe.blur,
        sigma=low + (high - low) * u[:, 11],
        solarise=u[:, 12] < recipe.solarise,
    )
