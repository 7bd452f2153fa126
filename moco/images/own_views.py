"""Own views: the user's callables in the place of a recipe, drawn so that a run resumes exactly.

A callable of one image runs in the workers, with the generators of torch, NumPy and Python seeded
by (seed, epoch, image, view). One of a batch runs on the device, and gets its random numbers.
Both give values on a 0-1 scale, or uint8, which are then normalised by data.mean and data.std.
Shapes: N images, C channels, H W their pixels, S the side of a view, K random numbers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images.array_like import bands_last
from moco.images.decode import BadImage, fit_bands
from moco.images.formats import escaped
from moco.images.image_source import ImageSource
from moco.images.views import normalise
from moco.random import combine, stream_id, uniform

T = TypeVar("T")
_LOOKED_AT = 64  # images among which one must be read
_SLACK = 1e-3  # beyond 0 and 1, which resizing and arithmetic may leave


@dataclass(frozen=True)
class BatchedView:
    """A view that is made of a whole batch on its device.

    Attributes:
        function: From N x C x H x W uint8 and N x K uniform random numbers in [0, 1) to
            N x C x S x S float on a 0-1 scale. It draws nothing else.
        draws: K.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    draws: int = 16


@dataclass(frozen=True)
class OwnViews:
    """The callables of both views, of single images or of batches."""

    views: tuple[Any, Any]

    @property
    def batched(self) -> bool:
        """Tell whether they are made of batches on the device."""
        return isinstance(self.views[0], BatchedView)


def open_views(views: Any) -> OwnViews:
    """Take one callable for both views, or two.

    Raises:
        UserError: Something else, or one of images beside one of batches.
    """
    pair = tuple(views) if isinstance(views, tuple | list) else (views, views)
    names = ", ".join(type(view).__name__ for view in pair)
    if len(pair) != 2 or not all(callable(v) or isinstance(v, BatchedView) for v in pair):
        raise UserError(
            f"views is {names or 'empty'}: give a recipe's name, one callable or two, or "
            "moco.BatchedView(function, draws)"
        )
    if len({isinstance(view, BatchedView) for view in pair}) != 1:
        raise UserError("views are one of single images and one of batches: give two of a kind")
    return OwnViews(pair)


def view_size(own: OwnViews, source: ImageSource) -> int:
    """Return the side S of what the first view makes of the first image that can be read.

    Raises:
        UserError: It makes something else than a square image.
    """
    image = first_image(source)
    if own.batched:
        made = _of_batch(own.views[0], image[None].repeat(2, 1, 1, 1), torch.zeros(2, 1024))
    else:
        made = _as_asked(lambda: call_view(own.views[0], image, 0))
    if made.shape[-1] != made.shape[-2]:
        height, width = made.shape[-2:]
        raise UserError(f"views give {height} x {width} pixels: have them end in a square resize")
    return made.shape[-1]


def check_views(own: OwnViews, source: ImageSource, config: DataConfig) -> None:
    """Try both views on the first image that can be read.

    Raises:
        UserError: One of them gives something else than C x S x S.
    """
    image = first_image(source)
    for number, view in enumerate(own.views):
        if own.batched:
            numbers = uniform(stream_id(0, f"own-{number}"), torch.arange(2), view.draws)
            made = _of_batch(view, image[None].repeat(2, 1, 1, 1), numbers)
            _as_asked(partial(_check_range, made.min().item(), made.max().item()))
            _check_batch(made, 2, source.channels, config.view_side)
        else:
            _as_asked(lambda view=view: made_view(view, image, 0, config))


def first_image(source: ImageSource) -> Tensor:
    """Return the first image that can be read, or grey where none of many can."""
    for index in range(min(len(source), _LOOKED_AT)):
        with contextlib.suppress(BadImage):
            return source.read(index)
    return torch.full((source.channels, 32, 32), 128, dtype=torch.uint8)


def _as_asked(make: Callable[[], T]) -> T:
    """Return what a view makes; an error of its own becomes a UserError of one line."""
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(said(error)) from error


def said(error: Exception) -> str:
    """Say in one line what a view raised; a ValueError of this room speaks for itself."""
    text = escaped(str(error))
    if isinstance(error, _WrongView):
        return text
    return f"views raised {type(error).__name__}: {text} (they are given uint8 C x H x W tensors)"


class _WrongView(ValueError):
    """What a view made is not what is asked for."""


