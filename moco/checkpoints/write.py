"""Turn an encoder into the bytes of each export format, and read them back as their users do.

`FORMATS` lists the formats: a writer, which does not touch the disk, and a reader, with which
`export` compares features. `obstacle` says what a format cannot hold. Shapes: C embedding, K queue.
"""

from __future__ import annotations

import contextlib
import copy
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

from moco.algorithm.encoder import TORCHVISION_RESNETS, timm_arguments
from moco.checkpoints.architecture import RANGE
from moco.checkpoints.load import Loaded, load_encoder, read_contents
from moco.checkpoints.matching import take
from moco.checkpoints.model_card import model_card
from moco.config import UserError

Features = Callable[[Tensor], Tensor]
Files = dict[str, bytes]  # name to content; a single file has the name ""
TIMM_FILES = ("config.json", "model.safetensors", "README.md")
CLASSIFIER = ("fc.weight", "fc.bias")  # exports lack torchvision's classifier


def obstacle(loaded: Loaded, form: str) -> str:
    """Return what of a network a format cannot hold; empty if it can hold all."""
    model, channels = loaded.model, loaded.data["channels"]
    published = model.backbone in TORCHVISION_RESNETS
    if form in ("torchvision", "official", "detectron2") and not published:
        return f"{model.backbone}, which torchvision does not have"
    if form in ("timm", "torchvision", "official", "detectron2") and model.width != 1:
        return f"a {model.backbone} of width {model.width:g}"
    if form in ("timm", "torchvision", "detectron2") and model.stem == "cifar":
        return f"a {model.backbone} with CIFAR stem"
    if form == "official" and {"stem_padding", "stem_relu"} & loaded.variant.keys():
        return f"a {model.backbone} whose first layers are not those that its users build"
    if form == "torchvision" and channels != 3:
        return f"a {model.backbone} of {channels} channels"
    return ""


def describe(loaded: Loaded) -> dict[str, Any]:
    """Return the note that travels with the weights: how to build the network and feed it."""
    model = loaded.model
    note = {"backbone": model.backbone, "stem": model.stem, "width": model.width}
    note |= {**loaded.data, "feature_dim": loaded.feature_dim, "variant": loaded.variant}
    note |= {"source_layout": loaded.layout, "encoder": loaded.encoder}
    return note | ({} if loaded.epoch is None else {"epoch": loaded.epoch})


def _tensors(loaded: Loaded) -> dict[str, Tensor]:
    # safetensors refuses shared and non-contiguous tensors.
    return {k: v.detach().clone().contiguous() for k, v in loaded.backbone.state_dict().items()}


def _saved(content: Any) -> Files:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return {"": buffer.getvalue()}


