"""Turn an encoder into the bytes of each export format, and read them back as their users do.

`FORMATS` lists the formats: a writer, which does not touch the disk, and a reader, with which
`export` compares features.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save

from moco.algorithm.encoder import timm_arguments
from moco.checkpoints.architecture import RANGE
from moco.checkpoints.describe import Features, Files, describe, saved, tensors, variant
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
from moco.config import UserError


def _write_safetensors(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    metadata = {"format": "pt", "moco": json.dumps(describe(loaded))}
    return {"": save(tensors(loaded), metadata | ({"license": licence} if licence else {}))}


def _write_timm(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    config = json.dumps(_timm_config(loaded, licence), indent=2).encode()
    weights = save(tensors(loaded), {"format": "pt"})
    card = model_card(loaded, checkpoint, licence).encode()
    return dict(zip(TIMM_FILES, (config, weights, card), strict=True))


def _timm_config(loaded: Loaded, licence: str) -> dict[str, Any]:
    data, known = loaded.data, getattr(loaded.backbone, "pretrained_cfg", {})
    size = [data["channels"], data["image_size"], data["image_size"]]
    fixed = "img_size" in timm_arguments(loaded.model, size[1])
    arguments = {"in_chans": data["channels"]} | ({"img_size": size[1]} if fixed else {})
    # The tag, licence and scores of timm's own weights do not hold for these.
    details = {name: known.get(name) for name in ("first_conv", "classifier")}
    details |= {"tag": "moco", "input_size": size, "fixed_input_size": fixed, "num_classes": 0}
    details |= {"mean": data["mean"], "std": data["std"], "interpolation": "bilinear"}
    details |= {"crop_pct": 1.0 if size[1] < 100 else 0.875, "custom_load": False}
    details |= {"license": licence} if licence else {}
    ends = {name: data[name] for name in RANGE if name in data}
    return {
        "architecture": loaded.model.backbone,
        "num_classes": 0,
        "num_features": loaded.feature_dim,
        "model_args": arguments | variant(loaded),
        "pretrained_cfg": details,
        **({"moco": ends} if ends else {}),
    }


def _read_timm(path: Path, loaded: Loaded) -> Features:
    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()


def _dynamic_batch(loaded: Loaded) -> dict[str, Any]:
    size = loaded.data["image_size"]
    images = torch.zeros(2, loaded.data["channels"], size, size)  # the values do not matter
    return {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def _write_onnx(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    size = sum(tensor.nbytes for tensor in loaded.backbone.state_dict().values())
    if size > 2**31 - 2**20:
        raise UserError(f"--format onnx holds 2 GiB, these weights have {size / 2**30:.1f}")
    with contextlib.redirect_stdout(sys.stderr):
        program = torch.onnx.export(
            loaded.backbone,
            **_dynamic_batch(loaded),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
        )
    for name, value in describe(loaded).items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    return {"": program.model_proto.SerializeToString()}


def _read_onnx(path: Path, loaded: Loaded) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torch_export(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    program = torch.export.export(loaded.backbone, **_dynamic_batch(loaded))
    note = {"moco.json": json.dumps(describe(loaded))}
    return saved(lambda file: torch.export.save(program, file, extra_files=note))


def _read_torch_export(path: Path, loaded: Loaded) -> Features:
    with path.open("rb") as stream:
        return torch.export.load(stream).module()


# Format to writer, reader, and the difference allowed, as a share of the largest feature.
FORMATS: dict[str, tuple[Callable[..., Files], Callable[..., Features], float]] = {
    "timm": (_write_timm, _read_timm, 1e-5),
    "torchvision": (
        lambda loaded, *_: saved(partial(torch.save, tensors(loaded))),
        lambda path, loaded: into_twin(torch.load(path, weights_only=True), loaded),
        1e-5,
    ),
    "safetensors": (_write_safetensors, lambda path, _: load_encoder(path).backbone, 1e-5),
    "official": (write_official, read_official, 1e-5),
    "official-v3": (
        partial(write_official, v3=True),
        partial(read_official, first="base_encoder."),
        1e-5,
    ),
    "detectron2": (write_detectron2, read_detectron2, 1e-5),
    "onnx": (_write_onnx, _read_onnx, 1e-4),
    "torch-export": (_write_torch_export, _read_torch_export, 1e-5),
}
