"""An encoder is opened: this rank's device, the checkpoint, and the settings of the images.

Evaluation, quality without labels, features and search all begin here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moco import rendezvous
from moco.checkpoints.load import Loaded, load_encoder
from moco.checks import check
from moco.config import DataConfig, TrainConfig, UserError
from moco.evaluation.own import NOTHING, Given
from moco.judge_config import EmbedConfig, JudgeConfig, QualityConfig
from moco.log import log_to_stderr

log = logging.getLogger("moco")
ReadData = Callable[[dict[str, Any]], DataConfig]
# Settings that only pretraining uses; judging refuses them rather than ignoring them.
PRETRAINING_ONLY = (
    *("views", "batch_size", "chunks", "pairs"),
    *("image_size_start", "image_size_end", "image_size_share"),
    *("crop_min", "interpolation", "jitter", "grey", "blur", "solarise"),
)


def start_process(judge: JudgeConfig | EmbedConfig | QualityConfig) -> torch.device:
    """Choose this rank's device, join the other ranks, and set up the log."""
    log_to_stderr()
    gpu = judge.accelerator != "cpu" and torch.cuda.is_available()
    if judge.accelerator == "gpu" and not gpu:
        raise UserError(
            "accelerator is gpu but torch sees none: use cpu or auto, or mend the driver"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    available = torch.cuda.device_count() if gpu else os.cpu_count() or 1
    count = max(local + 1, getattr(judge, "devices", 1))
    if count > available:
        raise UserError(f"devices is {count} but there are {available} here: lower it")
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    rendezvous.connect(device)
    return device


def open_encoder(
    judge: JudgeConfig | EmbedConfig | QualityConfig, read_data: ReadData, given: Given
) -> tuple[Loaded, DataConfig, dict[str, Any]]:
    """Load an encoder for images of the size that it is judged at.

    Returns:
        The encoder, the settings of these images, and those that its file holds.
    """
    loaded = load(judge, 0, given)
    stored = loaded.config.get("data", {}) | loaded.data
    data = data_settings(loaded, read_data)
    if data.image_size != loaded.data["image_size"]:
        loaded = load(judge, data.image_size, given)
    log.info("%s", loaded.report)
    return loaded, data, stored


def load(
    judge: JudgeConfig | EmbedConfig | QualityConfig, image_size: int, given: Given = NOTHING
) -> Loaded:
    """Load the encoder that the settings name, for images of that side; 0: as in its file."""
    return load_encoder(
        judge.checkpoint,
        judge.encoder,
        judge.allow_partial,
        judge.backbone if given.backbone is None else given.backbone,
        image_size,
        judge.stem_padding,
        judge.num_heads,
    )


def data_settings(loaded: Loaded, read_data: ReadData) -> DataConfig:
    """Take the checkpoint's data settings with the user's put over them, and check them."""
    stored = dict(loaded.config.get("data", {})) | loaded.data
    data = read_data(stored)
    for name in PRETRAINING_ONLY:
        if getattr(data, name) != stored.get(name, getattr(DataConfig(), name)):
            raise UserError(f"data.{name} is a setting of pretraining: leave it out here")
    config = TrainConfig(data=replace(data, batch_size=2, image_size_start=0, image_size_end=0))
    if undecided := config.undecided():
        raise UserError(f"{undecided[0]} is auto: leave it out, the checkpoint has it")
    check(config)
    if data.channels != loaded.data["channels"]:
        raise UserError(
            f"data.channels is {data.channels} but the checkpoint takes "
            f"{loaded.data['channels']}: leave it out"
        )
    return data
