"""Blindness: which changes of an image leave its features as they are.

A change is measured against the distance between images: 1 remains where the feature stays the
same, 0 where it becomes as far as another image's. What an encoder does not see, no classifier on
top of it can tell apart.
Shapes: N images, C channels, S side, D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torchvision.transforms.v2 import functional

from moco.config import DataConfig
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData
from moco.images.views import normalise
from moco.pixels import normalisation
from moco.random import permutation

BLIND, KEEN = 0.9, 0.5  # what remains: from here up it is not seen, up to here it is seen well
_IMAGES = 128


@dataclass
class Change:
    """What remains of the similarity after a change; `name` says which it is."""

    name: str
    remains: float


def measure(network: nn.Module, source: ImageSource, data: DataConfig, seed: int) -> list[Change]:
    """Change some images in each way, and compare their features.

    Args:
        network: The backbone in eval mode, on the device that is to be used.

    Returns:
        The changes, what is seen least first; empty where the images cannot be told apart.
    """
    device = next(network.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in normalisation(data))
    chosen = permutation(seed, "blindness", 0, len(source))[:_IMAGES]
    images = LabelledData(source.rows(chosen), replace(data, max_bad_fraction=1.0))
    parts = [
        batch * std[:, None, None] + mean[:, None, None] for batch, _ in images.batches(device)
    ]
    if not parts:
        return []
    pixels = torch.cat(parts).clamp(0, 1)  # N C S S

    def features(changed: Tensor) -> Tensor:
        batches = normalise(changed.clamp(0, 1), mean, std).split(64)
        found = torch.cat([network(batch).float() for batch in batches])
        return normalize(found)

    with torch.inference_mode():
        own = features(pixels)
        between = _between(own)
        if not between < 1 - 1e-4:  # also where a feature is no number
            return []
        found = []
        for name, change in _changes(data.channels, data.image_size).items():
            kept = (own * features(change(pixels))).sum(1).mean().item()
            found.append(Change(name, (kept - between) / (1 - between)))
    return sorted(found, key=lambda each: -each.remains)


def _between(features: Tensor) -> float:
    """Return the mean cosine of two different images; 1 where there is one image."""
    count = len(features)
    if count < 2:
        return 1.0
    total = features.sum(0).square().sum().item() - features.square().sum().item()
    return total / (count * (count - 1))


def _changes(channels: int, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return each change of images N x C x S x S on a 0-1 scale, by its name."""
    part, shift, sigma = max(1, size * 7 // 10), size // 5, max(size / 32, 0.5)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "crop of the middle half": lambda x: _resized(
            functional.center_crop(x, [part, part]), size
        ),
        "shift by a fifth": lambda x: torch.roll(x, (shift, shift), (2, 3)),
        "half the resolution": lambda x: _resized(_resized(x, max(1, size // 2)), size),
        "blur": lambda x: functional.gaussian_blur(x, [2 * int(3 * sigma) + 1] * 2, [sigma] * 2),
        "mirror, left and right": functional.horizontal_flip,
        "mirror, up and down": functional.vertical_flip,
        "quarter turn": lambda x: x.rot90(1, (2, 3)),
        "turn by 15 degrees": lambda x: _turned(x, 15, size),
        "brightness, 40 % more": lambda x: x * 1.4,
        "brightness, 40 % less": lambda x: x * 0.6,
        "contrast, half": lambda x: (x + x.mean((1, 2, 3), keepdim=True)) / 2,
        "negative": lambda x: 1 - x,
    }
    if channels == 3:
        found["hue, a third of the circle"] = lambda x: functional.adjust_hue(x, 1 / 3)
        found["colour: grey"] = lambda x: functional.rgb_to_grayscale(x, num_output_channels=3)
    if channels > 1:
        names = ("red", "green", "blue") if channels == 3 else range(1, channels + 1)
        for band, name in enumerate(names):
            found[f"without {name if channels == 3 else f'band {name}'}"] = partial(_without, band)
    return found


def _without(band: int, images: Tensor) -> Tensor:
    """Replace one band by its own mean."""
    changed = images.clone()
    changed[:, band] = images[:, band].mean((1, 2), keepdim=True)
    return changed


def _resized(images: Tensor, size: int) -> Tensor:
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def _turned(images: Tensor, degrees: float, size: int) -> Tensor:
    """Turn images, which go on beyond their edges as in a mirror."""
    beyond = functional.pad(images, [size // 4] * 4, padding_mode="reflect")
    kind = functional.InterpolationMode.BILINEAR
    return functional.center_crop(functional.rotate(beyond, degrees, kind), [size, size])


def sentence(changes: list[Change], labelled: bool) -> str:
    """Say in words what the encoder does not see, and what it sees well."""
    blind = [change.name for change in changes if change.remains >= BLIND]
    keen = [change.name for change in changes[::-1] if change.remains <= KEEN]
    whose = "your classes may differ in it" if labelled else "what you look for may lie in it"
    parts = [f"Hardly seen: {'; '.join(blind)} ({whose})."] if blind else []
    parts += [f"Seen well: {'; '.join(keen)}."] if keen else []
    return " ".join(parts) or "Every change is seen somewhat, and none of them well."
