"""Two views of every image, made batched on the device, each sample with parameters of its own.

A view is a pure function of (seed, epoch, image index, view number): see `moco.random`. The steps
are those of the papers' chains: random resized crop, flip, colour jitter in random order,
greyscale, blur, normalisation; each equals torchvision's at equal parameters. Crop, flip and blur
are products with per-sample matrices. On a GPU every shape is static and nothing synchronises, so
that the whole chain compiles to one graph; on a CPU the costly steps touch only the samples that
need them.

Shapes: N images, C channels (here of the image), H W their pixels, S the side of a view; planes
are the C channels of a batch, N x S x S each: apart they compile to fewer passes over the pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moco.algorithm.compiled import whole_graph
from moco.images.crops import crop_and_resize, separable
from moco.images.draws import Colours, ViewRecipe, draw_colours, draw_crops, view_streams

_CPU_BYTES = 2 << 20  # of float images that a CPU works on at a time: they stay in its cache
_BLUR_RADIUS = 6  # pixels; three times the largest sigma
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's


class ViewMaker:
    """Makes views of uint8 images by one recipe.

    Args:
        recipes: What happens to them, for each of the two views.
        size: S, unless a call names another.
        mean, std: C each, of images on a 0-1 scale, on the device that makes the views.
        backend: Of torch.compile, to make one graph for one shape of batches; empty: as written.
    """

    def __init__(
        self,
        recipes: tuple[ViewRecipe, ViewRecipe],
        seed: int,
        size: int,
        mean: Tensor,
        std: Tensor,
        backend: str = "",
    ) -> None:
        self.recipes, self.size, self.mean, self.std = recipes, size, mean, std
        self.streams = [view_streams(seed, view) for view in (0, 1)]
        self._chain, self._part = self._make, 0
        if backend:
            self._chain = whole_graph(self._make, backend)
        elif mean.device.type == "cpu":
            self._part = max(1, _CPU_BYTES // (4 * len(mean) * size**2))

    def __call__(
        self,
        images: Tensor,
        epoch: int | Tensor,
        index: Tensor,
        number: int,
        whole: bool,
        size: int = 0,
    ) -> Tensor:
        """Make one view of each image.

        Args:
            images: N x C x H x W uint8; S x S where they are cut and mirrored already.
            epoch, index, number: See `draw_crops`.
            whole: Whether they are still to be cut.
            size: S; 0: as usual.

        Returns:
            N x C x S x S float, normalised, channels-last.
        """
        # A number would be compiled anew in every epoch.
        moment = epoch if isinstance(epoch, Tensor) else index.new_full((), epoch)
        options = number, whole, size or self.size
        if not self._part or len(images) <= self._part or torch.compiler.is_compiling():
            return self._chain(images, moment, index, *options)
        parts = zip(images.split(self._part), index.split(self._part), strict=True)
        return torch.cat([self._chain(i, moment, places, *options) for i, places in parts])

    def _make(
        self, images: Tensor, epoch: Tensor, index: Tensor, number: int, whole: bool, size: int
    ) -> Tensor:
        recipe, (crop, colour) = self.recipes[number], self.streams[number]
        if whole:
            boxes = draw_crops(recipe, crop, epoch, index, *images.shape[2:])
            view = crop_and_resize(images, boxes, size, recipe.interpolation)
        else:
            view = images.contiguous().float() / 255
        colours = draw_colours(recipe, colour, epoch, index)
        planes = _adjust(list(view.unbind(1)), colours, recipe)
        planes = [
            (p - mean) / std for p, mean, std in zip(planes, self.mean, self.std, strict=True)
        ]
        return torch.stack(planes, 3).permute(0, 3, 1, 2)


def _adjust(planes: list[Tensor], colours: Colours, recipe: ViewRecipe) -> list[Tensor]:
    """Apply jitter, greyscale, blur and solarisation to planes of 0 to 1, on a CPU in place.

    Hue, saturation and greyscale act on RGB only.
    """
    to_grey = len(planes) == 3 and recipe.grey > 0
    if to_grey and recipe.grey_first:
        planes = _on_rows(colours.grey, planes, _grey_like)
    if recipe.jitter > 0:
        planes = _jitter(planes, colours)
    if to_grey and not recipe.grey_first:
        planes = _on_rows(colours.grey, planes, _grey_like)
    if recipe.blur > 0:
        planes = _on_rows(colours.blur, planes, _blur, colours.sigma)
    if recipe.solarise > 0:
        planes = _on_rows(colours.solarise, planes, _solarise)
    return planes


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean and divide by the deviation; C each, for images on a 0-1 scale."""
    return (images - mean[:, None, None]) / std[:, None, None]


