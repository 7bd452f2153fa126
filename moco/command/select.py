"""The command `select`: choose the images that are worth a label first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.checks import check_ranges
from moco.command.cli import build_parser, parse
from moco.command.early import check_file, check_package
from moco.command.export import Nothing
from moco.command.judge import flat_options, take
from moco.judge_config import SelectConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, choose, and return where the list is."""
    about = "Choose the images that are worth a label first: typical ones, and no two alike."
    parser = build_parser(about, Nothing, flat_options(SelectConfig))
    parser.usage = "%(prog)s --index DIR --count N [--OPTION VALUE ...]"
    config = take(SelectConfig, parse(parser, Nothing, argv)[1])
    check_ranges(config)
    check_package("pyarrow", "select")
    if config.output:
        check_file("--output", config.output, ".csv")
    from moco.reports.select import select  # no torch, but libraries that take a second

    return select(config)
