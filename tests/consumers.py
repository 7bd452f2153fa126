"""Load each format of an export as other projects do.

Each function takes a path and a timm name, and returns the network and what the file says about
its images.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import pickletools

import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn
from torchvision import models


def load_timm(path, name):
    network = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    about = json.loads((path / "config.json").read_text())["pretrained_cfg"]
    channels, size, _ = about["input_size"]
    assert about["input_size"] == [channels, size, size]
    config = network.pretrained_cfg
    assert list(config["mean"]) == about["mean"] and config.get("license") is None
    own = json.loads((path / "config.json").read_text())["moco"]
    return network, about | own | {"channels": channels, "image_size": size}


def load_torchvision(path, name):
    with torch.device("meta"):
        network = models.get_model(name, weights=None)
    return into_torchvision(network, torch.load(path, weights_only=True)), None


def into_torchvision(network, state):
    """Load as main_lincls does: exactly the classifier may be missing."""
    outcome = network.load_state_dict(state, strict=False, assign=True)
    assert set(outcome.missing_keys) == {"fc.weight", "fc.bias"} and not outcome.unexpected_keys
    network.fc = nn.Identity()
    return network.eval()


def load_safetensors(path, name):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["moco"])
        state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    if name is None:  # only what it says is wanted
        return None, about
    options = ({"img_size": about["image_size"]} if "vit" in name else {}) | about["variant"]
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0, in_chans=about["channels"], **options)
        if about["stem"] == "cifar":
            cifar_stem(network, about["channels"])
        elif about["stem"] == "patch":
            cifar_stem(network, about["channels"], 4, 2)
    network.load_state_dict(state, assign=True)
    return network.eval(), about


TOLD = ("mean", "std", "image_size", "channels", "preparation")


def load_onnx(path, name):
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    about = {k: json.loads(metadata[k]) for k in TOLD}
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]), about


def load_torch_export(path, name):
    extra = {"moco.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["moco.json"])


def load_official_v3(path, name):
    """Load as v3's main_lincls does; timm's ViTs have its names and, with 12 heads, its shapes."""
    if "vit" not in name:
        return load_official(path, name, "module.base_encoder")
    content = torch.load(path, weights_only=True)
    about, size = content["moco"], content["moco"]["image_size"]
    assert content["arch"] in ("vit_small", "vit_base")
    network = timm.create_model(name, num_heads=12, img_size=size, num_classes=0)
    start = "module.base_encoder."
    state = {k.removeprefix(start): v for k, v in content["state_dict"].items() if start in k}
    outcome = network.load_state_dict(state, strict=False)
    assert not outcome.missing_keys
    assert all(name.startswith("head.") for name in outcome.unexpected_keys)
    return network.eval(), about


def load_official(path, name, encoder="module.encoder_q"):
    """Load as main_lincls does, with another first layer where the source has one."""
    content = torch.load(path, weights_only=True)
    about = content["moco"]
    with torch.device("meta"):
        network = models.__dict__[content["arch"]]()
        if about["stem"] == "cifar":
            cifar_stem(network, about["channels"])
        elif about["channels"] != 3:
            network.conv1 = nn.Conv2d(about["channels"], 64, 7, 2, 3, bias=False)
    state = content["state_dict"]
    for key in list(state):
        if key.startswith(encoder) and not key.startswith(f"{encoder}.fc"):
            state[key[len(f"{encoder}.") :]] = state[key]
        del state[key]
    return into_torchvision(network, state), about


def load_detectron2(path, name):
    """Load the pickle and fill a network by walking it with detectron2's names."""
    content = torch_free_pickle(path)
    assert content["matching_heuristics"] is True and content["__author__"]
    arrays = dict(content["model"])
    about = content["moco"]
    network = models.get_model(name, weights=None)
    if about["channels"] != 3:
        network.conv1 = nn.Conv2d(about["channels"], 64, 7, 2, 3, bias=False)
    network.fc = nn.Identity()
    for place, module in network.named_modules():
        parts = place.split(".")
        prefix = "stem" if parts[0] in ("conv1", "bn1") else None
        if prefix is None and parts[0].startswith("layer"):
            prefix = f"res{int(parts[0][5:]) + 1}.{parts[1]}" if len(parts) > 2 else None
            parts = parts[2:]
        if prefix is None or not list(module.parameters(recurse=False)):
            continue
        leaf = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}.get(".".join(parts))
        leaf = leaf or parts[0].replace("bn1", "conv1.norm").replace("bn2", "conv2.norm")
        leaf = leaf.replace("bn3", "conv3.norm")
        for kind in ("weight", "running_mean", "running_var", "bias"):
            if getattr(module, kind, None) is not None:
                array = arrays.pop(f"{prefix}.{leaf}.{kind}")
                getattr(module, kind).data.copy_(torch.from_numpy(array))
    assert not arrays
    return network.eval(), about


def torch_free_pickle(path):
    """Read a pickle that holds nothing but arrays, by names that any numpy knows."""
    content = path.read_bytes()
    operations = [(op[0].name, op[1]) for op in pickletools.genops(content)]
    assert not [name for kind, name in operations if kind == "GLOBAL"]
    strings = [text for kind, text in operations if "UNICODE" in kind]
    assert not any("_core" in s or "numpy." in s for s in strings)
    return pickle.loads(content)


def cifar_stem(network, channels, size=3, stride=1):
    network.conv1 = nn.Conv2d(channels, network.bn1.num_features, size, stride, 1, bias=False)
    network.maxpool = nn.Identity()


LOADERS = {
    "timm": load_timm,
    "torchvision": load_torchvision,
    "safetensors": load_safetensors,
    "official": load_official,
    "official-v3": load_official_v3,
    "detectron2": load_detectron2,
    "onnx": load_onnx,
    "torch-export": load_torch_export,
}


@contextlib.contextmanager
def fresh_weights_of_ones():
    """Draw no weights, since a file overwrites them: drawing takes half of the time of loading."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "uniform_", "normal_"):
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor.data.fill_(1))
        yield
