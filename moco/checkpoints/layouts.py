"""Recognise whose code wrote a file by the names of its tensors, and translate them to our names.

Our names are `query_encoder.backbone.*`, `query_encoder.head.*`, the same of `key_encoder`, and
`queue.*`. A bare backbone counts as the query encoder's. Inside a backbone the names are those of
torchvision and timm. Shapes: C embedding, K queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.checkpoints.matching import ABSENT, State, take
from moco.checkpoints.read import tensors_of
from moco.config import UserError

_WRAPPERS = ("module.", "model.", "_forward_module.")


class _Layout(NamedTuple):
    """The prefixes of a layout's tensor names, for the query encoder and the key encoder.

    Attributes:
        backbones: A file of this layout has names with the first of these prefixes.
        heads: None where the head is inside the backbone, as fc or head.
        sign: A file of this layout also has a name with one of these prefixes.
    """

    name: str
    backbones: tuple[str, str]
    heads: tuple[str, str] | None = None
    sign: tuple[str, ...] = ("",)

    def fits(self, state: State) -> bool:
        """Tell whether a file has this layout."""
        needed = (self.backbones[0], self.sign)
        return all(any(name.startswith(start) for name in state) for start in needed)


_SOLO = (("projector.", "momentum_projector."), ("momentum_", "projector."))
_OURS = ("query_encoder.head.", "key_encoder.head.")
_LIGHTLY = ("projection_head.layers.", "projection_head_momentum.layers.")
_LAYOUTS = (  # the first one that fits is taken
    _Layout("moco", ("query_encoder.backbone.", "key_encoder.backbone."), _OURS),
    _Layout("official", ("encoder_q.", "encoder_k.")),
    _Layout("official-v3", ("base_encoder.", "momentum_encoder.")),
    _Layout("solo-learn", ("backbone.", "momentum_backbone."), *_SOLO),
    _Layout("lightly", ("backbone.", "backbone_momentum."), _LIGHTLY),
    _Layout("solo-learn", ("encoder.", "momentum_encoder."), *_SOLO),
)


@dataclass
class Contents:
    """The content of a file, its tensors under our names.

    Attributes:
        layout: moco, official, official-v3, lightly or solo-learn; for a bare backbone timm,
            safetensors, or torchvision for every file that torch wrote.
        state: Tensors under our names.
        others: Names of tensors that have no name of ours.
        raw: The file's own dict.
    """

    path: str | Path
    layout: str
    state: State
    others: list[str]
    raw: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Tell whether the file holds a bare backbone."""
        return self.layout in ("torchvision", "timm", "safetensors")

    @property
    def epoch(self) -> int | None:
        """Return the epoch, if the file states it."""
        epoch = self.raw.get("epoch")
        return epoch if isinstance(epoch, int) else None

    @property
    def config(self) -> dict[str, Any]:
        """Return the settings of the run that wrote the file, if it holds them."""
        config = self.raw.get("config")
        return config if isinstance(config, dict) else {}

    def take(self, prefix: str) -> State:
        """Return the tensors under a prefix, which their names then lack."""
        return take(self.state, prefix)

    def backbone(self, encoder: str) -> State:
        """Return the tensors of one encoder's backbone.

        Raises:
            UserError: The file has none.
        """
        part = self.take(f"{encoder}_encoder.backbone.")
        if not part:
            raise UserError(f"{self.path} ({self.layout} layout) holds no {encoder} encoder")
        return part

    def variant(self) -> dict[str, Any]:
        """Return what the layout's code builds differently from timm and no shape shows."""
        part = self.take("query_encoder.backbone.")
        if self.layout == "official-v3" and part.get("cls_token", ABSENT).shape[-1] == 384:
            return {"num_heads": 12}  # v3's ViT-S has 12, timm's has 6
        if self.layout == "solo-learn" and part.get("conv1.weight", ABSENT).shape[-1] == 3:
            return {"stem_padding": 2}  # its CIFAR stem pads by 2, others by 1
        return {}


