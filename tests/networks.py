"""Networks whose every tensor matters, the files that hold them, and files that are broken."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import zipfile

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from moco.algorithm.contrast import KeyQueue
from moco.algorithm.encoder import build_encoder, build_predictor
from moco.config import DataConfig, ModelConfig, TrainConfig


def forget() -> None:
    """Free the networks that tests share."""
    torchvision_resnet.cache_clear()
    _module.cache_clear()


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give all statistics and norms values that matter, so that a lost tensor changes features."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "running_var", "norm.weight")) or ".bn" in f".{name}":
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
    return network.eval()


@functools.cache  # shared by the tests of a file, which only read it
def torchvision_resnet(
    seed: int = 0, cifar_padding: int | None = None, width: float = 0.25
) -> nn.Module:
    network = models.resnet18()
    if cifar_padding is not None:
        network.conv1 = nn.Conv2d(3, 64, 3, 1, cifar_padding, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return randomise(narrow(network, round(1 / width)), seed)


def narrow(network: nn.Module, times: int) -> nn.Module:
    """Keep one channel in every `times`, for torchvision's arithmetic on smaller files."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs = (n // times if n > 4 else n for n in module.weight.shape[:2])
            module.weight = nn.Parameter(module.weight[:outputs, :inputs].detach().clone())
        elif isinstance(module, nn.BatchNorm2d):
            for name, tensor in module.state_dict().items():
                if tensor.ndim:
                    getattr(module, name).data = tensor[: len(tensor) // times].clone()
    return network


def module_state(model: ModelConfig, channels: int = 3, size: int = 32, seed: int = 0):
    """Return the state dict of a MoCo module, with two encoders that differ, and the encoders."""
    state, query, key = _module(dataclasses.astuple(model), channels, size, seed)
    return dict(state), query, key


@functools.cache  # shared by the tests of a file, which only read it
def _module(settings: tuple, channels: int, size: int, seed: int):
    model = ModelConfig(*settings)
    query = randomise(build_encoder(model, channels, size), seed)
    key = randomise(copy.deepcopy(query), seed + 1)
    predictor = randomise(build_predictor(model, query.feature_dim), seed + 2)
    parts = {"query_encoder": query, "key_encoder": key, "predictor": predictor}
    names = ("queue", "second_queue")[: model.queues] if model.queue_size else ()
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        parts[name] = KeyQueue(model.queue_size, model.embedding_dim, generator)
        parts[name].num_enqueued += 40
    state = {f"{p}.{k}": v for p, module in parts.items() for k, v in module.state_dict().items()}
    return state, query, key


def save_ours(path, model: ModelConfig, channels: int = 3, size: int = 32):
    """Write a checkpoint as a run does; return its two encoders."""
    state, query, key = module_state(model, channels, size)
    data = DataConfig(dataset="digits", root="/private/place", channels=channels, image_size=size)
    content = {"state_dict": state, "epoch": 3, "global_step": 9, "loops": {}}
    content["config"] = dataclasses.asdict(TrainConfig(model=model, data=data))
    torch.save(content, path)
    return query, key


PLAIN = ModelConfig(backbone="resnet18", queue_size=64, embedding_dim=16)
SMALL = dataclasses.replace(PLAIN, stem="cifar", width=0.25)
CIFAR_HALF = dataclasses.replace(PLAIN, stem="cifar", width=0.5)
VIT = ModelConfig(backbone="test_vit", queue_size=64)  # the smallest network there is
V3 = dataclasses.replace(
    PLAIN, queue_size=0, head="mlp_bn", head_hidden_dim=24, predictor="mlp", symmetric="sum"
)
V3_VIT = dataclasses.replace(
    V3, backbone="vit_tiny_patch16_224", patch_size=4, depth=2, num_heads=4, width=1 / 8,
    head_layers=3, predictor_last_bn=True, positions="sincos", vit_init="xavier",
    freeze_patch_embed=True,
)  # fmt: skip
V3_VIT_SMALL = dataclasses.replace(
    V3_VIT, backbone="vit_small_patch16_224", patch_size=0, depth=0, num_heads=12, width=1.0
)


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def distance(one, other, batch: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest feature."""
    wanted, found = one(batch), other(batch)
    assert wanted.shape == found.shape
    return ((wanted - found).abs().max() / wanted.abs().max()).item()


def run_line(line: str, **scope) -> dict:
    """Run a line of Python as a stranger pastes it; return its variables."""
    exec(line, scope)
    return scope


def prefixed(prefix: str, state):
    return {prefix + name: value for name, value in state.items()}


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def broken_files(folder) -> dict[str, str]:
    """Write one file of each kind; return its name and what the error must say."""
    state = {"conv1.weight": torch.ones(64, 3, 7, 7), "layer4.0.conv1.weight": torch.ones(512, 512)}
    torch.save(state, folder / "good.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "good.safetensors")
    bomb = Bomb(f"touch {folder / 'EXPLODED'}")
    torch.save({"state_dict": state, "x": bomb}, folder / "bomb.pth")
    for protocol in (2, 4):
        (folder / f"bomb{protocol}.pkl").write_bytes(pickle.dumps({"x": bomb}, protocol))
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), folder / "script.pt")
    for name in ("good.pth", "legacy.pth", "good.safetensors"):
        content = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(content[: len(content) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("this is no checkpoint\n" * 9)
    (folder / "page.pth").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "pk.pth").write_bytes(b"PK\x03\x04 and no zip behind it")
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    torch.save([torch.ones(1)], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "bare.pth")
    (folder / "directory").mkdir()
    code = "refused, reading it would run code"
    return {
        "bomb.pth": rf"{code} \(\w+.system\)",
        "bomb2.pkl": code,
        "bomb4.pkl": code,
        "script.pt": code,
        "cut-good.pth": "damaged or cut short",
        "cut-legacy.pth": "damaged or cut short",
        "cut-good.safetensors": "damaged safetensors",
        "empty.pth": "is empty",
        "text.pth": "is no checkpoint",
        "page.pth": "is no checkpoint",
        "pk.pth": "damaged or cut short",
        "other.zip": "damaged or cut short",
        "list.pth": "holds a list",
        "bare.pth": "holds no tensors",
        "directory": "without config.json",
        "absent.pth": "does not exist",
        "https://example.com/a.pth": "is an address",
    }