def _write_safetensors(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    from safetensors.torch import save

    metadata = {"format": "pt", "moco": json.dumps(describe(loaded))}
    return {"": save(_tensors(loaded), metadata | ({"license": licence} if licence else {}))}


def _write_timm(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    from safetensors.torch import save

    config = json.dumps(_timm_config(loaded, licence), indent=2).encode()
    weights = save(_tensors(loaded), {"format": "pt"})
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
        "model_args": arguments | loaded.variant,
        "pretrained_cfg": details,
        **({"moco": ends} if ends else {}),
    }


def _read_timm(path: Path, loaded: Loaded) -> Features:
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()


def _into_twin(state: dict[str, Tensor], loaded: Loaded) -> Features:
    """Load torchvision's network as the official linear evaluation does.

    Exactly the classifier may be missing. The first layers are built like the source's.
    """
    from torchvision.models import get_model

    twin = get_model(loaded.model.backbone, weights=None).eval()
    twin.conv1 = copy.deepcopy(loaded.backbone.conv1)
    if loaded.model.stem == "cifar":
        twin.maxpool = nn.Identity()
    outcome = twin.load_state_dict(state, strict=False)
    if set(outcome.missing_keys) != set(CLASSIFIER) or outcome.unexpected_keys:
        raise UserError(f"torchvision's {loaded.model.backbone} does not take it: {outcome}")
    twin.fc = nn.Identity()
    return twin


def _write_official(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    """Write both encoders with their heads, and the queue, as far as the source has them.

    The official scripts read `encoder_q` alone, so an export of the key encoder is written there.
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
    encoder = take(state, "module.encoder_q.")
    return _into_twin({k: v for k, v in encoder.items() if not k.startswith("fc")}, loaded)


_DETECTRON2 = (
    *((f"layer{n}.", f"res{n + 1}.") for n in (1, 2, 3, 4)),
    *((f"bn{n}.", f"conv{n}.norm.") for n in (1, 2, 3)),
    ("downsample.0.", "shortcut."),
    ("downsample.1.", "shortcut.norm."),
)


def _detectron2_name(name: str) -> str:
    for old, new in _DETECTRON2:
        name = name.replace(old, new)
    return name if name.startswith("res") else f"stem.{name}"


def _write_detectron2(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    state = _tensors(loaded)
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    model = {_detectron2_name(name): state[name].numpy() for name in names}
    content = {"model": model, "__author__": "MoCo", "matching_heuristics": True}
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(content | {"moco": describe(loaded)})
    return {"": buffer.getvalue()}


class _ArrayPickler(pickle.Pickler):
    """Pickle arrays by `numpy.ndarray` alone, since numpy 1 does not know the names of numpy 2."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return np.ndarray, (item.shape, item.dtype.str, bytearray(item.tobytes()))
        return NotImplemented


class _ArrayUnpickler(pickle.Unpickler):
    """Read only what `_ArrayPickler` can write."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"): np.ndarray, ("builtins", "bytearray"): bytearray}
        return allowed[module, name]


def _read_detectron2(path: Path, loaded: Loaded) -> Features:
    with path.open("rb") as stream:
        arrays = _ArrayUnpickler(stream).load()["model"]
    state = dict(loaded.backbone.state_dict())  # the file does not count batches
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    state |= {name: torch.from_numpy(arrays[_detectron2_name(name)]) for name in names}
    return _into_twin(state, loaded)


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
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"moco.json": json.dumps(describe(loaded))})
    return {"": buffer.getvalue()}


def _read_torch_export(path: Path, loaded: Loaded) -> Features:
    with path.open("rb") as stream:
        return torch.export.load(stream).module()


def loading_line(loaded: Loaded, path: Path) -> str:
    """Return the Python that builds a safetensors file's network by timm and fills it."""
    model, data, variant = loaded.model, loaded.data, loaded.variant
    arguments = {"num_classes": 0, "in_chans": data["channels"]}
    arguments |= timm_arguments(model, data["image_size"])
    arguments |= {name: v for name, v in variant.items() if not name.startswith("stem_")}
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    steps = [f"network = timm.create_model({model.backbone!r}, {words})"]
    if model.stem == "cifar" or model.width != 1:
        c = loaded.backbone.conv1
        sizes = (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0])
        layer = f"torch.nn.Conv2d({', '.join(map(str, sizes))}, bias=False)"
        steps.append(f"network.conv1 = {layer}")
    absent = ["maxpool"] if model.stem == "cifar" else []
    absent += [] if variant.get("stem_relu", True) else ["act1"]
    steps += [f"network.{name} = torch.nn.Identity()" for name in absent]
    steps.append(f"network.load_state_dict(safetensors.torch.load_file({str(path)!r}))")
    return "; ".join(steps)


# Format to writer, reader, and the difference allowed, as a share of the largest feature.
FORMATS: dict[str, tuple[Callable[..., Files], Callable[..., Features], float]] = {
    "timm": (_write_timm, _read_timm, 1e-5),
    "torchvision": (
        lambda loaded, *_: _saved(_tensors(loaded)),
        lambda path, loaded: _into_twin(torch.load(path, weights_only=True), loaded),
        1e-5,
    ),
    "safetensors": (_write_safetensors, lambda path, _: load_encoder(path).backbone, 1e-5),
    "official": (_write_official, _read_official, 1e-5),
    "detectron2": (_write_detectron2, _read_detectron2, 1e-5),
    "onnx": (_write_onnx, _read_onnx, 1e-4),
    "torch-export": (_write_torch_export, _read_torch_export, 1e-5),
}
