"""Recognise whose code wrote a file by the names of its tensors, and translate them to our names.

Our names are `query_encoder.backbone.*`, `query_encoder.head.*`, the same of `key_encoder`,
`queue.*`, and `predictor.*` of v3. A bare backbone counts as the query encoder's. Inside a backbone
the names are those of torchvision and timm. Shapes: C embedding, K queue.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moco.checkpoints.matching import ABSENT, State, take
from moco.checkpoints.read import read_state, tensors_of
from moco.config import UserError

_WRAPPERS = ("module.", "model.", "_forward_module.")


class _Layout(NamedTuple):
    """The prefixes of a layout's tensor names, for the query encoder and the key encoder."""

    name: str
    backbones: tuple[str, str]
    heads: tuple[str, str] | None = None  # None: the head is inside the backbone, as fc or head
    sign: tuple[str, ...] = ("",)  # a file also has a name with one of these prefixes

    def fits(self, state: State, encoder: int = 0) -> bool:
        """Tell whether a file has this layout, by the query encoder, or by the key encoder, 1."""
        needed = (self.backbones[encoder], self.sign)
        return all(any(name.startswith(start) for name in state) for start in needed)


_SOLO = (("projector.", "momentum_projector."), ("momentum_", "projector."))
_OURS = ("query_encoder.head.", "key_encoder.head.")
_PROJECTION = "projection_head.layers"
_LIGHTLY = (f"{_PROJECTION}.", "projection_head_momentum.layers.")
_NECKS = [(f"encoder_q.1.{neck}.", f"encoder_k.1.{neck}.") for neck in ("mlp", "fc")]
# In lightly's benchmarks `backbone` is the encoder that follows the other one, by momentum.
_BENCHMARK = [
    ((f"{query}_backbone.", "backbone."), (f"{query}_{_PROJECTION}.", f"{_PROJECTION}."))
    for query in ("query", "student")
]
_MM = (  # the key encoder of v1, v2 and v3 in mmpretrain, its head, and a name in such files
    ("encoder_k.module", "mlp.", ("neck.mlp.",)),
    ("encoder_k.module", "fc.", ("neck.fc.",)),
    ("momentum_encoder.module", "", ("neck.fc0.", "backbone.layers.0.ln1.")),
)
_LAYOUTS = (  # the first one that fits is taken; see `_layout_of`
    _Layout("moco", ("query_encoder.backbone.", "key_encoder.backbone."), _OURS),
    *(  # also mmselfsup before 1.0: a Sequential of backbone and neck, which names its head
        _Layout("openselfsup", ("encoder_q.0.", "encoder_k.0."), heads, heads) for heads in _NECKS
    ),
    _Layout("official", ("encoder_q.", "encoder_k.")),
    _Layout("official-v3", ("base_encoder.", "momentum_encoder.")),
    *(  # also mmselfsup from 1.0 on
        _Layout("mmpretrain", ("backbone.", f"{key}.0."), heads, (*sign, heads[1]))
        for key, at, sign in _MM
        for heads in [(f"neck.{at}", f"{key}.1.{at}")]
    ),
    *(_Layout("lightly", backbones, heads) for backbones, heads in _BENCHMARK),
    _Layout("solo-learn", ("backbone.", "momentum_backbone."), *_SOLO),
    _Layout("lightly", ("backbone.", "backbone_momentum."), _LIGHTLY),
    _Layout("solo-learn", ("encoder.", "momentum_encoder."), *_SOLO),
)


