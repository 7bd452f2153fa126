"""Read a checkpoint, whoever wrote it: one loader behind every `--checkpoint` and `--init_from`.

Every layout in the field is a renaming of ours (`query_encoder.backbone.*`, `query_encoder.head.*`,
`key_encoder.*`, `queue.*`). So a file is renamed first and understood afterwards: its architecture
from what it says about itself, else from its tensors' shapes. Nothing is unpickled or fetched.
Shapes: N images, H W pixels, D feature, C embedding, K queue.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from moco.config import DataConfig, ModelConfig, UserError, normalisation
from moco.encoder import TORCHVISION_RESNETS, build_backbone, build_encoder

State = dict[str, Tensor]


@dataclass
class Loaded:
    """An encoder out of a file, and what was found out about it.

    Attributes:
        backbone: In eval mode: normalised images N x channels x H x W to features N x D.
        head: Features to embeddings N x C, where the file has a linear or MLP head; else None.
        model: Backbone, stem, width, head; the rest as in the file's settings or at its default.
        data: channels, image_size, mean and std (on a 0-1 scale) of the images that it expects.
        layout: moco, official, official-v3, lightly, solo-learn, torchvision, timm, safetensors.
        encoder: query, key, or backbone where the file holds only one.
        report: One line: what matched, what was left out, what is missing.
        variant: What name and settings leave open: arguments for timm, and `stem_padding`.
        config: Settings of the run that wrote the file, where it holds them.
    """

    backbone: nn.Module
    head: nn.Module | None
    model: ModelConfig
    data: dict[str, Any]
    layout: str
    encoder: str
    report: str
    epoch: int | None
    feature_dim: int
    variant: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def load_backbone(
    path: str | Path,
    encoder: Literal["query", "key"] = "query",
    allow_partial: bool = False,
    backbone: str = "",
    image_size: int = 0,
) -> nn.Module:
    """Return a checkpoint's feature extractor in eval mode; arguments as of `load_encoder`."""
    return load_encoder(path, encoder, allow_partial, backbone, image_size).backbone


def load_encoder(
    path: str | Path,
    encoder: Literal["query", "key"] = "query",
    allow_partial: bool = False,
    backbone: str = "",
    image_size: int = 0,
) -> Loaded:
    """Load one encoder from a file of any layout. Random generators are left as they were.

    Args:
        path: Checkpoint of ours, of the official code, lightly or solo-learn; a state dict of
            torchvision or timm; safetensors; a directory as timm writes it.
        encoder: Which of two encoders.
        allow_partial: Take a file that fits only in part; the report says what stays random.
        backbone: timm name, where the file leaves its architecture open or is wrong about it.
        image_size: Side in pixels; a ViT's positions are resampled to it. 0: as in the file.

    Raises:
        UserError: Unreadable or unsafe file, unknown architecture, nothing or only a part matched.
    """
    contents = read_contents(path)
    part = contents.backbone(encoder)
    model, data, variant = _identify(contents, part, backbone)
    if image_size < 0:
        raise UserError(f"image_size is {image_size}: give pixels, or 0 for the file's own")
    data["image_size"] = image_size or data["image_size"]
    head_state = contents.take(f"{encoder}_encoder.head.")
    with torch.random.fork_rng(devices=[]):
        network, head, feature_dim = _build(model, data, variant, head_state)
    fit = _fit(network.state_dict(), part, network)
    fit.check(path, model.backbone, "take another --backbone, or --allow_partial", allow_partial)
    network.load_state_dict(fit.matched, strict=False)
    used = (f"{encoder}_encoder.",) if head else (f"{encoder}_encoder.backbone.",)
    left_out = [name for name in contents.state if not name.startswith(used)]
    epoch, config = contents.raw.get("epoch"), contents.raw.get("config")
    loaded = Loaded(
        backbone=network.eval(),
        head=head,
        model=model,
        data=data,
        layout=contents.layout,
        encoder="backbone" if contents.plain else encoder,
        report="",
        epoch=epoch if isinstance(epoch, int) else None,
        feature_dim=feature_dim,
        variant=variant,
        config=config if isinstance(config, dict) else {},
    )
    if contents.plain and contents.layout == "torchvision":
        loaded.layout = "torchvision" if model.backbone in TORCHVISION_RESNETS else "timm"
    left_out += contents.others + [f"classifier.{name}" for name in fit.classifier]
    loaded.report = f"{_describe(loaded)}: {fit.text()}; left out: {_groups(left_out)}"
    return loaded


