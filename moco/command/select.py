"""The command `select`: choose the images that are worth a label first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.command.early import check_file, check_package
from moco.command.judge import read_own
from moco.judge_config import SelectConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, choose, and return where the list is."""
    about = "Choose the images that are worth a label first: typical ones, and no two alike."
    config, _ = read_own(argv, SelectConfig, about, "--index DIR --count N")
    check_package("pyarrow", "select")
    if config.output:
        check_file("--output", config.output, ".csv")
    from moco.reports.select import select  # no torch, but libraries that take a second

    return select(config)