@dataclass
class Contents:
    """The content of a file, its tensors under our names.

    Attributes:
        layout: moco, official, official-v3, openselfsup, mmpretrain, lightly or solo-learn; for a
            bare backbone timm, safetensors, or torchvision for every file that torch wrote.
        state: Tensors under our names.
        others: Names of tensors that have no name of ours.
        raw: The file's own dict.
        facts: What names tell of the network beyond its shapes: stem_padding, stem_relu, num_heads.
    """

    path: str | Path
    layout: str
    state: State
    others: list[str]
    raw: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Tell whether the file holds a bare backbone."""
        return self.layout in ("torchvision", "timm", "safetensors")

    @property
    def epoch(self) -> int | None:
        """Return the epoch that the file states, in ours the number of whole ones, or None."""
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
            UserError: The file has none, or there is no such encoder.
        """
        if encoder not in ("query", "key"):
            raise UserError(f"encoder is {encoder!r}: give query or key")
        part = self.take(f"{encoder}_encoder.backbone.")
        if not part:
            other = "key" if encoder == "query" else "query"
            has = self.take(f"{other}_encoder.backbone.")
            hint = f", only a {other} encoder: give --encoder {other}" if has else ""
            raise UserError(f"{self.path} ({self.layout} layout) holds no {encoder} encoder{hint}")
        return part


def read_contents(path: str | Path, own: nn.Module | None = None) -> Contents:
    """Read a file, recognise its layout and translate its names to ours.

    Args:
        own: A module of the user's own: a file that has all its names is taken as it is, since
            such names as `net.0.weight` or `1.bias` mean something else in files of others.

    Raises:
        UserError: As for `read_state`; no tensors, or two of one name.
    """
    raw, state = read_state(path), {}
    kind = raw.get("format") if raw.get("format") in ("safetensors", "timm") else "torchvision"
    contents = Contents(path, kind, {}, [], raw)
    tensors = tensors_of(raw, path)
    if _holds(tensors, own):
        return _plain(contents, tensors)
    for name, tensor in tensors.items():
        short = name.replace("_orig_mod.", "")  # torch.compile
        while short.startswith(_WRAPPERS):
            short = short.split(".", 1)[1]
        if short in state:
            raise UserError(f"{path} holds {short} twice, once as {name}: it is no single model")
        state[short] = tensor
    if _holds(state, own):
        return _plain(contents, state)
    if layout := _layout_of(state):
        return _rename(Contents(path, layout.name, {}, [], raw), state, layout)
    return _plain(contents, _plain_names(contents, state))


def _holds(state: State, own: nn.Module | None) -> bool:
    """Tell whether a file has all names of a module, but for counts of batches."""
    names = own.state_dict() if isinstance(own, nn.Module) else ()
    return bool(names) and {n for n in names if not n.endswith("_tracked")} <= state.keys()


def _plain(contents: Contents, state: State) -> Contents:
    """Take the tensors of a bare backbone as the query encoder's."""
    contents.state = {f"query_encoder.backbone.{name}": tensor for name, tensor in state.items()}
    return contents


def _layout_of(state: State) -> _Layout | None:
    """Return the layout of a file, or None of a bare backbone.

    A file of a key encoder alone has the layout that says most of its names.
    """
    found = [layout for layout in _LAYOUTS if layout.fits(state)]
    alone = [layout for layout in _LAYOUTS if layout.fits(state, encoder=1)]
    return found[0] if found else max(alone, key=lambda one: len(one.backbones[1]), default=None)


def _rename(contents: Contents, state: State, layout: _Layout) -> Contents:
    """Fill `contents` with the encoders, their heads and the queue under our names."""
    rest = dict(state)

    def pull(prefix: str) -> State:
        return {n.removeprefix(prefix): rest.pop(n) for n in list(rest) if n.startswith(prefix)}

    for i, side in enumerate(("query_encoder", "key_encoder")):
        head = pull(layout.heads[i]) if layout.heads else {}
        backbone = _plain_names(contents, pull(layout.backbones[i]))
        if not layout.heads:
            inside = [name for name in backbone if name.startswith(("fc.", "head."))]
            head = {name.split(".", 1)[1]: backbone.pop(name) for name in inside}
        head = _numbered(head) if contents.layout == "mmpretrain" else head
        for kind, part in (("head", head), ("backbone", backbone)):
            contents.state |= {f"{side}.{kind}.{name}": tensor for name, tensor in part.items()}
    if (
        contents.layout in ("official", "openselfsup", "mmpretrain")
        and rest.get("queue", ABSENT).ndim == 2
    ):
        place = rest.pop("queue_ptr", torch.tensor(0))
        contents.state |= _official_queue(contents, rest.pop("queue"), place)
    kept = {"moco": ("queue.", "second_queue.", "predictor."), "official-v3": ("predictor.",)}
    for prefix in kept.get(contents.layout, ()):
        contents.state |= {prefix + name: tensor for name, tensor in pull(prefix).items()}
    if contents.layout == "mmpretrain":
        predictor = _numbered(pull("head.predictor."))
        contents.state |= {f"predictor.{name}": tensor for name, tensor in predictor.items()}
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