def restore_pretraining(path: str | Path, module_state: State) -> tuple[State, str]:
    """Fill a fresh MoCo module's state dict with all that a file offers.

    A checkpoint of ours or of the official code gives both encoders and, where their shapes agree,
    the heads and the queue; another layout gives its backbone to both. The rest stays fresh.

    Args:
        path: As of `load_encoder`.
        module_state: Of a module just built; not changed.

    Returns:
        The filled state dict, and one line that says what came from the file and what did not.

    Raises:
        UserError: As of `load_encoder`; also when the backbone fits only in part.
    """
    contents = read_contents(path)
    contents.backbone("query")  # must be there
    if "num_heads" in contents.variant():
        raise UserError(f"{path} is v3's ViT-S of 12 attention heads, timm's has 6: take another")
    both = contents.layout in ("moco", "official", "official-v3")
    both = both and bool(contents.take("key_encoder.backbone."))
    state = dict(module_state)
    for side in ("query", "key"):
        prefix = f"{side}_encoder.backbone."
        fit = _fit(_take(state, prefix), contents.backbone(side if both else "query"))
        fit.check(path, "model.backbone", "set model.backbone, stem and width as in the file")
        state |= {prefix + name: tensor.clone() for name, tensor in fit.matched.items()}
    origin = "both encoders" if both else "query encoder, key encoder = its copy"
    notes = [f"{contents.layout} layout, backbone: {origin}, each {fit.text()}"]
    if contents.variant():
        notes.append(f"the file's {contents.variant()} is not kept")
    notes.append(_restore_heads_and_queue(contents, state))
    return state, "; ".join(notes)


def _restore_heads_and_queue(contents: Contents, state: State) -> str:
    """Fill heads and queue in place; a queue is worth something only beside its own heads."""
    for side in ("query", "key"):
        prefix = f"{side}_encoder.head."
        fit = _fit(_take(state, prefix), contents.take(prefix))
        if contents.layout not in ("moco", "official") or fit.faults or not fit.matched:
            return f"heads and queue stay fresh, the file's {side} head: {fit.text()}"
    heads = {name: value for name, value in contents.state.items() if "_encoder.head." in name}
    state |= {name: value.to(state[name].dtype).clone() for name, value in heads.items()}
    queue = contents.take("queue.")
    fit = _fit(_take(state, "queue."), queue)
    if fit.faults or not fit.matched:
        return f"heads; the queue stays fresh, the file's: {fit.text()}"
    state |= {f"queue.{name}": value.clone() for name, value in fit.matched.items()}
    return f"heads; queue of {_shape(queue['keys'])}"


# Files


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a file without running anything in it.

    Returns:
        The file's dict. Of safetensors and timm directories: `state_dict`, `format`, and under
        `moco` or `timm` what they say about themselves.

    Raises:
        UserError: A URL, no such file, no checkpoint, a damaged one, one that needs code.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|hf-hub:", str(path)):
        raise UserError(f"{path} is an address: download the file and give its path")
    path = Path(path)
    try:
        if path.is_dir():
            return _read_timm_directory(path)
        if not path.is_file():
            raise UserError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}")
        with path.open("rb") as stream:
            start = stream.read(9)
        if not start:
            raise UserError(f"{path} is empty: take another copy")
        raw = _read_safetensors(path) if start[8:] == b"{" else _torch_load(path, start)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}: a checkpoint is a dict of tensors")
    return raw


