"""What is judged: an encoder and labelled images, opened and checked, and the baselines.

Shapes: N images of a batch, M training images (the bank), Q test images (the queries), D feature,
L classes, W ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from moco import distributed, rendezvous
from moco.checkpoints.architecture import Architecture, build
from moco.checkpoints.load import Loaded
from moco.config import DataConfig, TrainConfig, UserError
from moco.distributed import gather_ragged
from moco.evaluation.features import extract_features
from moco.evaluation.opening import ReadData, open_encoder, start_process
from moco.evaluation.own import Given, Pair, identity
from moco.idle import idle_in_evaluation
from moco.images import sources
from moco.images.folders import expanded
from moco.images.labelled import LabelledData, open_data
from moco.judge_config import LISTS, JudgeConfig, KNNConfig, LinearConfig
from moco.log import track
from moco.pixels import normalisation

log = logging.getLogger("moco")
PIXEL_SIDE = 32


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
        networks: `encoder`, and with baselines `untrained`, further draws of its weights
            (`untrained 2`, ...) and `raw_pixels`.
        bank, queries: Training and test images.
        classes: L names.
        name: Of the files that take the results.
        hits: Of each network that was scored, as of `moco.evaluation.verdict`.
    """

    judge: JudgeConfig
    data: DataConfig
    loaded: Loaded
    networks: dict[str, nn.Module]
    bank: LabelledData
    queries: LabelledData
    classes: list[str]
    device: torch.device
    name: str
    hits: dict[str, Tensor] = field(default_factory=dict)

    def features(self, name: str, images: LabelledData) -> tuple[Tensor, Tensor]:
        """Return features and rows of this rank's share of what can be read."""
        total = math.ceil(len(images) / distributed.world_size() / 256)
        batches = track(images.batches(self.device), f"{name} features", total)
        return extract_features(self.networks[name], batches)

    def all_features(self, name: str, images: LabelledData) -> tuple[Tensor, Tensor]:
        """Return features and rows of all that can be read, on every rank, in rising order."""
        return in_order(*self.features(name, images))


def in_order(found: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gather what all ranks have found of their rows, and the rows, in rising order of these."""
    if distributed.world_size() == 1:
        return found, rows
    rows, order = gather_ragged(rows).sort()
    return gather_ragged(found)[order], rows


def output_path(judge: JudgeConfig, name: str) -> Path:
    """Name a file beside the checkpoint, or in `output`."""
    checkpoint = Path(judge.checkpoint)
    key = "-key" if judge.encoder == "key" else ""
    stem, dot, kind = name.rpartition(".")
    return Path(judge.output or checkpoint.parent) / f"{checkpoint.name}.{stem}{key}{dot}{kind}"


@contextlib.contextmanager
def open_subject(
    judge: JudgeConfig, own: LinearConfig | KNNConfig, read_data: ReadData, given: Given, name: str
) -> Iterator[Subject]:
    """Open encoder and images on this rank's device, and leave the process group at the end."""
    device = start_process(judge)
    try:
        with distributed.together():
            subject = _open(judge, own, read_data, given, name, device)
        for part in (subject.bank, subject.queries):
            if distributed.world_size() > 1:
                found = sources.identify(part.source, subject.data.root)
                distributed.check_alike(found, f"the images of {part.source.name}")
            part.bad.look_ahead()
        yield subject
    finally:
        rendezvous.disconnect()


def _open(
    judge: JudgeConfig,
    own: LinearConfig | KNNConfig,
    read_data: ReadData,
    given: Given,
    name: str,
    device: torch.device,
) -> Subject:
    loaded, data, stored = open_encoder(judge, read_data, given)
    if idle := idle_in_evaluation(judge, own, data, stored):
        log.info("%s", idle)
    if lost := [f"data.{name}" for name in LISTS if stored.get(name) and not getattr(data, name)]:
        log.info("%s of the run is for its own images: give it to take it", " and ".join(lost))
    networks = _networks(judge, loaded, data, judge.untrained_draws or _own_draws(own))
    pair = given.open_labelled(data)
    name += _other_images(data, TrainConfig.from_dict({"data": stored}).data, pair)
    bank, queries = _open_images(pair, data, device, output_path(judge, f"{name}-bad_files.txt"))
    for images in (bank, queries):
        log.info("%s: %d images", images.source.name, len(images))
    for network in networks.values():
        network.eval().to(device)
    classes = bank.source.classes
    return Subject(judge, data, loaded, networks, bank, queries, classes, device, name)


def _other_images(data: DataConfig, own: DataConfig, pair: Pair) -> str:
    """Name the images in the results' files unless they are those that the encoder's run took."""
    given = [identity(part) for part in pair] if data.dataset == "own" else ""

    def told(part: DataConfig) -> str:
        place = part.root and os.path.realpath(expanded(part.root))
        seen = part.image_size, part.channels, *normalisation(part), part.files, part.labels
        read = part.min_value, part.max_value, part.exif, part.dicom_window
        return repr((part.dataset, place, seen, read))

    if told(data) == told(own) and not given:
        return ""
    files = data.dataset in ("folder", "imagenet")
    label = os.path.basename(expanded(data.root)) if files else data.dataset
    return (
        f"-{re.sub('[^A-Za-z0-9_]', '_', label)[:40]}-{crc32(f'{told(data)}{given}'.encode()):08x}"
    )


def _own_draws(own: LinearConfig | KNNConfig) -> int:
    """Return the untrained networks of a protocol: one where each runs in every epoch."""
    return 1 if isinstance(own, LinearConfig) and own.protocol not in ("cached", "views") else 3


def _networks(
    judge: JudgeConfig, loaded: Loaded, data: DataConfig, draws: int
) -> dict[str, nn.Module]:
    """Build what is judged: the encoder, draws of the untrained network, raw pixels."""
    bf16 = judge.precision == "bf16-mixed"
    head = loaded.head if judge.layer == "head" else None
    if judge.layer == "head" and head is None:
        raise UserError(f"{judge.checkpoint} holds no projection head: take --layer backbone")
    networks: dict[str, nn.Module] = {"encoder": Layer(loaded.backbone, head, bf16)}
    if judge.baselines:
        images = {"channels": data.channels, "image_size": data.image_size}
        same = Architecture(loaded.model, images, loaded.variant, loaded.own)
        for draw in range(draws if loaded.own is None else 1):  # as its author has drawn it
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(judge.seed + draw)
                backbone, fresh_head, _ = build(same, head is not None)
            name = f"untrained {draw + 1}" if draw else "untrained"
            networks[name] = Layer(backbone, fresh_head, bf16)
        networks["raw_pixels"] = Pixels()
    return networks


def _open_images(
    pair: Pair, data: DataConfig, device: torch.device, report: Path
) -> list[LabelledData]:
    """Keep the classes that both splits have, and decode what is to be resident.

    Args:
        report: Takes the names of unreadable files; an earlier one is removed.

    Raises:
        UserError: There are no two classes in common.
    """
    if pair[0].reading.reason:
        log.info("%s", pair[0].reading)
    if distributed.rank() == 0:
        report.unlink(missing_ok=True)
    pair = sources.shared_classes(*pair)
    return [open_data(source, data, device, str(report)) for source in pair]
