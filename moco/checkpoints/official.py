"""The formats of the published code: MoCo v1, v2 and v3, and detectron2.

Shapes: C embedding, K queue.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from moco.algorithm.vit import is_vit
from moco.checkpoints.architecture import constructor_arguments
from moco.checkpoints.describe import V3_VITS, Features, Files, describe, saved, tensors
from moco.checkpoints.layouts import Contents, read_contents
from moco.checkpoints.load import Loaded
from moco.checkpoints.matching import State, match_state, take
from moco.config import TrainConfig, UserError

CLASSIFIER = ("fc.weight", "fc.bias")  # exports lack torchvision's classifier


def into_twin(state: dict[str, Tensor], loaded: Loaded) -> Features:
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


def write_official(loaded: Loaded, checkpoint: Path, *_: Any, v3: bool = False) -> Files:
    """Write both encoders with their heads, predictor and queue, as far as the source has them.

    The official scripts read the query encoder alone, so an export of the key encoder takes its
    place.
    """
    contents, note = read_contents(checkpoint), describe(loaded)
    own = "key" if loaded.encoder == "key" else "query"
    first, second = ("base_encoder.", "momentum_encoder.") if v3 else ("encoder_q.", "encoder_k.")
    head = "head." if is_vit(loaded.model.backbone) else "fc."
    parts = {first: tensors(loaded), f"{first}{head}": contents.take(f"{own}_encoder.head.")}
    optimizer = {}
    if own == "query":
        key = contents.take("key_encoder.backbone.")  # its positions are resampled as the query's
        parts[second] = match_state(parts[first], key, loaded.backbone).matched
        parts[f"{second}{head}"] = contents.take("key_encoder.head.")
    if own == "query" and v3:
        parts["predictor."] = contents.take("predictor.")
    state = {f"module.{part}{n}": v for part, named in parts.items() for n, v in named.items()}
    keys = contents.state.get("queue.keys")
    if keys is not None and own == "query" and not v3:
        count = int(contents.state.get("queue.num_enqueued", 0))
        state["module.queue"] = keys.T.contiguous()  # C K
        state["module.queue_ptr"] = torch.tensor([count % len(keys)])
        note["num_enqueued"] = count
        if contents.take("second_queue."):
            print("official code has one queue: the run's second one is left out", file=sys.stderr)
        optimizer = _resumable(loaded, contents, parts[f"{first}{head}"])
    names = {timm_name: name for name, timm_name in V3_VITS.items()}
    arch = names.get(loaded.model.backbone, loaded.model.backbone)
    content = {"epoch": loaded.epoch or 0, "arch": arch, "state_dict": state} | optimizer
    return saved(lambda file: torch.save(content | {"moco": note}, file))


def _resumable(loaded: Loaded, contents: Contents, head: State) -> dict[str, Any]:
    """Return the entry `optimizer` with which main_moco.py --resume goes on, and say so.

    It is empty where that script has no such optimiser or network, and a line says why.
    """
    config = TrainConfig.from_dict(contents.config)
    name, model, states = config.optim.name, config.model, contents.raw.get("optimizer_states")
    groups = states[0]["param_groups"] if states else []
    mlp = model.head == "mlp" and model.head_layers == 2
    reasons = {
        "the source holds none": not groups,
        f"the run's is {name}, theirs is SGD": name != "sgd",
        "the run spares norms and biases the weight decay, theirs does not": len(groups) > 1,
        "their head is linear or has one hidden layer as wide as the features": not (
            model.head == "linear" or (mlp and model.head_hidden_dim in (0, loaded.feature_dim))
        ),
        "their code has no predictor": model.predictor != "none",
    }
    if reason := next((text for text, holds in reasons.items() if holds), ""):
        print(f"no state of the optimiser in it, so no --resume: {reason}", file=sys.stderr)
        return {}
    words = (
        f"-a {model.backbone} --moco-dim {model.embedding_dim} --moco-k {model.queue_size} "
        f"--moco-m {model.key_momentum:g} --moco-t {model.temperature:g}{' --mlp' if mlp else ''}"
    )
    print(f"go on with: main_moco.py {words} --lr {config.optim.lr:g} --resume", file=sys.stderr)
    ours = [name for name, _ in loaded.backbone.named_parameters()]
    ours += [f"fc.{name}" for name in head]
    return {"optimizer": _official_optimizer(loaded, states[0], ours)}


def _official_optimizer(loaded: Loaded, stored: dict[str, Any], ours: list[str]) -> dict[str, Any]:
    """Return torch SGD's state in the order of the official model's parameters.

    These are of both encoders; those of the key encoder get no gradient and have no state.

    Args:
        stored: The state of the run's optimiser.
        ours: Names of its parameters in their order, with the head's below fc.
    """
    from torchvision.models import get_model

    with torch.device("meta"):
        named = [name for name, _ in get_model(loaded.model.backbone).named_parameters()]
    theirs = [name for name in named if name not in CLASSIFIER]
    theirs += [name for name in ours if name.startswith("fc.")]
    group, velocities = stored["param_groups"][0], stored["state"]
    shared = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    parameters = [nn.Parameter(torch.empty(0)) for _ in 2 * theirs]
    state = torch.optim.SGD(parameters, **{name: group[name] for name in shared}).state_dict()
    places = dict(zip(ours, group["params"], strict=True))
    state["state"] = {
        number: {"momentum_buffer": velocities[places[name]]["momentum_buffer"]}
        for number, name in enumerate(theirs)
        if places[name] in velocities
    }
    return state


def read_official(path: Path, loaded: Loaded, first: str = "encoder_q.") -> Features:
    """Load the query encoder as the official linear evaluation does."""
    state = torch.load(path, weights_only=True)["state_dict"]
    encoder = take(state, f"module.{first}")
    encoder = {k: v for k, v in encoder.items() if not k.startswith(("fc.", "head."))}
    if not is_vit(loaded.model.backbone):
        return into_twin(encoder, loaded)
    twin = timm.create_model(loaded.model.backbone, **constructor_arguments(loaded)).eval()
    twin.load_state_dict(encoder)
    return twin


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


def write_detectron2(loaded: Loaded, *_: Any) -> Files:
    """Write the backbone as a pickle of arrays with the names of detectron2."""
    state = tensors(loaded)
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    model = {_detectron2_name(name): state[name].numpy() for name in names}
    content = {"model": model, "__author__": "MoCo", "matching_heuristics": True}
    content["moco"] = describe(loaded)
    return saved(lambda file: _ArrayPickler(file, protocol=4).dump(content))


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


def read_detectron2(path: Path, loaded: Loaded) -> Features:
    """Load the arrays by their names into a network of torchvision."""
    with path.open("rb") as stream:
        arrays = _ArrayUnpickler(stream).load()["model"]
    state = dict(loaded.backbone.state_dict())  # the file does not count batches
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    state |= {name: torch.from_numpy(arrays[_detectron2_name(name)]) for name in names}
    return into_twin(state, loaded)
