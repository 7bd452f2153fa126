"""The command `export`: parse the options and write a backbone in another layout."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moco.command.cli import build_parser, parse
from moco.config import RunError

Format = Literal[
    "timm", "torchvision", "safetensors", "official", "detectron2", "onnx", "torch-export"
]
OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {
        "type": str,
        "required": True,
        "help": "Checkpoint of any layout, a state dict, safetensors, or a timm directory",
    },
    "format": {"type": Format, "required": True, "help": "Layout to write"},
    "output": {"type": str, "required": True, "help": "File to write; for timm a directory"},
    "encoder": {"type": Literal["query", "key"], "default": "query", "help": "Which encoder"},
    "overwrite": {"action": "store_true", "help": "Replace an earlier export"},
    "license": {"type": str, "default": "", "help": "For the model card: mit, cc-by-4.0, other"},
    "allow_partial": {"action": "store_true", "help": "Take a file that fits only in part"},
    "backbone": {"type": str, "default": "", "help": "timm name, where the file does not tell it"},
    "image_size": {"type": int, "default": 0, "help": "Side in pixels; 0: as in the checkpoint"},
    "stem_padding": {
        "type": int,
        "default": 0,
        "help": "Padding of a 3x3 stem: 2 in solo-learn, 1 in most other code; 0: as in the file",
    },
    "num_heads": {
        "type": int,
        "default": 0,
        "help": "Attention heads of a ViT, where the file does not tell them; 0: as in the file",
    },
}


@dataclass
class Nothing:
    """An export has no groups of settings, only the options above."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, export, and return what was written."""
    parser = build_parser("Write a backbone in another layout.", Nothing, OPTIONS)
    parser.usage = "%(prog)s --checkpoint ANY --format FORMAT --output PATH [--OPTION VALUE ...]"
    _, options = parse(parser, Nothing, argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    from moco.checkpoints import export as room

    form, licence = options.pop("format"), options.pop("license")
    checkpoint, output = options.pop("checkpoint"), options.pop("output")
    try:
        return room.export(checkpoint, form, output, licence=licence, **options)
    except room.DiskError as error:
        raise RunError(str(error)) from None