def _torch_load(path: Path, start: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes can raise anything
        text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code or "TorchScript" in text or ("Unsupported operand" in text and start[:1] == b"\x80"):
        what = code.group(1) if code else "a pickle or TorchScript program"
        raise UserError(
            f"{path} is refused, reading it would run code ({what}): where you trust it, store its "
            "tensors alone by torch.save({name: tensor}, FILE)"
        )
    if start[:2] == b"PK" or "unexpected EOF" in text:
        raise UserError(f"{path} is damaged or cut short: take another copy")
    raise UserError(f"{path} is no checkpoint: give .ckpt, .pth, .pth.tar, .pt or .safetensors")


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
            note = json.loads((file.metadata() or {}).get("moco", "null"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {_line(error)}") from None
    return {"state_dict": state, "format": "safetensors", "moco": note} | _epoch(note)


def _epoch(note: Any) -> dict[str, Any]:
    return {"epoch": note["epoch"]} if isinstance(note, dict) and "epoch" in note else {}


def _read_timm_directory(path: Path) -> dict[str, Any]:
    file, last = path / "config.json", path / "checkpoints" / "last.ckpt"
    if not file.is_file():
        hint = f"give {last}" if last.is_file() else "give a file, or a directory as timm writes it"
        raise UserError(f"{path} is a directory without config.json: {hint}")
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {_line(error)}") from None
    if not isinstance(note, dict) or not isinstance(note.get("architecture"), str):
        raise UserError(f"{file} names no architecture: timm did not write it")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            state = _unwrap(read_state(path / name), path / name)
            return {"state_dict": state, "format": "timm", "timm": note}
    raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin")


# Layouts: any names to ours

# Beginnings of names: backbone of the query and the key encoder, their heads (-: inside the
# backbone, as fc or head), and those of which a file must have one besides.
_LAYOUTS = """
moco query_encoder.backbone. key_encoder.backbone. query_encoder.head. key_encoder.head. -
official encoder_q. encoder_k. - - -
official-v3 base_encoder. momentum_encoder. - - -
solo-learn backbone. momentum_backbone. projector. momentum_projector. momentum_,projector.
lightly backbone. backbone_momentum. projection_head.layers. projection_head_momentum.layers. -
solo-learn encoder. momentum_encoder. projector. momentum_projector. momentum_,projector.
"""
_WRAPPERS = ("module.", "model.", "_forward_module.")
_NONE = torch.empty(0)


@dataclass
class Contents:
    """A file in our names.

    Attributes:
        layout: As of `Loaded`, but torchvision for every bare backbone in a torch file.
        state: Tensors in our names.
        others: Names without a counterpart here.
        raw: The file's own dict.
    """

    path: str | Path
    layout: str
    state: State
    others: list[str]
    raw: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Tell whether the file holds one bare backbone."""
        return self.layout in ("torchvision", "timm", "safetensors")

    def take(self, prefix: str) -> State:
        """Return the tensors under a prefix, without it."""
        return _take(self.state, prefix)

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
        """Tell what the layout's own code does otherwise than timm, and no shape shows."""
        part = self.take("query_encoder.backbone.")
        if self.layout == "official-v3" and part.get("cls_token", _NONE).shape[-1] == 384:
            return {"num_heads": 12}  # v3's ViT-S; timm's has 6
        if self.layout == "solo-learn" and part.get("conv1.weight", _NONE).shape[-1] == 3:
            return {"stem_padding": 2}  # its CIFAR stem; others pad by 1
        return {}


def read_contents(path: str | Path) -> Contents:
    """Read a file and rename its tensors to ours; errors as of `read_state`."""
    raw = read_state(path)
    state: State = {}
    for name, tensor in _unwrap(raw, path).items():
        short = name.replace("_orig_mod.", "")  # torch.compile
        while short.startswith(_WRAPPERS):
            short = short.split(".", 1)[1]
        if short in state:
            raise UserError(f"{path} holds {short} twice, once as {name}: it is no single model")
        state[short] = tensor
    for row in _LAYOUTS.split("\n")[1:-1]:
        layout, *columns, signs = row.split()
        wanted = [columns[0], "" if signs == "-" else tuple(signs.split(","))]
        if all(any(name.startswith(start) for name in state) for start in wanted):
            return _rename(Contents(path, layout, {}, [], raw), state, columns)
    layout = raw.get("format") if raw.get("format") in ("safetensors", "timm") else "torchvision"
    state = {f"query_encoder.backbone.{k}": v for k, v in _plain_names(state).items()}
    return Contents(path, layout, state, [], raw)


def _unwrap(raw: dict[str, Any], path: str | Path) -> State:
    """Find the dict of tensors inside the usual wrappings."""
    for _ in range(3):
        inner = (raw.get(name) for name in ("state_dict", "model", "model_state_dict"))
        raw = next((value for value in inner if isinstance(value, dict)), raw)
    state = {k: v for k, v in raw.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors by name, only {_some(map(str, raw))}")
    return state


def _rename(contents: Contents, state: State, columns: list[str]) -> Contents:
    """Fill `contents` with our names for the encoders, their heads and the queue."""
    rest = dict(state)
    for i, side in enumerate(("query", "key")):
        for kind, prefix in (("head", columns[2 + i]), ("backbone", columns[i])):
            part = _take(rest, prefix)
            rest = {k: v for k, v in rest.items() if not k.startswith(prefix)}
            for name, tensor in (_plain_names(part) if kind == "backbone" else part).items():
                inside = columns[2] == "-" and name.startswith(("fc.", "head."))
                place = f"head.{name.split('.', 1)[1]}" if inside else f"{kind}.{name}"
                contents.state[f"{side}_encoder.{place}"] = tensor
    if contents.layout == "official" and rest.get("queue", _NONE).ndim == 2:
        contents.state |= _official_queue(rest.pop("queue"), rest.pop("queue_ptr", 0), contents.raw)
    if contents.layout == "moco":
        contents.state |= {k: rest.pop(k) for k in list(rest) if k.startswith("queue.")}
    contents.others = list(rest)
    return contents


def _official_queue(queue: Tensor, pointer: Tensor | int, raw: dict[str, Any]) -> State:
    """Turn the official queue, C x K, and the place to write next into ours."""
    keys, place, note = queue.T.contiguous(), int(pointer), raw.get("moco")
    count = note.get("num_enqueued") if isinstance(note, dict) else None
    if not isinstance(count, int) or count % len(keys) != place:
        count = place + len(keys)  # the official code does not count; by then the queue is full
    return {"queue.keys": keys, "queue.num_enqueued": torch.tensor(count)}


def _plain_names(part: State) -> State:
    """Bring a backbone's names to torchvision's and timm's."""
    if part and all(name.startswith("net.") for name in part):  # the official CIFAR demo
        part = _take(part, "net.")
    if part and all(name.split(".")[0].isdigit() for name in part):
        # Children of an nn.Sequential that was a ResNet; those without tensors do not count.
        order = sorted({int(name.split(".")[0]) for name in part})
        names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
        if len(order) == 7 and part.get(f"{order[6]}.weight", _NONE).ndim != 2:
            names[6] = str(order[6])
        place = dict(zip(map(str, order), names, strict=False))
        split = [(name.partition("."), tensor) for name, tensor in part.items()]
        part = {f"{place.get(n, n)}.{rest}": tensor for (n, _, rest), tensor in split}
    # lightly's own ResNet says shortcut where torchvision says downsample.
    return {name.replace(".shortcut.", ".downsample."): t for name, t in part.items()}


# Architecture: from what a file says of itself, else from names and shapes


def _identify(
    contents: Contents, part: State, forced: str
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Find out the model, its data and its variant."""
    try:
        model, said, variant = _said(contents.raw)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{contents.path} describes itself wrongly: {_line(error)}") from None
    seen = _resnet_shape(part) or _vit_shape(part)
    arch = contents.raw.get("arch")
    arch = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}.get(
        arch, arch
    )
    known = arch if isinstance(arch, str) and timm.is_model(arch) else seen.pop("backbone", "")
    seen.pop("backbone", None)
    model = model or ModelConfig(backbone=known, **seen)
    model = dataclasses.replace(model, backbone=forced or model.backbone, **_head_of(contents))
    if not model.backbone:
        raise UserError(
            f"{contents.path}: {_some(part)} do not tell the architecture: "
            "give its timm name with --backbone"
        )
    channels = said.get("channels") or _channels(model.backbone, part)
    mean, std = normalisation(DataConfig(channels=channels))
    data = {"channels": channels, "mean": mean, "std": std} | said
    # Positions tell the size better than timm's config, which may keep that of the first training.
    size = _vit_image_size(part) or said.get("image_size") or (32 if model.stem == "cifar" else 224)
    data["image_size"] = size
    return model, data, contents.variant() | variant


def _said(raw: dict[str, Any]) -> tuple[ModelConfig | None, dict[str, Any], dict[str, Any]]:
    """Read a run's settings, the note of one of our exports, or timm's config."""
    if isinstance(raw.get("config"), dict) and "model" in raw["config"]:
        model = _known_fields(ModelConfig, raw["config"]["model"])
        data = _known_fields(DataConfig, raw["config"]["data"])
        mean, std = normalisation(data)
        return model, _data({"mean": mean, "std": std}, data.channels, data.image_size), {}
    if isinstance(raw.get("moco"), dict):
        note = raw["moco"]
        names = {name: str(note[name]) for name in ("backbone", "stem")}
        model = ModelConfig(**names, width=float(note["width"]))
        return model, _data(note, note["channels"], note["image_size"]), _safe(note["variant"])
    if isinstance(raw.get("timm"), dict):
        note = raw["timm"]
        details, arguments = note.get("pretrained_cfg", {}), note.get("model_args", {})
        size = details.get("input_size", (3, 224, 224))
        data = _data(details, arguments.get("in_chans", size[0]), size[-1])
        return ModelConfig(backbone=note["architecture"]), data, _safe(arguments)
    return None, {}, {}


def _known_fields(kind: type, values: dict[str, Any]) -> Any:
    """Make a group of settings; names from other versions of this program are passed over."""
    names = {item.name for item in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def _data(source: dict[str, Any], channels: Any, image_size: Any) -> dict[str, Any]:
    data = {"channels": int(channels), "image_size": int(image_size)}
    for name in ("mean", "std"):
        if len(source.get(name) or ()) == data["channels"]:
            data[name] = [float(value) for value in source[name]]
    return data


# What a file may not say to timm's constructor: where weights come from, and what we decide.
_NOT_SHAPE = re.compile(
    ".*(pretrained|checkpoint|cache|features_only|scriptable|exportable|no_jit).*"
    "|device|dtype|num_classes|in_chans|img_size|zero_init_last"
)


def _safe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keep the plain arguments of a model's constructor that are about its shape."""
    plain = (bool, int, float, str, list)
    pairs = ((k, v) for k, v in arguments.items() if isinstance(v, plain))
    return {name: value for name, value in pairs if not _NOT_SHAPE.fullmatch(name)}


# Blocks per stage, of what kind, and where not 1 and 64, groups and their width at 64 planes.
_RESNETS = {
    "2-2-2-2 basic": "resnet18",
    "3-4-6-3 basic": "resnet34",
    "2-2-2-2 bottleneck": "resnet26",
    "3-4-6-3 bottleneck": "resnet50",
    "3-4-23-3 bottleneck": "resnet101",
    "3-8-36-3 bottleneck": "resnet152",
    "3-24-36-3 bottleneck": "resnet200",
    "3-4-6-3 bottleneck 32x4": "resnext50_32x4d",
    "3-4-23-3 bottleneck 32x4": "resnext101_32x4d",
    "3-4-23-3 bottleneck 32x8": "resnext101_32x8d",
    "3-4-23-3 bottleneck 64x4": "resnext101_64x4d",
    "3-4-6-3 bottleneck 1x128": "wide_resnet50_2",
    "3-4-23-3 bottleneck 1x128": "wide_resnet101_2",
}
# Width x depth; 2010.11929, table 1, and DeiT's two smaller ones.
_VITS = {
    "192x12": "tiny",
    "384x12": "small",
    "768x12": "base",
    "1024x24": "large",
    "1280x32": "huge",
}


def _resnet_shape(part: State) -> dict[str, Any]:
    """Read backbone, stem and width off a ResNet; empty where it is none."""
    kind, last = ("bottleneck", 3) if "layer4.0.conv3.weight" in part else ("basic", 2)
    names = ("conv1", "layer1.0.conv2", f"layer1.0.conv{last}", f"layer4.0.conv{last}")
    weights = [part.get(f"{name}.weight", _NONE) for name in names]
    if any(weight.ndim != 4 for weight in weights):
        return {}
    stem, middle, first, final = weights
    expansion = 4 if kind == "bottleneck" else 1
    blocks = [{k.split(".")[1] for k in part if k.startswith(f"layer{n}.")} for n in (1, 2, 3, 4)]
    name = f"{'-'.join(str(len(block)) for block in blocks)} {kind}"
    groups = len(middle) // middle.shape[1] if kind == "bottleneck" else 1
    group_width = round(64 * expansion * len(middle) / groups / len(first))
    if (groups, group_width) != (1, 64):
        name += f" {groups}x{group_width}"
    return {
        "backbone": _RESNETS.get(name, ""),
        "stem": "cifar" if stem.shape[-1] == 3 else "imagenet",
        "width": len(final) / expansion / 512,
    }


def _vit_shape(part: State) -> dict[str, Any]:
    """Read the name off a ViT; empty where it is none."""
    patches = part.get("patch_embed.proj.weight", _NONE)
    depth = len({name.split(".")[1] for name in part if name.startswith("blocks.")})
    if patches.ndim != 4 or f"{len(patches)}x{depth}" not in _VITS:
        return {}
    name = f"vit_{_VITS[f'{len(patches)}x{depth}']}_patch{patches.shape[-1]}_224"
    return {"backbone": name} if timm.is_model(name) else {}


def _vit_image_size(part: State) -> int:
    """Read the image size off a ViT's positions; 0 where it has none."""
    patches, positions = part.get("patch_embed.proj.weight", _NONE), part.get("pos_embed", _NONE)
    if patches.ndim == 4 and positions.ndim == 3:
        for extra in (1, 0, 5):  # a class token, none, or four registers besides
            side = math.isqrt(max(0, positions.shape[1] - extra))
            if side and side * side == positions.shape[1] - extra:
                return side * patches.shape[-1]
    return 0


def _channels(name: str, part: State) -> int:
    """Read the number of channels off the first convolution."""
    details = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    first = getattr(details, "first_conv", None) or "conv1"
    weight = part.get(f"{first if isinstance(first, str) else first[0]}.weight", _NONE)
    return weight.shape[1] if weight.ndim == 4 else 3


def _head_of(contents: Contents) -> dict[str, Any]:
    """Read head and queue off a file, in the terms of `ModelConfig`."""
    head = contents.take("query_encoder.head.")
    weights = [head[name] for name in ("weight", "0.weight", "2.weight") if name in head]
    found: dict[str, Any] = {}
    if _head_kind(head):
        found = {"head": _head_kind(head), "embedding_dim": len(weights[-1])}
        found["head_hidden_dim"] = len(weights[0]) if len(weights) == 2 else 0
    keys = contents.state.get("queue.keys", _NONE)
    return found | ({"queue_size": len(keys)} if keys.ndim == 2 else {})


def _head_kind(head: State) -> str:
    """Name a projection head; empty where there is none that we can rebuild."""
    names = {"weight bias": "linear", "0.weight 0.bias 2.weight 2.bias": "mlp"}
    kinds = [kind for text, kind in names.items() if set(text.split()) == set(head)]
    return kinds[0] if kinds and all(t.ndim == 2 for n, t in head.items() if "weight" in n) else ""


def _build(
    model: ModelConfig, data: dict[str, Any], variant: dict[str, Any], head_state: State
) -> tuple[nn.Module, nn.Module | None, int]:
    """Build the backbone with fresh weights, the head with the file's, and tell D."""
    channels, image_size = data["channels"], data["image_size"]
    head = None
    if _head_kind(head_state):
        encoder = build_encoder(model, channels, image_size)
        network, feature_dim = encoder.backbone, encoder.feature_dim
        fit = _fit(encoder.head.state_dict(), head_state)
        if not fit.faults:
            head = encoder.head.eval()
            head.load_state_dict(fit.matched)
    else:
        network, feature_dim = build_backbone(model, channels, image_size)
    arguments = {name: value for name, value in variant.items() if name != "stem_padding"}
    if arguments:
        fixed = getattr(getattr(network, "patch_embed", None), "img_size", None)
        arguments |= {"img_size": image_size} if fixed else {}
        try:
            network = timm.create_model(
                model.backbone, num_classes=0, in_chans=channels, **arguments
            )
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"{model.backbone} does not take {arguments}: {_line(error)}") from None
    if "stem_padding" in variant:
        network.conv1.padding = (int(variant["stem_padding"]),) * 2
    return network, head, feature_dim


# Matching


@dataclass
class _Fit:
    """How a file's tensors meet a network's.

    Attributes:
        matched: Ready to load.
        faults: What keeps the match from being whole: kind, and names.
        classifier: Names of a classifier, which no backbone has.
        total: Tensors that the network needs.
        note: What was changed on the way.
    """

    matched: State
    faults: dict[str, list[str]]
    classifier: list[str]
    total: int
    note: str

    def check(self, path: str | Path, name: str, remedy: str, allow_partial: bool = False) -> None:
        """Raise UserError unless the match is whole, or partial and allowed."""
        if not self.matched:
            raise UserError(f"{path}: nothing in it fits {name} ({self.text()}): {remedy}")
        if self.faults and not allow_partial:
            raise UserError(f"{path} fits {name} only in part ({self.text()}): {remedy}")

    def text(self) -> str:
        """Say what matched and what did not."""
        faults = [f"{kind}: {_some(names)}" for kind, names in self.faults.items()]
        missing = [] if "missing" in self.faults else ["missing: none"]
        note = [self.note] if self.note else []
        return "; ".join([f"matched {len(self.matched)} of {self.total}", *note, *faults, *missing])


def _fit(target: State, source: State, network: nn.Module | None = None) -> _Fit:
    """Match tensors by name and shape; with `network`, a ViT's positions are resampled."""
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    named = (named,) if isinstance(named, str) else tuple(named)
    classifiers = tuple(f"{name}." for name in ("fc", "head", "classifier", *named))
    # Files of before torch 0.4.1 do not count batches; nothing else may be absent.
    needed = [n for n in target if n in source or not n.endswith("num_batches_tracked")]
    faults: dict[str, list[str]] = {
        "missing": [name for name in needed if name not in source],
        "unknown": [],
        "of other shape": [],
    }
    fit = _Fit({}, faults, [], len(needed), "")
    for name, tensor in source.items():
        if name not in target:
            (fit.classifier if name.startswith(classifiers) else faults["unknown"]).append(name)
            continue
        goal = target[name]
        if name == "pos_embed" and network is not None and tensor.shape != goal.shape:
            tensor, fit.note = _resample(tensor, goal, network)
        elif name.endswith(("running_mean", "running_var")) and tensor.numel() > goal.numel() > 0:
            # lightly's split BatchNorm stores one row per group.
            groups = tensor.numel() % goal.numel() == 0
            tensor = tensor.view(-1, goal.numel()).mean(0) if groups else tensor
        if tensor.shape == goal.shape:
            fit.matched[name] = tensor.to(goal.dtype)
        else:
            faults["of other shape"].append(f"{name} ({_shape(tensor)} for {_shape(goal)})")
    fit.faults = {kind: names for kind, names in faults.items() if names}
    return fit


def _resample(positions: Tensor, goal: Tensor, network: nn.Module) -> tuple[Tensor, str]:
    """Bring a ViT's positions to another image size."""
    if positions.ndim != 3 or positions.shape[2] != goal.shape[2]:
        return positions, ""
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    grid = network.patch_embed.grid_size
    positions = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    return positions, f"positions resampled to {grid[0]}x{grid[1]}"


def _take(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _describe(loaded: Loaded) -> str:
    model, data = loaded.model, loaded.data
    stem = f", {model.stem} stem" if hasattr(loaded.backbone, "conv1") else ""
    width = f", width {model.width:g}" if model.width != 1 else ""
    epoch = "" if loaded.epoch is None else f", epoch {loaded.epoch}"
    images = f"{data['channels']} channels, {data['image_size']} px"
    encoder = loaded.encoder + ("" if loaded.encoder == "backbone" else " encoder")
    return f"{loaded.layout} layout{epoch}, {encoder}, {model.backbone}{stem}{width}, {images}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"


def _groups(names: Iterable[str]) -> str:
    """Sum names up by their beginnings."""
    depth = {True: 2, False: 1}
    counts = Counter(".".join(n.split(".")[: depth["_encoder." in n]]) for n in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
