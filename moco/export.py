"""Write a backbone in any layout that users need, and report success only after reading it back.

Each format is a pair: a writer, from an encoder to the bytes of files, and a reader, which loads
these files the way their consumer would. Bytes are made in memory, so that only `_place` touches
the disk: a temporary sibling, read back and compared on real images, then renamed.
Shapes: N images, H W pixels, D feature, C embedding, K queue.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.checkpoint import Loaded, load_encoder, read_contents
from moco.config import UserError
from moco.encoder import TORCHVISION_RESNETS

Features = Callable[[Tensor], Tensor]
Files = dict[str, bytes]  # name to content; one file that is no directory has the name ""
_CLASSIFIER = ("fc.weight", "fc.bias")


class DiskError(OSError):
    """The disk is to blame, not the user: full, over quota, or broken."""


def export(
    checkpoint: str | Path,
    form: str,
    output: str | Path,
    *,
    encoder: str = "query",
    overwrite: bool = False,
    licence: str = "",
    allow_partial: bool = False,
    backbone: str = "",
    image_size: int = 0,
) -> dict[str, Any]:
    """Write a checkpoint's backbone to `output` and compare what was written with the source.

    Args:
        checkpoint: Of any layout; it and the last three as of `moco.checkpoint.load_encoder`.
        form: One of `FORMATS`.
        output: A file; a directory for timm. Appears whole or not at all.
        encoder: query or key.
        overwrite: Replace an earlier export.
        licence: Identifier for the model card, such as mit or cc-by-4.0.

    Returns:
        What was written, and the largest difference as a share of the largest feature.

    Raises:
        UserError: Wrong input, a format that cannot hold this network, or features that differ.
        DiskError: The disk is full or broken.
    """
    output = Path(output)
    _check_request(Path(checkpoint), form, output, overwrite, licence)
    loaded = load_encoder(checkpoint, encoder, allow_partial, backbone, image_size)
    print(loaded.report, file=sys.stderr)
    obstacle = _obstacle(loaded, form)
    if obstacle:
        fitting = ", ".join(name for name in FORMATS if not _obstacle(loaded, name))
        raise UserError(f"--format {form} cannot hold {obstacle}: take one of {fitting}")
    write, read, tolerance = FORMATS[form]
    with _one_line(f"{loaded.model.backbone} cannot be written as {form}"):
        files = write(loaded, Path(checkpoint), licence)
    with _place(output, files, overwrite) as written:
        with _one_line(f"{loaded.model.backbone} as {form} does not load again"):
            difference = _difference(read(written, loaded), loaded)
        if not difference <= tolerance:  # also where it is no number
            raise UserError(
                f"--format {form}: features differ by {difference:.1e} of their size after reading "
                f"back, {tolerance:.0e} is allowed: nothing was written"
            )
    result = {"format": form, "output": str(output), "layout": loaded.layout}
    result |= {"encoder": loaded.encoder, "epoch": loaded.epoch, "backbone": loaded.model.backbone}
    result |= {"feature_dim": loaded.feature_dim, "max_feature_difference": difference}
    if form in ("torchvision", "official"):
        result["left_to_the_consumer"] = list(_CLASSIFIER)
    return result | {
        **loaded.data,
        "files": [str(output / name) if name else str(output) for name in files],
    }


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what exporters and loaders raise, which can be anything, into one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def _check_request(
    checkpoint: Path, form: str, output: Path, overwrite: bool, licence: str
) -> None:
    """Find what is wrong with a command before anything is loaded."""
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    if licence and not re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        raise UserError(
            f"--license {licence!r}: give an identifier such as mit, cc-by-4.0 or other"
        )
    needed = ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ()
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        raise UserError(
            f"--format {form} needs {', '.join(absent)}: pip install {' '.join(absent)}"
        )
    try:
        _check_output(checkpoint, form, output, overwrite)
    except OSError as error:
        raise _explain(error, output) from None


def _check_output(checkpoint: Path, form: str, output: Path, overwrite: bool) -> None:
    if not output.name or output.name == "..":
        raise UserError(f"--output {output} is no name for an export: give a new path")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}: make it first")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UserError(f"--output {output} exists: choose another, or give --overwrite")
    if checkpoint.exists() and output.exists() and output.samefile(checkpoint):
        raise UserError(f"--output {output} is the checkpoint itself: choose another")
    if form != "timm" and not output.is_file():
        raise UserError(f"--output {output} is no regular file: choose another")
    if form == "timm":
        if not output.is_dir():
            raise UserError(f"--output {output} is no directory: choose another")
        foreign = sorted({p.name for p in output.iterdir()} - set(_TIMM_FILES))
        if foreign:
            raise UserError(
                f"--output {output} also holds {foreign[0]}, which no export wrote: choose another"
            )


def _obstacle(loaded: Loaded, form: str) -> str:
    """Say what a format cannot hold, or nothing."""
    model, channels = loaded.model, loaded.data["channels"]
    published = model.backbone in TORCHVISION_RESNETS
    if form in ("torchvision", "official", "detectron2") and not published:
        return f"{model.backbone}, which torchvision does not have"
    if form in ("timm", "torchvision", "official", "detectron2") and model.width != 1:
        return f"a {model.backbone} of width {model.width:g}"
    if form in ("timm", "torchvision", "detectron2") and model.stem == "cifar":
        return f"a {model.backbone} with CIFAR stem"
    if form == "torchvision" and channels != 3:
        return f"a {model.backbone} of {channels} channels"
    return ""


# Placing files


@contextlib.contextmanager
def _place(output: Path, files: Files, overwrite: bool) -> Iterator[Path]:
    """Write files beside `output`, hand them out to be checked, and rename them if all is well."""
    try:
        room = Path(tempfile.mkdtemp(prefix=".export-", dir=output.parent))
    except OSError as error:
        raise _explain(error, output) from None
    try:
        written, old = room / output.name, room / f"{output.name}.old"
        if "" not in files:
            written.mkdir()
        for name, content in files.items():
            _write(written / name if name else written, content)
        yield written
        if output.exists() and not overwrite:
            raise UserError(f"--output {output} exists by now: choose another")
        if output.is_dir():
            os.rename(output, old)
        try:
            os.replace(written, output)
        except OSError:
            if old.exists():
                os.rename(old, output)
            raise
    except OSError as error:
        raise _explain(error, output) from None
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _explain(error: OSError, output: Path) -> Exception:
    """Tell a disk's failure from a user's."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    text = f"--output {output} cannot be written: {error.strerror or error}"
    if error.errno in disk:
        return DiskError(f"{text}; make room, nothing was left behind")
    return UserError(f"{text}: choose another place")


