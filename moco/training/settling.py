"""Settling: what the settings leave open, before anything is built."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import torch

from moco import distributed
from moco.checkpoints.origin import describe
from moco.checks import check
from moco.config import TrainConfig, UserError
from moco.images.image_source import ImageSource
from moco.images.own_views import view_size
from moco.images.resident import estimate_bytes
from moco.pixels import normalisation
from moco.training.autoconfigure import Facts, Settings, autoconfigure, choose_length
from moco.training.build import total_steps
from moco.training.decide import Decided, decide
from moco.training.hardware import accelerator, choose_devices
from moco.training.own import NOTHING, Own
from moco.training.shares import check_queue
from moco.training.stored import Stored

log = logging.getLogger("moco")
STEPS_PER_SECOND = 20  # a guess, before a run has taken any


def settle(
    config: TrainConfig,
    source: ImageSource,
    stored: Stored | None,
    own: Own = NOTHING,
    init_from: str = "",
) -> Settings:
    """Decide what is left to the images and the hardware, but what the speed decides.

    Args:
        config, own: Settings as they were asked for.
        source: The images to train on.
        stored: Of a run that goes on.
        init_from: A checkpoint whose weights a new run starts from, or empty.

    Raises:
        UserError: The settings contradict each other, or do not fit the images.
    """
    if stored:
        before = stored.decided
        settings = Settings(config, *((before.settings, before.reasons) if before else ()))
    else:
        devices, num_nodes = choose_devices(config)
        sides = sorted(min(size) for size in estimate_bytes(source)[1])
        side = sides[len(sides) // 10] if sides else 0
        channels = source.channels if config.data.channels == "auto" else config.data.channels
        found = len(source), side, channels, accelerator(config), devices * num_nodes
        size, end = config.data.image_size, config.data.image_size_end
        if own.views and size == "auto" and end in (0, "auto"):
            found = *found, view_size(own.views, source)
        given = _as_weights(config, channels, init_from, own) if init_from else {}
        settings = autoconfigure(config, Facts(*found), given)
    check(settings.config)
    check_queue(settings.config, len(source))
    if not stored and not settings.config.undecided():
        choose_length(settings, len(source) // settings.config.data.batch_size)
    return settings


def _as_weights(
    config: TrainConfig, channels: int, init_from: str, own: Own = NOTHING
) -> dict[str, Any]:
    """Return settings that follow from the file that a run starts from: what the user leaves open.

    Args:
        config: Settings as they were asked for.
        channels: Of the images.
        init_from: The file.
        own: Its backbone tells which names in the file are the module's.
    """
    origin, data = describe(init_from, own.backbone), config.data
    found = origin.settings(config.model)
    usual = dict(zip(("mean", "std"), normalisation(replace(data, channels=channels)), strict=True))
    for name, values in origin.pixels.items():
        if getattr(data, name) not in ([], "auto"):
            continue  # as the user says
        if name in usual and len(values) == channels and values != usual[name]:
            found[f"data.{name}"] = values
        elif name not in usual or len(values) != channels:
            log.info("data.%s is %s in %s, and is not taken", name, values, init_from)
    return found


def expected_steps(config: TrainConfig, count: int) -> int:
    """Return the steps of a run; a guess where its time is to decide them."""
    if config.undecided():
        return int(config.run.minutes * 60 * STEPS_PER_SECOND)
    return total_steps(config, count // config.data.batch_size)


def decide_how(settings: Settings, steps: int, stored: Stored | None) -> Decided:
    """Decide how the processes that run compute.

    Raises:
        UserError: The settings ask for others, or cannot work here.
    """
    before = (stored.decided, stored.asked) if stored else ()
    decided = decide(settings.config, steps, *before)
    if decided.world != distributed.world_size():
        if started := os.environ.get("LOCAL_WORLD_SIZE"):
            raise UserError(
                f"{started} of {distributed.world_size()} processes were started on this machine, "
                "so machines have different numbers of them: start as many on each "
                "(--nproc-per-node)"
            )
        raise UserError(
            f"the settings ask for {decided.world} devices and {distributed.world_size()} process "
            "runs: start train.py, which starts one per device, or take trainer.devices 1"
        )
    share_cores(decided)
    return decided


def share_cores(decided: Decided) -> None:
    """Share the cores between the processes; two processes with all cores each would crawl."""
    shared = decided.accelerator == "cpu" and decided.devices > 1
    if shared and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // decided.devices))
