"""What is judged: an encoder and labelled images, opened and checked, and the baselines.

Shapes: N images of a batch, M training images (the bank), Q test images (the queries), D feature,
L classes, W ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from moco import distributed
from moco.algorithm.encoder import build_encoder
from moco.checkpoints.load import Loaded, load_encoder
from moco.config import (
    DataConfig,
    JudgeConfig,
    KNNConfig,
    LinearConfig,
    TrainConfig,
    UserError,
    check,
)
from moco.distributed import gather_ragged
from moco.evaluation.features import extract_features
from moco.idle import idle_in_evaluation
from moco.images import sources
from moco.images.labelled import Labelled, LabelledData
from moco.images.resident import make_resident

log = logging.getLogger("moco")
ReadData = Callable[[dict[str, Any]], DataConfig]
PIXEL_SIDE = 32
# Settings that only pretraining uses; judging refuses them rather than ignoring them.
PRETRAINING_ONLY = ("views", "batch_size", "crop_min", "jitter", "grey", "blur")


class Pixels(nn.Module):
    """The baseline without a network: normalised pixels, averaged down to 32 x 32 at most."""

    def forward(self, images: Tensor) -> Tensor:
        side = min(PIXEL_SIDE, images.shape[2])
        small = images if images.shape[2] == side else adaptive_avg_pool2d(images, side)
        return small.flatten(1)


class Layer(nn.Module):
    """Images to features N x D of the judged layer."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None, bf16: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.bf16 = backbone, head, bf16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.backbone(images)
            return features if self.head is None else self.head(features)


