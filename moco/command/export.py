"""The command `export`: parse the options and write a backbone in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from moco.command import launch
from moco.command.early import check_name
from moco.command.judge import read_own
from moco.judge_config import ExportConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, export, and return what was written."""
    launch.end_cleanly()  # so that temporary files go
    return write(argv)


def write(argv: Sequence[str], module: Any = None) -> dict[str, Any]:
    """Parse a command line and export; `module` is a backbone that Python gives."""
    about = "Write a backbone in another layout."
    usage = "--checkpoint ANY --format FORMAT --output PATH"
    _, options = read_own(argv, ExportConfig, about, usage)
    options["form"], options["licence"] = options.pop("format"), options.pop("license")
    from moco.checkpoints.places import REQUEST, GraphOptions, check_request

    choices = {item.name: options.pop(item.name) for item in fields(GraphOptions)}
    options["graph"] = GraphOptions(**choices)
    options["graph"].check(options["form"])
    check_name(options["backbone"], "backbone")
    check_request(**{name: options[name] for name in REQUEST})
    from moco.checkpoints.export import export  # imports torch, so it waits for the settings

    options["backbone"] = options["backbone"] if module is None else module
    return export(**options)