def made_view(view: Any, image: Tensor, seed: int, config: DataConfig) -> Tensor:
    """Return what a callable makes of one image, C x S x S uint8.

    Args:
        image: C x H x W uint8.
        seed: Of all that it draws.
    """
    made, size = call_view(view, image, seed), config.view_side
    if made.shape[1:] != (size, size):
        height, width = made.shape[1:]
        name = config.view_side_setting
        raise _WrongView(
            f"views give {height} x {width} pixels, and {name} is {size}: have them end in a "
            f"resize to {size} x {size}, or set {name}"
        )
    pixels = fit_bands("views", made.numpy(), len(image))
    return torch.from_numpy(np.ascontiguousarray(pixels))


def call_view(view: Any, image: Tensor, seed: int) -> Tensor:
    """Call a view with all generators seeded; return C x height x width uint8.

    albumentations' transforms are called by keyword with H x W x C, and have generators of their
    own.
    """
    with _seeded(seed):
        if type(view).__module__.partition(".")[0] == "albumentations":
            view.set_random_seed(seed % 2**32)
            made = view(image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()))["image"]
        else:
            made = view(image)
    if isinstance(made, Image.Image):
        made = np.array(made)
    made = torch.from_numpy(made) if isinstance(made, np.ndarray) else made
    if not isinstance(made, Tensor) or made.ndim not in (2, 3):
        what = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise _WrongView(f"views give {what}: have each return one image, C x H x W or H x W x C")
    made = made.detach().as_subclass(Tensor)
    made = made[None] if made.ndim == 2 else made
    if bands_last(tuple(made.shape), len(image)):
        made = made.permute(2, 0, 1)
    if made.is_floating_point():
        _check_range(made.min().item(), made.max().item())
        made = (made * 255).round().clamp(0, 255).to(torch.uint8)
    if made.dtype != torch.uint8:
        raise _WrongView(f"views give {made.dtype}: have them return uint8, or float from 0 to 1")
    return made


def _check_range(low: float, high: float) -> None:
    if not -_SLACK <= low <= high <= 1 + _SLACK:
        raise _WrongView(
            f"views give values from {low:.3g} to {high:.3g}: leave Normalize out, since data.mean "
            "and data.std normalise, and return uint8 or float from 0 to 1"
        )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python, and restore them afterwards."""
    state, known = random.getstate(), np.random.get_state()
    generator = torch.default_generator
    before = generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        generator.manual_seed(seed)
        yield
    finally:
        random.setstate(state)
        np.random.set_state(known)
        generator.set_state(before)


def _of_batch(view: BatchedView, images: Tensor, numbers: Tensor) -> Tensor:
    """Call a batched view, whose errors become UserErrors; return N x C x height x width float."""
    made = _as_asked(lambda: view.function(images, numbers[:, : view.draws]))
    if not isinstance(made, Tensor) or made.ndim != 4 or not made.is_floating_point():
        what = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made)
        raise UserError(f"views give {what}: have them return float N x C x S x S from 0 to 1")
    return made


def _check_batch(made: Tensor, count: int, channels: int, size: int) -> None:
    if made.shape != (count, channels, size, size):
        raise UserError(
            f"views give {' x '.join(map(str, made.shape))} of {count} images: have them return "
            f"{count} x {channels} x {size} x {size}, or set the "
            "side of the views (data.image_size, or data.image_size_end where that is set)"
        )


class OwnViewMaker:
    """Makes views on the device, as `moco.images.views.ViewMaker` does for recipes.

    Args:
        seed: Of the random numbers of batched ones.
        mean, std: C each, on the device.
    """

    def __init__(self, own: OwnViews, seed: int, size: int, mean: Tensor, std: Tensor) -> None:
        self.own, self.size, self.mean, self.std = own, size, mean, std
        self.streams = [stream_id(seed, f"own-{number}") for number in (0, 1)]

    def __call__(
        self, images: Tensor, epoch: int, index: Tensor, number: int, whole: bool, size: int = 0
    ) -> Tensor:
        """Make one view of each image; those of single images are made already, as uint8."""
        if self.own.batched:
            view = self.own.views[number]
            numbers = uniform(self.streams[number], combine(epoch, index), view.draws)
            made = _of_batch(view, images, numbers)
            _check_batch(made, len(images), len(self.mean), self.size)
        else:
            made = images.float() / 255
        made = normalise(made, self.mean, self.std)
        return made.contiguous(memory_format=torch.channels_last)
