"""Turn an encoder into the bytes of each export format, and read them back as their users do.

`FORMATS` lists the formats: a writer, which does not touch the disk, and a reader, with which
`export` compares features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from moco.checkpoints.describe import (
    Features,
    Files,
    describe,
    loading_line,
    saved,
    tensors,
    variant,
)
from moco.checkpoints.graphs import read_onnx, read_torch_export, write_onnx, write_torch_export
from moco.checkpoints.load import Loaded, load_encoder
from moco.checkpoints.model_card import model_card
from moco.checkpoints.official import (
    into_twin,
    read_detectron2,
    read_official,
    write_detectron2,
    write_official,
)
from moco.checkpoints.places import TIMM_FILES


def _write_safetensors(loaded: Loaded, checkpoint: Path, licence: str, *_: Any) -> Files:
    note = describe(loaded) | {"load_with": loading_line(loaded, "safetensors", "FILE")}
    metadata = {"format": "pt", "moco": json.dumps(note)}
    return {"": save(tensors(loaded), metadata | ({"license": licence} if licence else {}))}


def _own(loaded: Loaded) -> str | nn.Module:
    return "" if loaded.own is None else loaded.own


def _write_timm(loaded: Loaded, checkpoint: Path, licence: str, *_: Any) -> Files:
    config = json.dumps(_timm_config(loaded, licence), indent=2).encode()
    weights = save(tensors(loaded), {"format": "pt"})
    card = model_card(loaded, checkpoint, licence).encode()
    return dict(zip(TIMM_FILES, (config, weights, card), strict=True))


def _timm_config(loaded: Loaded, licence: str) -> dict[str, Any]:
    # The licence of timm's own weights does not hold for these.
    details = loaded.backbone.pretrained_cfg | ({"license": licence} if licence else {})
    channels, size = loaded.data["channels"], loaded.data["image_size"]
    arguments = {"in_chans": channels} | ({"img_size": size} if details["fixed_input_size"] else {})
    return {
        "architecture": loaded.model.backbone,
        "num_classes": 0,
        "num_features": loaded.feature_dim,
        "model_args": arguments | variant(loaded),
        "pretrained_cfg": details,
        "moco": {"preparation": loaded.preparation.as_note()},
    }


def _read_timm(path: Path, loaded: Loaded) -> Features:
    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()


# Format to writer, reader, and the difference allowed, as a share of the largest feature.
FORMATS: dict[str, tuple[Callable[..., Files], Callable[..., Features], float]] = {
    "timm": (_write_timm, _read_timm, 1e-5),
    "torchvision": (
        lambda loaded, *_: saved(partial(torch.save, tensors(loaded))),
        lambda path, loaded: into_twin(torch.load(path, weights_only=True), loaded),
        1e-5,
    ),
    "safetensors": (
        _write_safetensors,
        lambda path, loaded: load_encoder(path, backbone=_own(loaded)).backbone,
        1e-5,
    ),
    "official": (write_official, read_official, 1e-5),
    "official-v3": (
        partial(write_official, v3=True),
        partial(read_official, first="base_encoder."),
        1e-5,
    ),
    "detectron2": (write_detectron2, read_detectron2, 1e-5),
    "onnx": (write_onnx, read_onnx, 1e-4),
    "torch-export": (write_torch_export, read_torch_export, 1e-5),
}
