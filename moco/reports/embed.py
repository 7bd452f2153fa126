"""Features of any images as one Parquet file: `python -m moco embed`.

The file's metadata says what is needed to embed another image in the same way: the checkpoint, the
checksum of its backbone, the settings of the images.
Shapes: M images, N images of a batch, D feature, h w sides of a map.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from moco import distributed, rendezvous
from moco.checkpoints.load import Loaded
from moco.checkpoints.matching import checksum
from moco.checkpoints.preparation import preparation
from moco.config import DataConfig, UserError
from moco.evaluation.features import feature_shape
from moco.evaluation.opening import ReadData, open_encoder, start_process
from moco.evaluation.own import NOTHING, Given
from moco.evaluation.subject import Layer
from moco.idle import idle_in_embedding
from moco.images.bad_files import BadFiles
from moco.images.dicom import split_frame
from moco.images.folders import expanded
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData
from moco.images.resident import check_view_size, estimate_bytes
from moco.images.sources import identify
from moco.judge_config import NAMING, EmbedConfig
from moco.pixels import normalisation
from moco.reports.listing import Listing, list_images_of, list_own
from moco.reports.parts import BAD_FILES, Job, compute, is_done, join, remove_parts
from moco.reports.table import FILE

log = logging.getLogger("moco")


class Maps(nn.Module):
    """Images to the backbone's last map before pooling, N x D x h x w."""

    def __init__(self, backbone: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.backbone, self.bf16 = backbone, bf16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.backbone.forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1]


def embed(config: EmbedConfig, read_data: ReadData, given: Given = NOTHING) -> dict[str, Any]:
    """Write the features of images to `features.parquet` in a directory, or go on with it.

    Args:
        read_data: Data settings, given those of the run that made the checkpoint as defaults.

    Returns:
        Plain values on rank 0: files, counts, seconds; empty on other ranks.

    Raises:
        RunError: The disk failed.
    """
    begin = time.perf_counter()
    device = start_process(config)
    rank = distributed.rank()
    try:
        with distributed.together():
            job = _open(config, read_data, given, device)
        distributed.check_alike(job.about["backbone_sha256"], f"the weights in {config.checkpoint}")
        distributed.check_alike(job.about["images"], f"the images of {job.images.source.name}")
        is_there = distributed.from_first(lambda: is_done(job))
        if not is_there:
            compute(job, device)
    finally:
        rendezvous.disconnect()
    if rank > 0:
        return {}
    if not is_there:
        join(job)
        remove_parts(job)
    return _finish(job) | {"seconds": round(time.perf_counter() - begin, 1)}


def network_of(config: EmbedConfig, loaded: Loaded) -> nn.Module:
    """Return what maps images to the features that are asked for, in eval mode.

    Raises:
        UserError: The checkpoint has no head, or the backbone gives no maps.
    """
    bf16 = config.precision == "bf16-mixed"
    if config.features == "head" and loaded.head is None:
        raise UserError(f"{config.checkpoint} holds no projection head: take --features backbone")
    if config.features != "patch":
        head = loaded.head if config.features == "head" else None
        return Layer(loaded.backbone, head, bf16).eval()
    if not hasattr(loaded.backbone, "forward_intermediates"):
        raise UserError(
            f"{loaded.model.backbone} gives no maps in timm: take --features backbone, or another "
            "checkpoint"
        )
    return Maps(loaded.backbone, bf16).eval()


def checksums_of(config: EmbedConfig, loaded: Loaded) -> dict[str, str]:
    """Return what tells the weights behind the features that are asked for from others."""
    head = checksum(loaded.head) if config.features == "head" else ""
    return {"backbone_sha256": checksum(loaded.backbone), "head_sha256": head}


def _open(config: EmbedConfig, read_data: ReadData, given: Given, device: torch.device) -> Job:
    """Load the encoder, list the images, and say what the file will be."""
    loaded, data, stored = open_encoder(config, read_data, given)
    if any(getattr(data, name) != stored.get(name) for name in ("dataset", "root")):
        stored = {name: value for name, value in stored.items() if name not in NAMING}
    if idle := idle_in_embedding(config, data, stored):
        log.info("%s", idle)
    network = network_of(config, loaded).to(device)
    shape = feature_shape(network, data, device)
    source = given.open_plain(data)
    listing = list_images_of(data) if source is None else list_own(source)
    check_view_size(data, estimate_bytes(listing.source)[1])
    log.info("%s: %d images", listing.source.name, len(listing.source))
    if listing.source.reading.reason:
        log.info("%s", listing.source.reading)
    report = str(Path(config.output) / BAD_FILES)
    bad = BadFiles(listing.source, data.max_bad_fraction, report)
    images = LabelledData(listing.source, data, bad)
    about = _describe(config, loaded, data, listing, shape)
    return Job(config, network, listing, images, about)


def _describe(
    config: EmbedConfig, loaded: Loaded, data: DataConfig, listing: Listing, shape: tuple[int, ...]
) -> dict[str, Any]:
    """State which encoder computes what from which images, so that both can be found again."""
    mean, std = normalisation(data)
    reading = listing.source.reading
    told: dict[str, Any] = {"channels": data.channels, "image_size": data.image_size}
    told |= {"mean": mean, "std": std, "exif": data.exif, "dicom_window": data.dicom_window}
    if reading.reason:  # files of more than 8 bits
        told |= {"min_value": list(reading.low), "max_value": list(reading.high)}
    if listing.source.paths or reading.reason:  # for what looks at a few of them later
        data = replace(data, min_value=list(reading.low), max_value=list(reading.high))
    options = asdict(config)
    for name in ("checkpoint", "output", "index", "map", "overwrite", "accelerator", "devices"):
        del options[name]
    root = expanded(data.root) if data.root else ""
    return {
        "checkpoint": os.path.abspath(config.checkpoint),
        **checksums_of(config, loaded),
        "backbone": loaded.model.backbone,
        "features": config.features,
        "shape": list(shape),
        "preparation": preparation(told).as_note(),
        "data_root": root,
        "images": identify(listing.source, data.root),
        "labels": crc32(json.dumps([listing.splits, listing.labels]).encode()),
        "files": bool(listing.source.paths),
        "state": _state(listing.source),
        "data": asdict(data),
        "options": options,
    }


def _state(source: ImageSource) -> int:
    """Return a checksum of the sizes and times of the files, since one may be replaced."""
    found = 0
    for path in source.paths:
        with contextlib.suppress(OSError):  # a file that is gone is told when it is read
            facts = os.stat(split_frame(path)[0])
            found = crc32(f"{facts.st_size} {facts.st_mtime_ns}\n".encode(), found)
    return found


def _finish(job: Job) -> dict[str, Any]:
    """Write the map and the index where they are wanted, and say what is there."""
    from moco.reports.index import open_features, write_index
    from moco.reports.mapping import add_map
    from moco.reports.table import Features

    target = job.folder / FILE
    features = Features(job.folder)
    unread = len(job.images) - len(features)
    if unread:
        log.info("%d of %d images were read", len(features), len(job.images))
    else:  # what a failed start has listed is mended by now
        (job.folder / BAD_FILES).unlink(missing_ok=True)
    result = {
        "command": "embed",
        "features": str(target),
        "images": len(features),
        "unread": unread,
        "shape": job.about["shape"],
        "checkpoint": job.config.checkpoint,
        "backbone_sha256": job.about["backbone_sha256"],
    }
    if job.config.index:
        result["index"] = str(write_index(open_features(str(job.folder))))
    if job.config.map and "x" not in features.names:
        add_map(features)
    log.info("written to %s", target)
    return result