# Comparing


def example_images(loaded: Loaded) -> Tensor:
    """Return six crops of scikit-learn's two photographs, N x channels x H x W, normalised."""
    from sklearn.datasets import load_sample_images

    channels, size = loaded.data["channels"], loaded.data["image_size"]
    crops = []
    for photograph in load_sample_images().images:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float() / 255  # 1 3 H W
        for left in (0, 100, 200):
            square = image[:, :, :, left : left + 400]
            crops.append(nn.functional.interpolate(square, (size, size), mode="area"))
    images = torch.cat(crops)
    if channels == 1:
        images = images.mean(1, keepdim=True)
    elif channels != 3:
        images = images.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
    mean, std = (torch.tensor(loaded.data[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


@torch.no_grad()
def _difference(features: Features, loaded: Loaded) -> float:
    """Compare two feature extractors in batches of one and of several images."""
    images = example_images(loaded)
    worst = 0.0
    for batch in (images, images[:1]):
        wanted, found = loaded.backbone(batch), features(batch)
        if not wanted.isfinite().all():
            raise UserError("the checkpoint's features are not finite: take one from before that")
        if found.shape != wanted.shape:
            return float("inf")
        scale = wanted.abs().max().clamp(min=1e-30)
        worst = max(worst, ((found - wanted).abs().max() / scale).nan_to_num(float("inf")).item())
    return worst


def describe(loaded: Loaded) -> dict[str, Any]:
    """Return what travels with the weights, in plain types, so that nobody has to guess."""
    model = loaded.model
    note = {"backbone": model.backbone, "stem": model.stem, "width": model.width}
    note |= {**loaded.data, "feature_dim": loaded.feature_dim, "variant": loaded.variant}
    note |= {"source_layout": loaded.layout, "encoder": loaded.encoder}
    return note | ({} if loaded.epoch is None else {"epoch": loaded.epoch})


# Formats


def _tensors(loaded: Loaded) -> dict[str, Tensor]:
    # Own memory for each: safetensors refuses shared and non-contiguous tensors.
    return {k: v.detach().clone().contiguous() for k, v in loaded.backbone.state_dict().items()}


def _saved(content: Any) -> Files:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return {"": buffer.getvalue()}


def _write_safetensors(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    from safetensors.torch import save

    metadata = {"format": "pt", "moco": json.dumps(describe(loaded))}
    return {"": save(_tensors(loaded), metadata | ({"license": licence} if licence else {}))}


def _read_safetensors(path: Path, loaded: Loaded) -> Features:
    return load_encoder(path).backbone


_TIMM_FILES = ("config.json", "model.safetensors", "README.md")


def _write_timm(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    from safetensors.torch import save

    config, card = _timm_config(loaded, licence), _model_card(loaded, checkpoint, licence)
    contents = (
        json.dumps(config, indent=2).encode(),
        save(_tensors(loaded), {"format": "pt"}),
        card.encode(),
    )
    return dict(zip(_TIMM_FILES, contents, strict=True))


def _timm_config(loaded: Loaded, licence: str) -> dict[str, Any]:
    data, known = loaded.data, getattr(loaded.backbone, "pretrained_cfg", {})
    size = [data["channels"], data["image_size"], data["image_size"]]
    fixed = bool(getattr(getattr(loaded.backbone, "patch_embed", None), "img_size", None))
    arguments = {"in_chans": data["channels"]} | ({"img_size": size[1]} if fixed else {})
    # Only what holds for these weights: tag, licence and scores of timm's own do not travel along.
    details = {name: known.get(name) for name in ("first_conv", "classifier")}
    details |= {"tag": "moco", "input_size": size, "fixed_input_size": fixed, "num_classes": 0}
    details |= {"mean": data["mean"], "std": data["std"], "interpolation": "bilinear"}
    details |= {"crop_pct": 1.0 if size[1] < 100 else 0.875, "custom_load": False}
    details |= {"license": licence} if licence else {}
    return {
        "architecture": loaded.model.backbone,
        "num_classes": 0,
        "num_features": loaded.feature_dim,
        "model_args": arguments | loaded.variant,
        "pretrained_cfg": details,
    }


def _read_timm(path: Path, loaded: Loaded) -> Features:
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()


def _torchvision_twin(loaded: Loaded) -> nn.Module:
    """Build torchvision's network, with the source's first layers where these are others."""
    from torchvision.models import get_model

    twin, first = get_model(loaded.model.backbone, weights=None), loaded.backbone.conv1
    if loaded.model.stem == "cifar":
        twin.maxpool = nn.Identity()
    twin.conv1 = nn.Conv2d(
        first.in_channels,
        first.out_channels,
        first.kernel_size,
        first.stride,
        first.padding,
        bias=False,
    )
    return twin.eval()


def _into_twin(state: dict[str, Tensor], loaded: Loaded) -> Features:
    """Load as the official linear evaluation does: exactly the classifier may be missing."""
    twin = _torchvision_twin(loaded)
    outcome = twin.load_state_dict(state, strict=False)
    if set(outcome.missing_keys) != set(_CLASSIFIER) or outcome.unexpected_keys:
        raise UserError(f"torchvision's {loaded.model.backbone} does not take it: {outcome}")
    twin.fc = nn.Identity()
    return twin


def _write_torchvision(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    return _saved(_tensors(loaded))


def _read_torchvision(path: Path, loaded: Loaded) -> Features:
    return _into_twin(torch.load(path, weights_only=True), loaded)


def _write_official(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    """Both encoders with heads, and the queue, as far as the source has them.

    The official scripts read `encoder_q` alone; so an export of the key encoder goes there, alone.
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
    prefix = "module.encoder_q."
    names = [n for n in state if n.startswith(prefix) and not n.startswith(f"{prefix}fc")]
    return _into_twin({name.removeprefix(prefix): state[name] for name in names}, loaded)


_DETECTRON2 = (
    *((f"layer{n}.", f"res{n + 1}.") for n in (1, 2, 3, 4)),
    *((f"bn{n}.", f"conv{n}.norm.") for n in (1, 2, 3)),
    ("downsample.0.", "shortcut."),
    ("downsample.1.", "shortcut.norm."),
)


def _write_detectron2(loaded: Loaded, checkpoint: Path, licence: str) -> Files:
    names = {n: n for n in _tensors(loaded) if not n.endswith("num_batches_tracked")}
    for old, new in _DETECTRON2:
        names = {name: theirs.replace(old, new) for name, theirs in names.items()}
    tensors = _tensors(loaded)
    model = {
        theirs if theirs.startswith("res") else f"stem.{theirs}": tensors[name].numpy()
        for name, theirs in names.items()
    }
    content = {"model": model, "__author__": "MoCo", "matching_heuristics": True}
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(content | {"moco": describe(loaded)})
    return {"": buffer.getvalue()}


class _ArrayPickler(pickle.Pickler):
    """Pickle arrays by `numpy.ndarray` alone: names of numpy 2 are unknown to older ones."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return np.ndarray, (item.shape, item.dtype.str, bytearray(item.tobytes()))
        return NotImplemented


class _ArrayUnpickler(pickle.Unpickler):
    """Read back what `_ArrayPickler` wrote and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"): np.ndarray, ("builtins", "bytearray"): bytearray}
        return allowed[module, name]


def _read_detectron2(path: Path, loaded: Loaded) -> Features:
    with path.open("rb") as stream:
        arrays = _ArrayUnpickler(stream).load()["model"]
    state = {}
    for name, array in arrays.items():
        # The longer names first, so that conv1.norm is not taken for conv1.
        for old, new in sorted(_DETECTRON2, key=lambda pair: -len(pair[1])):
            name = name.replace(new, old)
        state[name.removeprefix("stem.")] = torch.from_numpy(array)
    for name in _tensors(loaded):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    return _into_twin(state, loaded)


def _dynamic_batch(loaded: Loaded) -> dict[str, Any]:
    images = example_images(loaded)[:2]
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


# Name to writer, reader, and the difference allowed, as a share of the largest feature.
FORMATS: dict[str, tuple[Callable[..., Files], Callable[..., Features], float]] = {
    "timm": (_write_timm, _read_timm, 1e-5),
    "torchvision": (_write_torchvision, _read_torchvision, 1e-5),
    "safetensors": (_write_safetensors, _read_safetensors, 1e-5),
    "official": (_write_official, _read_official, 1e-5),
    "detectron2": (_write_detectron2, _read_detectron2, 1e-5),
    "onnx": (_write_onnx, _read_onnx, 1e-4),
    "torch-export": (_write_torch_export, _read_torch_export, 1e-5),
}


# The model card


def _model_card(loaded: Loaded, checkpoint: Path, licence: str) -> str:
    """Write the card that the Hub shows: recipe, data, scores, licence."""
    model, data, config = loaded.model, loaded.data, loaded.config
    tags = "".join(f"- {tag}\n" for tag in ("image-feature-extraction", "timm", "moco"))
    scores = _scores(checkpoint)
    recipe = {name: config[name] for name in ("model", "optim", "trainer") if name in config}
    settings = {f"{g}.{n}": v for g, group in recipe.items() for n, v in group.items()}
    settings |= {n: v for n, v in config.get("data", {}).items() if n in _DATA_ON_CARD}
    rows = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
    lines = [
        f"---\ntags:\n{tags}library_name: timm\npipeline_tag: image-feature-extraction\n"
        f"license: {licence or 'unknown'}\n---",
        f"# {model.backbone}, pretrained by Momentum Contrast",
        f"Self-supervised (MoCo, arXiv:1911.05722 and 2003.04297): the {loaded.encoder}"
        f"{'' if loaded.encoder == 'backbone' else ' encoder'} without its projection head, "
        f"{loaded.feature_dim} features, from a checkpoint of {loaded.layout} layout"
        f"{'' if loaded.epoch is None else f' and epoch {loaded.epoch}'}.",
        "## Use",
        "```python\nimport timm\n"
        'model = timm.create_model("local-dir:PATH", pretrained=True, num_classes=0).eval()\n```',
        "`pretrained=True` is needed: without it timm leaves the weights random.",
        f"Input: {data['channels']} x {data['image_size']} x {data['image_size']}, values 0-1, "
        f"less mean {data['mean']}, divided by std {data['std']}.",
        "## Recipe and data",
        f"| setting | value |\n|---|---|\n{rows}" if rows else "Not recorded in the checkpoint.",
        "## Scores",
        "".join(f"- {name}: {value}\n" for name, value in scores.items()) or "None recorded.",
    ]
    return "\n\n".join(line.rstrip("\n") for line in lines) + "\n"


_DATA_ON_CARD = ("dataset", "channels", "image_size", "batch_size", "views", "mean", "std")
_SCORE = re.compile(r"top1|top5|accuracy|knn|linear|shot|loss", re.IGNORECASE)


def _scores(checkpoint: Path) -> dict[str, float]:
    """Collect numbers that look like scores from the JSON files beside a checkpoint or its run."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = [folder, folder.parent] if folder.name == "checkpoints" else [folder]
    scores: dict[str, float] = {}
    for path in sorted(p for place in places for p in place.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # somebody else's file
        pairs = content.items() if isinstance(content, dict) else ()
        scores |= {
            f"{path.stem}: {name}": value
            for name, value in pairs
            if type(value) in (int, float) and _SCORE.search(name)
        }
    return scores
