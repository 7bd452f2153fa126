"""How an image becomes what a network takes: what evaluation does, told in every export.

`Preparation` is the description and also does it: `moco.load_backbone(path).transform` is one, and
`as_note` is what exports hold under the name `preparation`.
Shapes: C channels, H W pixels, S side of the network's images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from moco.config import UserError
from moco.pixels import CENTRE_SHARE, centre_box, scaled

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names of one, three and four channels
# What a file may say of its preparation that is not as usual here.
UNUSUAL = ("exif", "crop_pct", "crop_mode", "interpolation", "dicom_window")
# Entries of timm's `pretrained_cfg` that the network tells; the others are of timm's own weights.
_OF_THE_NETWORK = ("architecture", "first_conv", "classifier")


@dataclass(frozen=True)
class Preparation:
    """Turn a PIL image, or a C x H x W tensor, into a C x S x S float tensor.

    Values of more than 8 bits are scaled as those of the training images were.

    Attributes:
        channels, image_size: C and S.
        mean, std: C each, on a 0-1 scale.
        min_value, max_value: What becomes 0 and 255 in values of more than 8 bits, or empty.
        exif: Whether a PIL image is turned upright as its EXIF orientation says: apply or ignore.
        crop_pct: Share of the short side that the centre square keeps.
        crop_mode: center, or squash: the same share of both sides, which become a square (timm).
        interpolation: bilinear, bicubic or nearest, antialiased.
        dicom_window: Whether DICOM files are shown through their own window, or by min_value and
            max_value.
    """

    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    min_value: list[float] = field(default_factory=list)
    max_value: list[float] = field(default_factory=list)
    exif: str = "apply"
    crop_pct: float = CENTRE_SHARE
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    dicom_window: bool = True

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Prepare one image; a tensor may also hold a batch, N x C x H x W.

        Raises:
            UserError: Neither of these, other channels than C, or values of more than 8 bits where
                no range of them is known.
        """
        if not isinstance(image, Image.Image | Tensor):
            raise UserError(
                f"an image is of type {type(image).__name__}: give a PIL image, or a tensor "
                f"{self.channels} x H x W of torch.uint8{self._others()}"
            )
        pixels = self._levels(image) if isinstance(image, Tensor) else self._pixels(image)
        if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-3] != self.channels:
            raise UserError(
                f"an image is {tuple(pixels.shape)} of {pixels.dtype}: give {self.channels} x H x W"
                f" of torch.uint8{self._others()}"
            )
        pixels = functional.to_dtype(pixels, torch.float32, scale=True)
        pixels = functional.crop(pixels, *self._box(*pixels.shape[-2:]))
        how = InterpolationMode(self.interpolation)
        side = [self.image_size, self.image_size]
        pixels = functional.resize(pixels, side, how, antialias=True)
        return functional.normalize(pixels, self.mean, self.std)

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the part of an image that is kept."""
        if self.crop_mode == "center" or max(height, width) <= self.image_size:
            return centre_box(height, width, self.image_size, self.crop_pct)
        tall, wide = (max(1, round(side * self.crop_pct)) for side in (height, width))
        return (height - tall) // 2, (width - wide) // 2, tall, wide

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return a PIL image as C x H x W uint8, upright, in the mode of C channels."""
        if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip them at 255
            if not self.max_value:
                raise UserError(
                    f"a picture of mode {image.mode} has more than 8 bits: give a tensor of "
                    "torch.uint8"
                )
            image = ImageOps.exif_transpose(image) if self.exif == "apply" else image
            levels = torch.from_numpy(self._scaled(np.asarray(image)[None]))
            if len(levels) == 1 and self.channels in (3, 4):  # grey, as a file's
                opaque = [torch.full_like(levels, 255)] if self.channels == 4 else []
                levels = torch.cat([levels] * 3 + opaque)
            return levels
        if self.exif == "apply":
            image = ImageOps.exif_transpose(image)
        mode = MODES.get(self.channels, image.mode)
        return functional.pil_to_tensor(image if image.mode == mode else image.convert(mode))

    def _levels(self, values: Tensor) -> Tensor:
        """Scale values of more than 8 bits to uint8, where their range is known."""
        if not self.max_value or values.dtype in (torch.uint8, torch.bool) or values.is_complex():
            return values
        wide = values.detach().cpu()
        wide = wide.double() if wide.is_floating_point() else wide
        if wide.ndim < 3 or wide.shape[-3] != self.channels:
            return values
        return torch.from_numpy(self._scaled(wide.numpy())).to(values.device)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        low, high = tuple(self.min_value or [0.0]), tuple(self.max_value)
        return scaled(values, self.channels, low, high)

    def _others(self) -> str:
        """Say which values are taken beside those of 8 bits."""
        return f", or of other numbers{self._range()}" if self.max_value else ""

    def _range(self) -> str:
        if not self.max_value:
            return ""
        return f", with {self.min_value or [0.0]} scaled to 0 and {self.max_value} to 255"

    def as_note(self) -> dict[str, Any]:
        """Return the description as plain values, with the same in words under `steps`."""
        note = {name: value for name, value in asdict(self).items() if value not in ([], ())}
        if self.crop_mode == "center":  # as in the notes of features that were made before
            del note["crop_mode"]
        note |= {"scale": 1 / 255, "antialias": True, "whole_up_to": self.image_size}
        return note | {"steps": self.in_words()}

    def in_words(self) -> str:
        """Say what is done to an image, in order."""
        side = self.image_size
        mode = f" ({MODES[self.channels]})" if self.channels in MODES else ""
        turned = ", turned upright as its EXIF says" if self.exif == "apply" else ""
        units = "" if self.dicom_window else " (DICOM in its units, not through its own window)"
        part = f"the centre square of {self.crop_pct:g} of the short side, its side"
        if self.crop_mode == "squash":
            part = f"the centre of {self.crop_pct:g} of both sides, each"
        steps = [
            f"{self.channels} channel{'s'[: self.channels != 1]}{mode} of 8 bits{turned}"
            f"{self._range()}{units}",
            "times 1/255, as float",
            f"{part} rounded and its corner rounded down (all of an image whose sides are {side} "
            "at most)",
            f"resized to {side} x {side}, {self.interpolation}, antialiased",
            f"less mean {self.mean}",
            f"divided by std {self.std}",
        ]
        return "; ".join(steps)


