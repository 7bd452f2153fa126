"""What an export says of a network: what a format can hold, and how to build and feed it.

`write` and `official` have the formats themselves.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from moco.algorithm.encoder import TORCHVISION_RESNETS
from moco.algorithm.names import is_own
from moco.algorithm.vit import is_vit, shape_arguments
from moco.checkpoints.architecture import constructor_arguments
from moco.checkpoints.load import Loaded
from moco.checkpoints.preparation import UNUSUAL

# The names of v3's ViTs, which have 12 heads, to those of the same networks in timm.
V3_VITS = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}
OFFICIAL = ("official", "official-v3")
NAMELESS = ("safetensors", "onnx", "torch-export")  # formats that need no known network
Features = Callable[[Tensor], Tensor]
Files = dict[str, bytes]  # name to content; a single file has the name ""


def obstacle(loaded: Loaded, form: str) -> str:
    """Return what of a network a format cannot hold; empty if it can hold all."""
    model, channels = loaded.model, loaded.data["channels"]
    if is_own(model.backbone):
        return "" if form in NAMELESS else f"{model.backbone}, a module of your own"
    published = model.backbone in TORCHVISION_RESNETS
    vit = is_vit(model.backbone)
    if form == "official-v3" and vit:
        return "" if _as_in_v3(loaded) else f"a {model.backbone} that v3's code does not have"
    if form in ("torchvision", "detectron2", *OFFICIAL) and not published:
        return f"{model.backbone}, which torchvision does not have"
    if form in ("timm", "torchvision", "detectron2", *OFFICIAL) and model.width != 1 and not vit:
        return f"a {model.backbone} of width {model.width:g}"
    if form in ("timm", "torchvision", "detectron2") and model.stem == "cifar":
        return f"a {model.backbone} with CIFAR stem"
    if form in ("timm", "torchvision", "detectron2", *OFFICIAL) and model.stem == "patch":
        return f"a {model.backbone} with patch stem"
    if form in OFFICIAL and {"stem_padding", "stem_relu"} & loaded.variant.keys():
        return f"a {model.backbone} whose first layers are not those that its users build"
    if form == "torchvision" and channels != 3:
        return f"a {model.backbone} of {channels} channels"
    return ""


def _as_in_v3(loaded: Loaded) -> bool:
    """Tell whether a ViT has the shape of one that v3's code builds."""
    blocks, model = loaded.backbone.blocks, loaded.model
    named = model.backbone in V3_VITS.values() and model.width == 1 and model.patch_size in (0, 16)
    return named and (len(blocks), blocks[0].attn.num_heads) == (12, 12)


def describe(loaded: Loaded) -> dict[str, Any]:
    """Return the note that travels with the weights: how to build the network and feed it."""
    model = loaded.model
    note = {"backbone": model.backbone, "stem": model.stem, "width": model.width}
    if is_vit(model.backbone):
        note["width"] = 1.0  # `embed_dim` in the variant says it
    note |= {name: v for name, v in loaded.data.items() if name not in UNUSUAL}
    note |= {"preparation": loaded.preparation.as_note()}
    note |= {"feature_dim": loaded.feature_dim, "variant": variant(loaded)}
    note |= {"source_layout": loaded.layout, "encoder": loaded.encoder}
    return note | ({} if loaded.epoch is None else {"epoch": loaded.epoch})


def variant(loaded: Loaded) -> dict[str, Any]:
    """Return what shapes a network besides its name, stem and the width of a ResNet."""
    vit = shape_arguments(loaded.model) if is_vit(loaded.model.backbone) else {}
    return vit | loaded.variant


def tensors(loaded: Loaded) -> dict[str, Tensor]:
    """Return the backbone's tensors, each with memory of its own, as safetensors needs them."""
    return {k: v.detach().clone().contiguous() for k, v in loaded.backbone.state_dict().items()}


def saved(write: Callable[[io.BytesIO], Any]) -> Files:
    """Return what a function writes to a file as the one file of an export."""
    buffer = io.BytesIO()
    write(buffer)
    return {"": buffer.getvalue()}


