"""Places: whether a checkpoint is there, and whether an export can be written as it is asked for.

This room needs no torch, so wrong places are told before it is imported.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moco.config import UserError
from moco.whole_files import explained

REQUEST = ("checkpoint", "form", "output", "overwrite", "licence")  # what `check_request` takes
TIMM_FILES = ("config.json", "model.safetensors", "README.md")


@dataclass(frozen=True)
class GraphOptions:
    """What can be chosen of onnx; fields as in `moco.judge_config.ExportConfig`."""

    opset: int = 0
    fp16: bool = False
    free_size: bool = False

    def check(self, form: str) -> None:
        """Raise UserError for an option of another format than this one."""
        for name, value in vars(self).items():
            if value and form != "onnx":
                raise UserError(f"--{name} is of --format onnx: leave it out")
        if 0 < self.opset < 17:
            raise UserError(f"--opset {self.opset} is below 17: torch writes only newer ones")

    def image_sizes(self, side: int) -> list[tuple[int, int]]:
        """Return the H and W with which the graph is compared with a network of that image size."""
        return [(side, side), (2 * side, side)] if self.free_size else [(side, side)]


def check_place(checkpoint: str | Path) -> None:
    """Raise UserError where a checkpoint is an address, is not there, or is another directory than
    timm writes."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|hf-hub:", str(checkpoint)):
        raise UserError(f"{checkpoint} is an address: download the file and give its path")
    path = Path(checkpoint)
    try:
        is_dir, is_file, is_there = path.is_dir(), path.is_file(), path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)[:80]!r} cannot be read: {reason}") from None
    last = path / "checkpoints" / "last.ckpt"
    if is_dir and not (path / "config.json").is_file():
        hint = f"give {last}" if last.is_file() else "give a file, or a directory as timm writes it"
        raise UserError(f"{path} is a directory without config.json: {hint}")
    if not is_dir and not is_file:
        problem = "is no regular file" if is_there else "does not exist: check the path"
        raise UserError(f"{path} {problem}")


def check_request(
    checkpoint: str | Path, form: str, output: str | Path, overwrite: bool, licence: str
) -> None:
    """Raise UserError for a wrong export before anything is loaded; arguments as of `export`."""
    check_place(checkpoint)
    output = Path(output)
    if licence and not re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        raise UserError(
            f"--license {licence!r}: give an identifier such as mit, cc-by-4.0 or other"
        )
    needed = ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ()
    if absent := " ".join(name for name in needed if find_spec(name) is None):
        listed = absent.replace(" ", ", ")
        raise UserError(f"--format {form} needs {listed}: pip install {absent}")
    with explained(f"--output {output}"):
        _check_output(Path(checkpoint), form, output, overwrite)


def _check_output(checkpoint: Path, form: str, output: Path, overwrite: bool) -> None:
    if not output.name or output.name == "..":
        raise UserError(f"--output {output} is no name for an export: give a new path")
    if output.parent.is_file():
        raise UserError(f"--output {output}: {output.parent} is a file: give another path")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}: make it first")
    with tempfile.TemporaryFile(dir=Path(os.path.realpath(output)).parent):  # if it takes a file
        pass
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UserError(f"--output {output} exists: choose another, or give --overwrite")
    fault = ""
    if checkpoint.exists() and output.exists() and output.samefile(checkpoint):
        fault = "is the checkpoint itself"
    elif form != "timm" and not output.is_file():
        fault = "is no regular file"
    elif form == "timm" and not output.is_dir():
        fault = "is no directory"
    elif form == "timm" and (foreign := {p.name for p in output.iterdir()} - set(TIMM_FILES)):
        fault = f"also holds {min(foreign)}, which no export wrote"
    if fault:
        raise UserError(f"--output {output} {fault}: choose another")