def preparation(data: dict[str, Any]) -> Preparation:
    """Return how images are prepared, as a network's `data` tell it (see `load.Loaded`)."""
    known = {name: data[name] for name in Preparation.__dataclass_fields__ if name in data}
    return Preparation(**known)


def unusual(source: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says of its preparation that is not as usual here, if it makes sense."""
    share = source.get("crop_pct")
    fits = {
        "exif": source.get("exif") == "ignore",
        "crop_pct": isinstance(share, int | float) and 0 < share <= 1,
        "crop_mode": source.get("crop_mode") == "squash",
        "interpolation": source.get("interpolation") in ("bicubic", "nearest"),
        "dicom_window": source.get("dicom_window") is False,
    }
    if "whole_up_to" in source:  # a note of ours; of others' files even the usual share is a fact
        fits["crop_pct"] &= share != CENTRE_SHARE
    return {name: source[name] for name in UNUSUAL if fits[name]}


def pretrained_cfg(known: dict[str, Any], data: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """Return timm's description of a network, from which timm makes its own transforms.

    Args:
        known: What timm says of the architecture.
        data: As of `load.Loaded`.
        fixed: Whether the network takes images of one size alone.
    """
    how, size = preparation(data), data["image_size"]
    # differs: timm knows one share for images of any size. Below 100 pixels a set's images are
    # rarely larger than the views, and such images are taken whole.
    share = 1.0 if size < 100 and "crop_pct" not in data else how.crop_pct
    return {name: known.get(name) for name in _OF_THE_NETWORK} | {
        **{"tag": "moco", "custom_load": False, "num_classes": 0},
        **{"input_size": [how.channels, size, size], "fixed_input_size": fixed},
        **{"interpolation": how.interpolation, "crop_pct": share, "crop_mode": how.crop_mode},
        **{"mean": how.mean, "std": how.std},
    }