def _plain_names(contents: Contents, part: State) -> State:
    """Translate a backbone's names to those of torchvision and timm, and note what they tell."""
    if contents.layout == "moco":
        contents.facts["stem_padding"] = 1
        return part
    if part and all(name.startswith("net.") for name in part):
        contents.facts["stem_padding"] = 1  # the official CIFAR demo pads by 1
        part = take(part, "net.")
    if contents.layout == "official-v3" and part.get("cls_token", ABSENT).shape[-1:] == (384,):
        contents.facts["num_heads"] = 12  # v3's ViT-S has 12, timm's has 6
    if "layers.0.ln1.weight" in part:
        part = {_timm_vit_name(name): tensor for name, tensor in part.items()}
    part = _unnumber(contents, part)
    own = re.compile(r"(layer\d\.\d+)\.shortcut\.")
    if contents.layout == "lightly" and any(map(own.match, part)):
        # The ResNet of lightly says shortcut where torchvision says downsample.
        contents.facts["stem_padding"] = 1
        part = {own.sub(r"\1.downsample.", name): tensor for name, tensor in part.items()}
    return part


def _numbered(head: State) -> State:
    """Name the layers of mmpretrain's MLPs, fc0, bn0, fc1, by their places in a Sequential."""

    def place(found: re.Match[str]) -> str:
        return f"{3 * int(found[2]) + (found[1] == 'bn')}."

    return {re.sub(r"^(fc|bn)(\d+)\.", place, name): tensor for name, tensor in head.items()}


# Names of mmpretrain's ViT to timm's.
_MM_VIT = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^layers\.", "blocks."),
)


def _timm_vit_name(name: str) -> str:
    for pattern, new in _MM_VIT:
        name = re.sub(pattern, new, name)
    return name


def _unnumber(contents: Contents, part: State) -> State:
    """Name the children of a ResNet in an `nn.Sequential`; those without tensors leave gaps.

    The gap after the first BatchNorm tells the network: ReLU and max-pool stood there, or ReLU
    alone where no max-pool is, or nothing where the ReLU was a function that the Sequential lost.

    Raises:
        UserError: The gap does not fit the first convolution.
    """
    first = part.get("0.weight", ABSENT)
    order = sorted({int(n) for n in (name.split(".")[0] for name in part) if n.isdecimal()})
    if first.ndim != 4 or len(order) < 6 or f"{order[2]}.0.conv1.weight" not in part:
        return part
    gap = order[2] - 2
    if order[:2] != [0, 1] or gap not in ((0, 1, 2) if first.shape[-1] in (3, 4) else (2,)):
        raise UserError(
            f"{contents.path}: between the children {order[1]} and {order[2]} of its nn.Sequential "
            f"{gap} without tensors are left, which fits no ResNet with a first convolution of "
            f"{first.shape[-1]} pixels: store the weights of the whole ResNet"
        )
    if gap == 0:
        contents.facts["stem_relu"] = False
    children = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    places = dict(zip(order, children, strict=False))
    if len(order) == 7 and part.get(f"{order[6]}.weight", ABSENT).ndim == 2:
        places[order[6]] = "fc"
    split = [(name.partition("."), tensor) for name, tensor in part.items()]
    return {f"{places.get(int(n), n)}.{rest}": tensor for (n, _, rest), tensor in split}