def recognise(raw: dict[str, Any], path: str | Path) -> Contents:
    """Recognise the layout of what `read_state` returned and translate its names to ours.

    Raises:
        UserError: No tensors, or two of one name; the message names `path`.
    """
    state: State = {}
    for name, tensor in tensors_of(raw, path).items():
        short = name.replace("_orig_mod.", "")  # torch.compile
        while short.startswith(_WRAPPERS):
            short = short.split(".", 1)[1]
        if short in state:
            raise UserError(f"{path} holds {short} twice, once as {name}: it is no single model")
        state[short] = tensor
    for layout in _LAYOUTS:
        if layout.fits(state):
            return _rename(Contents(path, layout.name, {}, [], raw), state, layout)
    kind = raw.get("format") if raw.get("format") in ("safetensors", "timm") else "torchvision"
    state = {f"query_encoder.backbone.{k}": v for k, v in _plain_names(state).items()}
    return Contents(path, kind, state, [], raw)


def _rename(contents: Contents, state: State, layout: _Layout) -> Contents:
    """Fill `contents` with the encoders, their heads and the queue under our names."""
    rest = dict(state)

    def pull(prefix: str) -> State:
        return {n.removeprefix(prefix): rest.pop(n) for n in list(rest) if n.startswith(prefix)}

    for i, side in enumerate(("query_encoder", "key_encoder")):
        head = pull(layout.heads[i]) if layout.heads else {}
        backbone = _plain_names(pull(layout.backbones[i]))
        if not layout.heads:
            inside = [name for name in backbone if name.startswith(("fc.", "head."))]
            head = {name.split(".", 1)[1]: backbone.pop(name) for name in inside}
        for kind, part in (("head", head), ("backbone", backbone)):
            contents.state |= {f"{side}.{kind}.{name}": tensor for name, tensor in part.items()}
    if contents.layout == "official" and rest.get("queue", ABSENT).ndim == 2:
        place = rest.pop("queue_ptr", torch.tensor(0))
        contents.state |= _official_queue(contents, rest.pop("queue"), place)
    if contents.layout == "moco":
        contents.state |= {f"queue.{name}": tensor for name, tensor in pull("queue.").items()}
    contents.others = list(rest)
    return contents


def _official_queue(contents: Contents, queue: Tensor, pointer: Tensor) -> State:
    """Translate the official queue, C x K, and its pointer to the tensors of our queue."""
    if pointer.is_complex() or pointer.numel() != 1 or not 0 <= pointer < queue.shape[1]:
        raise UserError(f"{contents.path}: queue_ptr is no place in a queue of {queue.shape[1]}")
    keys, place, note = queue.T.contiguous(), int(pointer), contents.raw.get("moco")
    count = note.get("num_enqueued") if isinstance(note, dict) else None
    if not isinstance(count, int) or count % len(keys) != place:
        count = place + len(keys)  # the official code keeps no count; the queue counts as full
    return {"queue.keys": keys, "queue.num_enqueued": torch.tensor(count)}


def _plain_names(part: State) -> State:
    """Translate a backbone's names to those of torchvision and timm."""
    if part and all(name.startswith("net.") for name in part):  # the official CIFAR demo
        part = take(part, "net.")
    if part and all(name.split(".")[0].isdigit() for name in part):
        # These are the children of a ResNet in an nn.Sequential; some have no tensors.
        order = sorted({int(name.split(".")[0]) for name in part})
        names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
        if len(order) == 7 and part.get(f"{order[6]}.weight", ABSENT).ndim != 2:
            names[6] = str(order[6])
        place = dict(zip(map(str, order), names, strict=False))
        split = [(name.partition("."), tensor) for name, tensor in part.items()]
        part = {f"{place.get(n, n)}.{rest}": tensor for (n, _, rest), tensor in split}
    # The ResNet of lightly says shortcut where torchvision says downsample.
    return {name.replace(".shortcut.", ".downsample."): t for name, t in part.items()}
