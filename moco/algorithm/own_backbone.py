"""Own backbones: any module from images to features, in the place of one that timm knows by name.

Shapes: N images, D feature, H W of a map of features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moco.algorithm.names import OWN
from moco.config import ModelConfig, UserError
from moco.log import reason_of


def own_name(module: nn.Module) -> str:
    """Return what stands in `model.backbone` for a module of the user's own."""
    return f"{OWN}:{type(module).__name__}"


def own_backbone(
    module: nn.Module | None, config: ModelConfig, channels: int, image_size: int
) -> tuple[nn.Module, int]:
    """Return a copy of the user's module that gives N x D features, and D, by one dry run.

    Maps N x D x H x W are averaged over their pixels. The module itself stays as it is.

    Args:
        module: From N x channels x image_size x image_size; None where it was not given.

    Raises:
        UserError: It is not given, is another one, cannot be copied, cannot take such images, or
            gives neither features nor maps.
    """
    if module is None:
        raise UserError(
            f"model.backbone is {config.backbone}, a module of the user's own: give it in Python, "
            "as in moco.pretrain(images, backbone=module, resume=RUN) or "
            "moco.load_backbone(path, backbone=module)"
        )
    if not isinstance(module, nn.Module):
        raise UserError(
            f"backbone is of type {type(module).__name__}: give a torch.nn.Module, or a timm name"
        )
    is_compiled = any(hasattr(part, "_orig_mod") for part in module.modules())
    if is_compiled or isinstance(module, torch.jit.ScriptModule):
        made_by = "torch.compile" if is_compiled else "torch.jit"
        raise UserError(
            f"backbone was made by {made_by}: give the module that it was made of, which a run "
            "compiles by itself (model.compile)"
        )
    name, shape = type(module).__name__, (2, channels, image_size, image_size)
    try:
        network = copy.deepcopy(module).cpu()
        training = network.training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found: Any = network.eval()(torch.zeros(shape))
        network.train(training)
    except Exception as error:  # each module fails in its own way
        reason = reason_of(error)
        raise UserError(
            f"backbone {name} cannot take images {' x '.join(map(str, shape))} ({reason}): change "
            "it, data.channels or data.image_size"
        ) from error
    _check_features(name, found)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"backbone {name} has no parameter that takes a gradient: unfreeze some")
    if found.ndim == 4:
        network.register_forward_hook(_pool)
    return network, found.shape[1]


def _check_features(name: str, found: Any) -> None:
    """Raise UserError unless a backbone gives features or maps for two images."""
    if not isinstance(found, Tensor) or found.ndim not in (2, 4) or len(found) != 2:
        what = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(found)
        raise UserError(
            f"backbone {name} gives {what} for 2 images: have its forward return one tensor of "
            "features N x D, or of maps N x D x H x W"
        )
    if not found.is_floating_point():
        raise UserError(f"backbone {name} gives {found.dtype}: have it return float features")


def _pool(module: nn.Module, inputs: Any, maps: Tensor) -> Tensor:
    """Average a map over its pixels; hooks of a module travel with its copies and exports."""
    return maps.mean((2, 3))


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return f"a {type(value).__name__}{size}"
