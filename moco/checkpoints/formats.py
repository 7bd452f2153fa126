"""The formats that an encoder can be written in: for each, what it cannot hold, a writer, a reader.

A writer turns an encoder into the bytes of files and touches no disk. A reader loads these files
the way their consumer would, so that `export` can compare features.
Shapes: N images, H W pixels, D feature, C embedding, K queue.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.algorithm.encoder import TORCHVISION_RESNETS
from moco.checkpoints.architecture import has_fixed_size
from moco.checkpoints.load import Loaded, load_encoder, read_contents
from moco.checkpoints.model_card import model_card
from moco.config import UserError

Features = Callable[[Tensor], Tensor]
Files = dict[str, bytes]  # name to content; one file that is no directory has the name ""
TIMM_FILES = ("config.json", "model.safetensors", "README.md")
CLASSIFIER = ("fc.weight", "fc.bias")  # of torchvision's networks: left to whoever loads them


def obstacle(loaded: Loaded, form: str) -> str:
    """Say what of a network a format cannot hold, or nothing."""
    model, channels = loaded.model, loaded.data["channels"]
    published = model.backbone in TORCHVISION_RESNETS
    if form in ("torchvision", "official", "detectron2") and not published:
        return f"{model.backbone}, which torchvision does not have"
    if form in ("timm", "torchvision", "official", "detectron2") and model.width != 1:
        return f"a {model.backbone} of width {model.width:g}"
    if form in ("timm", "torchvision", "detectron2") and model.stem == "cifar":
        return f"a {model.backbone} with CIFAR stem"
    if form == "torchvision" and channels != 3:
        return f"a {model.backbone} of {channels} channels"
    return ""


def describe(loaded: Loaded) -> dict[str, Any]:
    """Return what travels with the weights, in plain types, so that nobody has to guess."""
    model = loaded.model
    note = {"backbone": model.backbone, "stem": model.stem, "width": model.width}
    note |= {**loaded.data, "feature_dim": loaded.feature_dim, "variant": loaded.variant}
    note |= {"source_layout": loaded.layout, "encoder": loaded.encoder}
    return note | ({} if loaded.epoch is None else {"epoch": loaded.epoch})


def _tensors(loaded: Loaded) -> dict[str, Tensor]:
    # Own memory for each: safetensors refuses shared and non-contiguous tensors.
    return {k: v.detach().clone().contiguous() for k, v in loaded.backbone.state_dict().items()}


def _saved(content: Any) -> Files:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return {"": buffer.getvalue()}


def _write_safetensors(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    from safetensors.torch import save

    metadata = {"format": "pt", "moco": json.dumps(describe(loaded))}
    return {"": save(_tensors(loaded), metadata | ({"license": licence} if licence else {}))}


def _read_safetensors(path: Path, loaded: Loaded) -> Features:
    return load_encoder(path).backbone


def _write_timm(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    from safetensors.torch import save

    config, card = _timm_config(loaded, licence), model_card(loaded, checkpoint, licence)
    contents = (
        json.dumps(config, indent=2).encode(),
        save(_tensors(loaded), {"format": "pt"}),
        card.encode(),
    )
    return dict(zip(TIMM_FILES, contents, strict=True))


def _timm_config(loaded: Loaded, licence: str) -> dict[str, Any]:
    data, known = loaded.data, getattr(loaded.backbone, "pretrained_cfg", {})
    size = [data["channels"], data["image_size"], data["image_size"]]
    fixed = has_fixed_size(loaded.backbone)
    arguments = {"in_chans": data["channels"]} | ({"img_size": size[1]} if fixed else {})
    # Only what holds for these weights: tag, licence and scores of timm's own do not travel along.
    details = {name: known.get(name) for name in ("first_conv", "classifier")}
    details |= {"tag": "moco", "input_size": size, "fixed_input_size": fixed, "num_classes": 0}
    details |= {"mean": data["mean"], "std": data["std"], "interpolation": "bilinear"}
    details |= {"crop_pct": 1.0 if size[1] < 100 else 0.875, "custom_load": False}
    details |= {"license": licence} if licence else {}
    return {
        "architecture": loaded.model.backbone,
        "num_classes": 0,
        "num_features": loaded.feature_dim,
        "model_args": arguments | loaded.variant,
        "pretrained_cfg": details,
    }


def _read_timm(path: Path, loaded: Loaded) -> Features:
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()


def _torchvision_twin(loaded: Loaded) -> nn.Module:
    """Build torchvision's network, with the source's first layers where these are others."""
    from torchvision.models import get_model

    twin, first = get_model(loaded.model.backbone, weights=None), loaded.backbone.conv1
    if loaded.model.stem == "cifar":
        twin.maxpool = nn.Identity()
    twin.conv1 = nn.Conv2d(
        first.in_channels,
        first.out_channels,
        first.kernel_size,
        first.stride,
        first.padding,
        bias=False,
    )
    return twin.eval()


def _into_twin(state: dict[str, Tensor], loaded: Loaded) -> Features:
    """Load as the official linear evaluation does: exactly the classifier may be missing."""
    twin = _torchvision_twin(loaded)
    outcome = twin.load_state_dict(state, strict=False)
    if set(outcome.missing_keys) != set(CLASSIFIER) or outcome.unexpected_keys:
        raise UserError(f"torchvision's {loaded.model.backbone} does not take it: {outcome}")
    twin.fc = nn.Identity()
    return twin


def _write_torchvision(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    return _saved(_tensors(loaded))


def _read_torchvision(path: Path, loaded: Loaded) -> Features:
    return _into_twin(torch.load(path, weights_only=True), loaded)


def _write_official(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    """Both encoders with heads, and the queue, as far as the source has them.

    The official scripts read `encoder_q` alone; so an export of the key encoder goes there, alone.
    """
    contents = read_contents(checkpoint)
    state, note = {}, describe(loaded)
    own = "key" if loaded.encoder == "key" else "query"
    for place, side in {"encoder_q": own, "encoder_k": "" if own == "key" else "key"}.items():
        backbone = contents.take(f"{side}_encoder.backbone.")
        parts = {"": _tensors(loaded) if place == "encoder_q" else backbone}
        parts["fc."] = contents.take(f"{side}_encoder.head.")
        for part, tensors in parts.items():
            state |= {f"module.{place}.{part}{name}": value for name, value in tensors.items()}
    keys = contents.state.get("queue.keys")
    if keys is not None and own == "query":
        count = int(contents.state.get("queue.num_enqueued", 0))
        state["module.queue"] = keys.T.contiguous()  # C K
        state["module.queue_ptr"] = torch.tensor([count % len(keys)])
        note["num_enqueued"] = count
    content = {"epoch": loaded.epoch or 0, "arch": loaded.model.backbone, "state_dict": state}
    return _saved(content | {"moco": note})


def _read_official(path: Path, loaded: Loaded) -> Features:
    state = torch.load(path, weights_only=True)["state_dict"]
    prefix = "module.encoder_q."
    names = [n for n in state if n.startswith(prefix) and not n.startswith(f"{prefix}fc")]
    return _into_twin({name.removeprefix(prefix): state[name] for name in names}, loaded)


_DETECTRON2 = (
    *((f"layer{n}.", f"res{n + 1}.") for n in (1, 2, 3, 4)),
    *((f"bn{n}.", f"conv{n}.norm.") for n in (1, 2, 3)),
    ("downsample.0.", "shortcut."),
    ("downsample.1.", "shortcut.norm."),
)


def _write_detectron2(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    model = {}
    for name, tensor in _tensors(loaded).items():
        if not name.endswith("num_batches_tracked"):
            for old, new in _DETECTRON2:
                name = name.replace(old, new)
            model[name if name.startswith("res") else f"stem.{name}"] = tensor.numpy()
    content = {"model": model, "__author__": "MoCo", "matching_heuristics": True}
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(content | {"moco": describe(loaded)})
    return {"": buffer.getvalue()}


class _ArrayPickler(pickle.Pickler):
    """Pickle arrays by `numpy.ndarray` alone: names of numpy 2 are unknown to older ones."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return np.ndarray, (item.shape, item.dtype.str, bytearray(item.tobytes()))
        return NotImplemented