def loading_line(loaded: Loaded, form: str, path: str | Path) -> str:
    """Return what loads an export of this network: Python, or the words of another's command."""
    name, place = loaded.model.backbone, repr(str(path))
    python = {
        "timm": f"import timm; network = timm.create_model({f'local-dir:{path}'!r}, "
        "pretrained=True, num_classes=0).eval()",
        "torchvision": f"import torch, torchvision; network = torchvision.models.{name}(); "
        f"network.load_state_dict(torch.load({place}), strict=False); "
        "network.fc = torch.nn.Identity(); network.eval()",
        "safetensors": _safetensors_line(loaded, place),
        "onnx": f"import onnxruntime; session = onnxruntime.InferenceSession({place}); "
        f"features = session.run(None, {{'images': images.numpy()}})[0]",
        "torch-export": f"import torch; network = torch.export.load({place}).module()",
    }
    return python[form] if form in python else _command(loaded, form, path)


def _command(loaded: Loaded, form: str, path: str | Path) -> str:
    """Return the words with which the code of the papers and detectron2 take a file."""
    if form == "detectron2":
        mean, std = ([255 * x for x in loaded.data[name]] for name in ("mean", "std"))
        return (
            f"MODEL.WEIGHTS {path} INPUT.FORMAT RGB MODEL.RESNETS.STRIDE_IN_1X1 False "
            f"{_detectron2_shape(loaded.model.backbone)}"
            f"MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}"
        )
    name = {timm: v3 for v3, timm in V3_VITS.items()}.get(loaded.model.backbone)
    script = f"main_lincls.py -a {name or loaded.model.backbone} --pretrained {path}"
    if steps := _first_layers(loaded, "model", loaded.data["channels"] != 3):
        script += f", after {'; '.join(steps)} where the script has built its model"
    return script


def _detectron2_shape(name: str) -> str:
    """Say how a ResNet differs from detectron2's usual one, of depth 50, whose other layers it
    would leave random."""
    depth = int(re.sub(r"\D*(\d+).*", r"\1", name))
    cells = re.search(r"_(\d+)x(\d+)d$", name)
    groups, width = map(int, cells.groups()) if cells else (1, 64)
    width *= 2 if name.startswith("wide_") else 1
    usual = {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 256}
    own = (depth, groups, width, 64 if depth < 50 else 256)
    pairs = zip(usual.items(), own, strict=True)
    return "".join(f"MODEL.RESNETS.{key} {v} " for (key, known), v in pairs if v != known)


def _safetensors_line(loaded: Loaded, place: str) -> str:
    if is_own(loaded.model.backbone):
        return f"import moco; network = moco.load_backbone({place}, backbone=module)"
    arguments = constructor_arguments(loaded)
    arguments.pop("weight_init", None)  # the file's weights take the place of the first ones
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    steps = ["import timm, torch, safetensors.torch"]
    steps.append(f"network = timm.create_model({loaded.model.backbone!r}, {words})")
    steps += _first_layers(loaded, "network", loaded.model.width != 1)
    steps.append(f"network.load_state_dict(safetensors.torch.load_file({place}))")
    return "; ".join([*steps, "network.eval()"])


def _first_layers(loaded: Loaded, network: str, other: bool) -> list[str]:
    """Return the Python that gives a ResNet the first layers of this one.

    Args:
        network: What its variable is called.
        other: Whether its first convolution differs although max-pooling follows it.
    """
    model, pooled = loaded.model, loaded.model.stem == "imagenet"
    if is_vit(model.backbone):
        return []
    steps = []
    if other or not pooled:
        c = loaded.backbone.conv1
        sizes = (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0])
        layer = f"torch.nn.Conv2d({', '.join(map(str, sizes))}, bias=False)"
        steps.append(f"{network}.conv1 = {layer}")
    absent = [] if pooled else ["maxpool"]
    absent += [] if loaded.variant.get("stem_relu", True) else ["act1"]
    return steps + [f"{network}.{name} = torch.nn.Identity()" for name in absent]
