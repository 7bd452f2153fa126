"""Resident or streamed: whether a set's images are held decoded, where, and how they are read.

Shapes: M images in the set, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.config.setting import LEAST_VIEW
from moco.images.bad_files import without_bad
from moco.images.decode import BadImage
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.values import FILES, sample

log = logging.getLogger("moco")
FILES_PER_TASK = 256


class MixedSizes(ValueError):
    """Images of two sizes, which no tensor holds."""


def make_resident(
    source: ImageSource, config: DataConfig, device: torch.device, report_path: str | None
) -> tuple[ImageSource, str]:
    """Decide between device, memory and streaming, and decode.

    Returns:
        The source, which holds its images and no unreadable files unless it is streamed, and where
        they are.
    """
    needed, sizes = estimate_bytes(source)
    size = sizes[0] if len(set(sizes)) == 1 else None
    budget = config.resident_budget * 2**30
    wanted = config.resident
    check_view_size(config, sizes)
    if source.is_sharded:
        return source, "streamed"
    if source.images is None:
        if wanted == "off" or (wanted == "auto" and (size is None or needed > budget)):
            return source, "streamed"
        log.info("decoding %d images", len(source))
        try:
            images, bad = load_all(source)
        except MixedSizes as error:
            if wanted != "auto":
                raise UserError(
                    f"data.resident is {wanted} but the images differ in size ({error}): set "
                    "data.resident off"
                ) from None
            return source, "streamed"
        source = replace(source, images=images)
        source = without_bad(source, bad, config.max_bad_fraction, report_path)
    if wanted == "auto" and device.type == "cuda":
        # The machine holds them in memory anyway, so they may take more of a GPU than the budget.
        spare = torch.cuda.get_device_properties(device).total_memory // 4
        wanted = "device" if needed <= max(budget, spare) else "memory"
    if wanted != "device":
        return source, "memory"
    try:
        return replace(source, images=source.images.to(device)), "device"
    except torch.OutOfMemoryError:
        if config.resident == "auto":  # another program, or other images of the run, fill it
            log.info("%.3g GiB of images stay in memory: %s is full", needed / 2**30, device)
            return source, "memory"
        raise UserError(
            f"data.resident is device, and {needed / 2**30:.3g} GiB of images do not fit on "
            f"{device}: set it to memory"
        ) from None


def check_view_size(config: DataConfig, sizes: list[tuple[int, int]]) -> None:
    """Refuse views that are larger than most of the images they are cut from; tell of fewer.

    Args:
        sizes: (H, W) of some of the images.

    Raises:
        UserError: Half of them or more would be enlarged beyond data.upscale.
    """
    if config.views == "own":
        return
    sides = sorted(min(size) for size in sizes)
    small = [side for side in sides if side * config.upscale < config.image_size]
    if not small:
        return
    middle = sides[len(sides) // 2]
    whose = "the images'" if len(set(sides)) == 1 else f"{len(small)} of {len(sides)} images',"
    if 2 * len(small) > len(sides):
        lower = f"set it to {middle}, or " if middle >= LEAST_VIEW else ""
        least = math.ceil(round(100 * config.image_size / middle, 6)) / 100  # not rounded down
        raise UserError(
            f"data.image_size {config.image_size} is above {whose} {middle} pixels: {lower}allow "
            f"enlarging with data.upscale {least:g}"
        )
    what = "what is judged" if config.image_size_end else "the views"
    log.info(
        "%d of %d images looked at are smaller than %s of %d pixels and are enlarged, the "
        "smallest from %d: leave them out, or lower data.image_size",
        len(small), len(sides), what, config.image_size, small[0],
    )  # fmt: skip


def warn_of_one_value(source: ImageSource) -> None:
    """Warn where all images looked at are of one and the same value: no loss tells of it later.

    In almost every set the first one ends the search.
    """
    if source.items is not None or source.is_sharded:
        return
    seen: set[int] = set()
    for index in sample(len(source)):
        with contextlib.suppress(BadImage):
            pixels = source.read_reduced(index, lambda *_: 8).pixels
            seen |= {int(pixels.min()), int(pixels.max())}
        if len(seen) > 1:
            return
    for value in seen:
        log.info("warning: every pixel of the %d images looked at is %d: nothing can be learnt of "
                 "them, see how they were made", min(FILES, len(source)), value)  # fmt: skip


def load_all(source: ImageSource) -> tuple[Tensor | None, list[tuple[int, str]]]:
    """Decode every image into one tensor, on all cores; all must share one size.

    Returns:
        M C H W uint8, and (index, reason) of each bad image in rising order: their rows are noise,
        for the caller to drop. The tensor is None when not one image is good.

    Raises:
        MixedSizes: Two images differ in size.
    """
    if source.images is not None:
        return source.images, []
    total, bad = len(source), []
    for index in range(total):  # the first good image tells the size
        try:
            shape = source.read(index).shape
            break
        except BadImage as error:
            bad.append((index, error.reason))
    else:
        return None, bad
    images, starts = torch.empty(total, *shape, dtype=torch.uint8), range(0, total, FILES_PER_TASK)
    # Pillow decodes outside the GIL; small files are half Python, and more threads only contend.
    with ThreadPoolExecutor(min(source.readers, os.cpu_count() or 1)) as pool:
        parts = pool.map(partial(_load, source, images), starts)
        return images, [bad for part in parts for bad in part]


def _load(source: ImageSource, images: Tensor, start: int) -> list[tuple[int, str]]:
    """Decode the files from `start` on into their rows; return the bad ones."""
    rows, bad = images.numpy(), []
    for index in range(start, min(start + FILES_PER_TASK, len(source))):
        try:
            image = source.read(index).numpy()
        except BadImage as error:
            bad.append((index, error.reason))
            continue
        if image.shape != rows.shape[1:]:
            raise MixedSizes(
                f"{shown(source.called(index))} has {image.shape[1:]} pixels (H W) where others "
                f"have {rows.shape[2:]}"
            )
        rows[index] = image
    return bad


def estimate_bytes(source: ImageSource, samples: int = FILES) -> tuple[int, list[tuple[int, int]]]:
    """Estimate the bytes of all images decoded, from the headers of some.

    Returns:
        The bytes, exact for arrays; and (H, W) of each image looked at.
    """
    if source.images is not None:
        return source.images.nbytes, [tuple(source.images.shape[2:])]
    sizes = []
    for index in sample(len(source), samples):
        with contextlib.suppress(BadImage):
            header = source.header(index)
            sizes.append((header.height, header.width))
    if not sizes:
        return 0, []
    area = sum(height * width for height, width in sizes) / len(sizes)
    return round(area * source.channels * len(source)), sizes
