"""Read a checkpoint file into a dict, without running code from it or fetching anything.

Files are torch's, safetensors, and directories as timm writes them. The dict keeps the file's own
names, which `layouts` translates. Whatever is wrong with a file becomes a UserError of one line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm import is_model
from torch import Tensor

from moco.checkpoints.matching import State, shape_text, some, with_class
from moco.checkpoints.places import check_place
from moco.config import UserError
from moco.run_directory import is_whole

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a timm directory, the first counts
_OF_EXPORT = ("/archive_format", "serialized_exported_program.json")  # records of torch.export
_ONNX = re.compile(rb"\x08.\x12", re.DOTALL)  # its version, then the name of the program's maker


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a file without running code from it.

    Of a file of weights in a directory as timm writes it the whole directory is read, since the
    weights do not tell their network.

    Returns:
        The file's dict. For safetensors and timm directories it holds `state_dict`, `format`, and
        under `moco` or `timm` what the file says about itself.

    Raises:
        UserError: A URL, no such file, no checkpoint, a damaged one, or one that would run code.
    """
    check_place(path)
    path = Path(path)
    try:
        if path.is_dir():
            return _read_timm_directory(path)
        raw = _read_file(path)
        # What the file says of itself counts more than what lies beside it.
        if path.name in _WEIGHTS and not raw.get("moco") and (note := _note_of_timm(path.parent)):
            return {"state_dict": tensors_of(raw, path), "format": "timm", "timm": note}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return raw


def _read_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        start = stream.read(9)
    if not start:
        raise UserError(f"{path} is empty: take another copy")
    raw = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path, start)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}: a checkpoint is a dict of tensors")
    return raw


def tensors_of(raw: dict[str, Any], path: str | Path) -> State:
    """Return the dict of tensors, which may lie under `state_dict` or `model`.

    Raises:
        UserError: There is none, or a tensor is not plain numbers in memory; it names `path`.
    """
    raw, _ = _innermost(raw)
    state = _tensors_in(raw)
    if not state:
        if parts := [str(name) for name, value in raw.items() if _tensors_in(value)]:
            raise UserError(
                f"{path} holds tensors under {some(parts)} alone: store those that you mean, by "
                f"torch.save(torch.load(FILE)[{parts[0]!r}], OTHER)"
            )
        raise UserError(f"{path} holds no tensors by name, only {some(map(str, raw))}")
    for name, tensor in state.items():
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise UserError(f"{path}: {name} is no plain tensor: store it dense, in floating point")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape = shape_text(tensor)
            raise UserError(f"{path}: {name} claims a shape of {shape}, but less is stored")
    return state


def tensors_beside(raw: dict[str, Any]) -> list[str]:
    """Name the tensors of other dicts of a file, as of an average of its weights (EMA)."""
    _, beside = _innermost(raw)
    return [f"{part}.{name}" for part, value in beside.items() for name in _tensors_in(value)]


def _innermost(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dict that `tensors_of` reads, and what lies beside it and around it."""
    beside: dict[str, Any] = {}
    for _ in range(3):
        names = ("state_dict", "model", "model_state_dict")
        name = next((name for name in names if isinstance(raw.get(name), dict)), None)
        if name is None:
            break
        beside |= {str(other): value for other, value in raw.items() if other != name}
        raw = raw[name]
    return raw, beside


def _tensors_in(value: Any) -> State:
    """Return the tensors of a dict by their names; empty of anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return {k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that is damaged, or that holds far more than its own size.

    torch stores its records uncompressed, and it does not compare their checksums.
    """
    size, claimed, names = path.stat().st_size, 0, []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # `is_whole` judges it
        claimed = sum(record.file_size for record in archive.infolist())
        names = archive.namelist()
    if claimed > 2 * size + 2**20:
        raise UserError(f"{path} of {size} bytes would inflate to {claimed}: take another copy")
    if any(name.endswith(_OF_EXPORT) for name in names):
        raise _graph(path, "torch.export", "torch.export.load(FILE).module()")
    if not is_whole(path):
        raise UserError(f"{path} is damaged or cut short: take another copy")


def _graph(path: Path, kind: str, loading: str) -> UserError:
    """Say that a file holds a network as a graph, which other programs load."""
    return UserError(
        f"{path} is a network as a graph of {kind}, which {loading} loads and nothing here "
        "reads: give the checkpoint that it was made of, or that one's export to safetensors"
    )


def _read_torch(path: Path, start: bytes) -> Any:
    if start[:2] == b"PK":
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make torch raise anything
        # torch raises EINVAL when it seeks beyond the end of a file that was cut short.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
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
    if _ONNX.match(start) or (path.suffix == ".onnx" and start[:1] == b"\x08"):
        raise _graph(path, "ONNX", "onnxruntime.InferenceSession(FILE)")
    raise UserError(f"{path} is no checkpoint: give .ckpt, .pth, .pth.tar, .pt or .safetensors")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = json.loads((file.metadata() or {}).get("moco", "null"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {with_class(error)}") from None
    epoch = {"epoch": note["epoch"]} if isinstance(note, dict) and "epoch" in note else {}
    return {"state_dict": state, "format": "safetensors", "moco": note} | epoch


def _note_of_timm(path: Path) -> dict[str, Any]:
    """Return the settings in a directory that names a network of timm's; empty for another."""
    try:
        note = _read_config(path)
    except (OSError, UserError):
        return {}
    return note if is_model(note["architecture"].partition(".")[0]) else {}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        if file.stat().st_size > 2**20:
            raise UserError(f"{file} has {file.stat().st_size} bytes: timm did not write it")
        note = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {with_class(error)}") from None
    if not isinstance(note, dict) or not isinstance(note.get("architecture"), str):
        raise UserError(f"{file} names no architecture: timm did not write it")
    return note


def _read_timm_directory(path: Path) -> dict[str, Any]:
    note = _read_config(path)
    for name in _WEIGHTS:
        if (path / name).is_file():
            state = tensors_of(_read_file(path / name), path / name)
            return {"state_dict": state, "format": "timm", "timm": note}
    raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