class _ArrayUnpickler(pickle.Unpickler):
    """Read back what `_ArrayPickler` wrote and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"): np.ndarray, ("builtins", "bytearray"): bytearray}
        return allowed[module, name]


def _read_detectron2(path: Path, loaded: Loaded) -> Features:
    with path.open("rb") as stream:
        arrays = _ArrayUnpickler(stream).load()["model"]
    state = {}
    for name, array in arrays.items():
        # The longer names first, so that conv1.norm is not taken for conv1.
        for old, new in sorted(_DETECTRON2, key=lambda pair: -len(pair[1])):
            name = name.replace(new, old)
        state[name.removeprefix("stem.")] = torch.from_numpy(array)
    for name in loaded.backbone.state_dict():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    return _into_twin(state, loaded)


def _dynamic_batch(loaded: Loaded) -> dict[str, Any]:
    size = loaded.data["image_size"]
    images = torch.zeros(2, loaded.data["channels"], size, size)  # a graph depends on no value
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
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"moco.json": json.dumps(describe(loaded))})
    return {"": buffer.getvalue()}


def _read_torch_export(path: Path, loaded: Loaded) -> Features:
    with path.open("rb") as stream:
        return torch.export.load(stream).module()


# Name to writer, reader, and the difference allowed, as a share of the largest feature.
FORMATS: dict[str, tuple[Callable[..., Files], Callable[..., Features], float]] = {
    "timm": (_write_timm, _read_timm, 1e-5),
    "torchvision": (_write_torchvision, _read_torchvision, 1e-5),
    "safetensors": (_write_safetensors, _read_safetensors, 1e-5),
    "official": (_write_official, _read_official, 1e-5),
    "detectron2": (_write_detectron2, _read_detectron2, 1e-5),
    "onnx": (_write_onnx, _read_onnx, 1e-4),
    "torch-export": (_write_torch_export, _read_torch_export, 1e-5),
}
