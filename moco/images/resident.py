"""Resident or streamed: whether a set's images are held decoded, and where."""

from __future__ import annotations

import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images import sources
from moco.images.sources import ImageSource


def make_resident(
    source: ImageSource, config: DataConfig, device: torch.device, report_path: str | None
) -> tuple[ImageSource, Tensor | None, str]:
    """Decide between device, memory and streaming, and decode.

    Returns: The source without unreadable files, its images M x C x H x W uint8 or None if
        streamed, and where they are.
    """
    needed, size = sources.estimate_bytes(source)
    budget = config.resident_budget * 2**30
    wanted = config.resident
    check_view_size(config, size)
    if source.images is None:
        if wanted == "off" or (wanted == "auto" and (size is None or needed > budget)):
            return source, None, "streamed"
        try:
            images, bad = sources.load_all(source)
        except sources.MixedSizes as error:
            if wanted != "auto":
                raise UserError(
                    f"data.resident is {wanted} but the images differ in size ({error}): set "
                    "data.resident off"
                ) from None
            return source, None, "streamed"
        source = sources.check_files(source, bad, config.max_bad_fraction, report_path)
        if bad:
            whole = torch.ones(len(images), dtype=torch.bool)
            whole[[index for index, _ in bad]] = False
            images = images[whole]
    else:
        images = source.images
    if wanted == "device" or (wanted == "auto" and device.type == "cuda"):
        return source, images.to(device), "device"
    return source, images, "memory"


def check_view_size(config: DataConfig, size: tuple[int, int] | None) -> None:
    """Raise UserError when views would be larger than the images they are cut from."""
    if size is not None and min(size) * config.upscale < config.image_size:
        raise UserError(
            f"data.image_size {config.image_size} is above the images' {min(size)} pixels: set "
            f"it to {min(size)}, "
            f"or allow enlarging with data.upscale {config.image_size / min(size):.3g}"
        )