@dataclass
class Subject:
    """An encoder and labelled images, ready to be judged.

    Attributes:
        judge, data: Settings.
        loaded: The encoder and what its file says.
        networks: `encoder`, and with baselines `untrained` and `raw_pixels`.
        bank, queries: Training and test images.
        classes: L names.
    """

    judge: JudgeConfig
    data: DataConfig
    loaded: Loaded
    networks: dict[str, nn.Module]
    bank: Labelled
    queries: Labelled
    classes: list[str]
    device: torch.device

    def batches(self, images: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of resized, centre-cropped images and labels."""
        data = LabelledData(self.data, images.source, self.queries.source, images.images, None)
        return data.batches("bank", self.device)

    def features(self, name: str, images: Labelled) -> tuple[Tensor, Tensor]:
        """Return this rank's share of features and labels."""
        total = math.ceil(len(images) / distributed.world_size() / 256)
        batches = track(self.batches(images), f"{name} features", total)
        return extract_features(self.networks[name], batches)

    def all_features(self, name: str, images: Labelled) -> tuple[Tensor, Tensor]:
        """Return all features and labels, on every rank, in the order of the images."""
        features, labels = self.features(name, images)
        return in_order(features, len(images)), in_order(labels, len(images))


def rank_order(count: int) -> Tensor:
    """List M images in the order in which `gather_ragged` stacks them: every W-th of rank 0 first.

    Returns:
        M int64: place p holds image `order[p]`.
    """
    world = distributed.world_size()
    return torch.cat([torch.arange(rank, count, world) for rank in range(world)])


def in_order(rows: Tensor, count: int) -> Tensor:
    """Gather every W-th row of all ranks and return the rows in the order of the images."""
    if distributed.world_size() == 1:
        return rows
    return gather_ragged(rows)[rank_order(count).argsort().to(rows.device)]


def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
    """Show a bar on a terminal, elsewhere a line every 20 seconds, on rank 0's standard error."""
    from tqdm import tqdm

    quiet = distributed.rank() > 0
    if sys.stderr.isatty():
        return tqdm(items, label, total, disable=quiet)
    times = {"delay": 20, "mininterval": 20, "maxinterval": 20}
    return tqdm(items, label, total, leave=False, disable=quiet, ascii=True, **times)


def output_path(judge: JudgeConfig, name: str) -> Path:
    """Name a file beside the checkpoint, or in `output`."""
    checkpoint = Path(judge.checkpoint)
    key = "-key" if judge.encoder == "key" else ""
    stem, dot, kind = name.rpartition(".")
    return Path(judge.output or checkpoint.parent) / f"{checkpoint.name}.{stem}{key}{dot}{kind}"


@contextlib.contextmanager
def open_subject(
    judge: JudgeConfig, own: LinearConfig | KNNConfig, read_data: ReadData, name: str
) -> Iterator[Subject]:
    """Open encoder and images on this rank's device, and leave the process group at the end."""
    device = _start_process(judge)
    try:
        folder = output_path(judge, f"{name}.json").parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{folder} is no directory to write in: name one with --output DIR")
        loaded = _load(judge, 0)
        data = _data_settings(loaded, read_data)
        stored = loaded.config.get("data", {}) | loaded.data
        if idle := idle_in_evaluation(judge, own, data, stored):
            log.info("%s", idle)
        if data.image_size != loaded.data["image_size"]:
            loaded = _load(judge, data.image_size)
        log.info("%s", loaded.report)
        networks = _networks(judge, loaded, data)
        bank, queries = _open_images(data, device)
        for images in (bank, queries):
            log.info("%s: %d images", images.source.name, len(images))
        for network in networks.values():
            network.eval().to(device)
        classes = bank.source.classes
        yield Subject(judge, data, loaded, networks, bank, queries, classes, device)
    finally:
        if distributed.world_size() > 1:
            torch.distributed.destroy_process_group()


def _load(judge: JudgeConfig, image_size: int) -> Loaded:
    return load_encoder(
        judge.checkpoint,
        judge.encoder,
        judge.allow_partial,
        judge.backbone,
        image_size,
        judge.stem_padding,
        judge.num_heads,
    )


def _start_process(judge: JudgeConfig) -> torch.device:
    """Choose this rank's device, join the other ranks, and set up the log."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    gpu = judge.accelerator != "cpu" and torch.cuda.is_available()
    if judge.accelerator == "gpu" and not gpu:
        raise UserError(
            "accelerator is gpu but torch sees none: use cpu or auto, or mend the driver"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    available = torch.cuda.device_count() if gpu else os.cpu_count() or 1
    count = max(local + 1, judge.devices)
    if count > available:
        raise UserError(f"devices is {count} but there are {available} here: lower it")
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(local)
    return torch.device("cuda", local) if gpu else torch.device("cpu")


def _data_settings(loaded: Loaded, read_data: ReadData) -> DataConfig:
    """Take the checkpoint's data settings with the user's put over them, and check them."""
    stored = dict(loaded.config.get("data", {})) | loaded.data
    data = read_data(stored)
    for name in PRETRAINING_ONLY:
        if name in stored and getattr(data, name) != stored[name]:
            raise UserError(f"data.{name} is a setting of pretraining: leave it out here")
    check(TrainConfig(data=replace(data, batch_size=2)))
    if data.channels != loaded.data["channels"]:
        raise UserError(
            f"data.channels is {data.channels} but the checkpoint takes "
            f"{loaded.data['channels']}: leave it out"
        )
    return data


def _networks(judge: JudgeConfig, loaded: Loaded, data: DataConfig) -> dict[str, nn.Module]:
    """Build what is judged: the encoder, the untrained network, raw pixels."""
    bf16 = judge.precision == "bf16-mixed"
    head = loaded.head if judge.layer == "head" else None
    if judge.layer == "head" and head is None:
        raise UserError(f"{judge.checkpoint} holds no projection head: take --layer backbone")
    networks: dict[str, nn.Module] = {"encoder": Layer(loaded.backbone, head, bf16)}
    if judge.baselines:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(judge.seed)
            fresh = build_encoder(loaded.model, data.channels, data.image_size)
        networks["untrained"] = Layer(fresh.backbone, head and fresh.head, bf16)
        networks["raw_pixels"] = Pixels()
    return networks


def _open_images(data: DataConfig, device: torch.device) -> list[Labelled]:
    """Open training and test images with labels, and refuse what gives no score.

    Raises:
        UserError: No labels, no test split, or no two classes in common.
    """
    pair = sources.open_labelled(data)
    if pair is None:
        raise UserError(
            f"{data.dataset} {data.root} has no labelled train and test images: give a folder with "
            "train/CLASS/ and test/CLASS/ (or val/CLASS/) of two classes or more, or a table with "
            "data.labels"
        )
    if pair[0].reading.reason:
        log.info("%s", pair[0].reading)
    pair = sources.shared_classes(*pair)
    return [Labelled(*make_resident(source, data, device, None)[:2]) for source in pair]
