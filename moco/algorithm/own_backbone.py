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

_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # names of torchvision's and of others


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


def warn_of_classifier(network: nn.Module, feature_dim: int) -> str:
    """Return a warning where a backbone still seems to have its classifier, or an empty text.

    Args:
        network: From images to features.
        feature_dim: D.
    """
    if type(network).__module__.startswith("timm."):
        last = getattr(network, "get_classifier", lambda: None)()
        name = "its classifier" if _is_linear(last, feature_dim) else ""
        remedy = "build it with num_classes=0, or call its reset_classifier(0)"
    else:
        name = _classifier_of(network, feature_dim)
        remedy = f"set its {name} to torch.nn.Identity()"
    if not name:
        return ""
    return (
        f"warning: the features of the backbone {type(network).__name__} are the {feature_dim} "
        f"outputs of {name}, a linear layer: where these stand for classes, {remedy}, so that what "
        "lies before it is trained and judged"
    )


def _classifier_of(network: nn.Module, feature_dim: int) -> str:
    """Return the name of the part that ends in a linear layer to D, if it is called as one."""
    parts = {n: m for n, m in network.named_modules() if [*m.parameters(recurse=False)]}
    for name, part in parts.items():
        steps = name.split(".")
        place = next((i for i, step in enumerate(steps) if step in _CLASSIFIERS), -1)
        # Inside of a wrapper and in a sequence the order tells.
        is_end = name == [*parts][-1] or (place == 0 and not isinstance(network, nn.Sequential))
        if place >= 0 and is_end and _is_linear(part, feature_dim):
            return ".".join(steps[: place + 1])
    return ""


def _is_linear(part: Any, width: int) -> bool:
    return isinstance(part, nn.Linear) and part.out_features == width


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
