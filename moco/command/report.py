"""The command `report`: show what runs have learnt, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.command.early import check_file
from moco.command.judge import read_own
from moco.config import UserError
from moco.judge_config import ReportConfig
from moco.log import log_to_stderr


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, write the page, and return where it is."""
    about = "Show what one run has learnt, or several side by side, on one page."
    words = {"runs": {"nargs": "+", "help": "Directories of runs"}}
    config, given = read_own(argv, ReportConfig, about, "RUN_DIR [RUN_DIR ...]", **words)
    runs = [Path(run) for run in given["runs"]]
    if config.root and len(runs) > 1:
        raise UserError("root is of one run: make the pages of several apart, or leave it out")
    from moco.reports.facts import read_facts

    for run in runs:
        read_facts(run)
    check_file("--output", config.output or runs[0] / "report.html", ".html", ".htm")
    log_to_stderr()
    from moco.reports.page import write_report  # imports torch, so it waits for the settings

    return write_report(runs, **vars(config))
