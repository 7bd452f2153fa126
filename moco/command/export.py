"""The command `export`: parse the options and write a backbone in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from moco.checks import check_ranges
from moco.command import launch
from moco.command.cli import build_parser, parse
from moco.command.early import check_name
from moco.command.judge import flat_options, take
from moco.judge_config import ExportConfig


@dataclass
class Nothing:
    """The groups of settings of a command that has only options of its own."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, export, and return what was written."""
    launch.end_cleanly()  # so that temporary files go
    return write(argv)


def write(argv: Sequence[str], module: Any = None) -> dict[str, Any]:
    """Parse a command line and export; `module` is a backbone that Python gives."""
    about = "Write a backbone in another layout."
    parser = build_parser(about, Nothing, flat_options(ExportConfig))
    parser.usage = "%(prog)s --checkpoint ANY --format FORMAT --output PATH [--OPTION VALUE ...]"
    _, options = parse(parser, Nothing, argv)
    check_ranges(take(ExportConfig, options))
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