def _on_rows(
    mask: Tensor, planes: list[Tensor], step: Callable[..., list[Tensor]], *parameters: Tensor
) -> list[Tensor]:
    """Return the planes with `step` applied to the samples in `mask`; on a CPU in place.

    On a GPU it is applied to all, and the result is selected: finding the rows would wait there.
    """
    if planes[0].device.type != "cpu" or torch.compiler.is_compiling():
        changed = step(planes, *parameters)
        mask = mask[:, None, None]
        return [torch.where(mask, new, old) for new, old in zip(changed, planes, strict=True)]
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        return planes
    changed = step([plane[rows] for plane in planes], *(p[rows] for p in parameters))
    return [old.index_copy_(0, rows, new) for new, old in zip(changed, planes, strict=True)]


def _grey(planes: list[Tensor]) -> Tensor:
    """Return the brightness, N x S x S: weighted for RGB, else the mean of the bands."""
    weights = _GREY_WEIGHTS if len(planes) == 3 else [1 / len(planes)] * len(planes)
    grey = weights[0] * planes[0]
    for weight, plane in zip(weights[1:], planes[1:], strict=True):
        grey = grey.add_(plane, alpha=weight)
    return grey


def _grey_like(planes: list[Tensor]) -> list[Tensor]:
    return [_grey(planes)] * len(planes)


def _jitter(planes: list[Tensor], colours: Colours) -> list[Tensor]:
    """Apply the four operations in each sample's own order."""
    is_rgb = len(planes) == 3
    blends = _HUE if is_rgb else _SATURATION  # what colour needs does nothing else
    for place in range(4):
        operation = colours.order[:, place]
        factor = colours.factors.gather(1, operation[:, None])[:, 0]
        mask = colours.jitter & (operation < blends)
        planes = _on_rows(mask, planes, _blend, operation, factor)
        if is_rgb:
            planes = _on_rows(colours.jitter & (operation == _HUE), planes, _shift_hue, factor)
    return planes


def _blend(planes: list[Tensor], operation: Tensor, factor: Tensor) -> list[Tensor]:
    """Blend with black (brightness), the mean grey (contrast) or the grey image (saturation)."""
    operation, factor = operation[:, None, None], factor[:, None, None]
    grey = _grey(planes)
    mean = grey.mean((1, 2), keepdim=True) * (operation == _CONTRAST)
    partner = torch.where(operation == _SATURATION, grey, mean) * (1 - factor)
    return [torch.addcmul(partner, plane, factor).clamp_(0, 1) for plane in planes]


def _solarise(planes: list[Tensor]) -> list[Tensor]:
    """Invert what is bright, from 128 of 255 levels up, as PIL does."""
    return [torch.where(plane >= 0.5, 1 - plane, plane) for plane in planes]  # 127.5 rounds to 128


def _shift_hue(planes: list[Tensor], shift: Tensor) -> list[Tensor]:
    """Turn the hue by `shift` turns (N), through HSV in closed form.

    The hue comes from sorting the channels, and each channel back from its distance to the hue
    around the circle: no branch per sixth.
    """
    red, green, blue = planes
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, high), torch.minimum(red, high)
    chroma = value - torch.minimum(middle, low)
    start = -(green < blue).float()
    start = torch.where(red < high, -1 / 3 - start, start)
    hue = (start + (middle - low) / (6 * chroma).clamp(min=1e-20)).abs() + shift[:, None, None]
    turned = []
    for channel in (3, 1, -1):
        apart = hue + channel / 6
        apart = apart.sub_(apart.round()).abs_()  # in turns: 0 where a channel is lowest
        apart = (2 - 6 * apart).clamp_(0, 1)
        turned.append(torch.addcmul(value, chroma, apart, value=-1))
    return turned


def _blur(planes: list[Tensor], sigma: Tensor) -> list[Tensor]:
    """Blur with a Gaussian of `sigma` pixels (N), 13 taps; beyond an edge its pixels go on."""
    matrix = _blur_matrix(sigma, planes[0].shape[-1])
    return list(separable(torch.stack(planes, 1), matrix, matrix).unbind(1))


def _blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """Build the N x S x S matrix of a Gaussian that repeats the border, as PIL does."""
    # differs: PIL blurs with three boxes and repeats the border before each, which would cost two
    # products of matrices more; at the edges of 32 px photographs 0.003 of the scale lie between.
    taps = torch.arange(_BLUR_RADIUS + 1, device=sigma.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)  # N radius+1
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
    kernel = functional.pad(kernel, (0, 1))  # the last column: no weight
    beyond = kernel.flip(1).cumsum(1).flip(1)  # the weight of a tap and of all farther ones
    out = torch.arange(size, device=sigma.device)[:, None]
    pixel = torch.arange(size, device=sigma.device)[None, :]
    matrix = kernel[:, (pixel - out).abs().clamp(max=_BLUR_RADIUS + 1)]
    left = beyond[:, (out + 1).clamp(max=_BLUR_RADIUS + 1)] * (pixel == 0)
    right = beyond[:, (size - out).clamp(max=_BLUR_RADIUS + 1)] * (pixel == size - 1)
    return matrix + left + right
