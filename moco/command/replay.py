"""The command `replay`: make the batch of a step again, draw it, and say what each image cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.checks import check_ranges
from moco.command import cli
from moco.command.early import check_file
from moco.command.export import Nothing
from moco.command.judge import flat_options, take
from moco.judge_config import ReplayConfig
from moco.log import log_to_stderr


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, replay the step, and return its losses."""
    about = "Make the batch of any step of a run again: its files, its views and its losses."
    parser = cli.build_parser(about, Nothing, flat_options(ReplayConfig))
    parser.usage = "%(prog)s RUN_DIR --step N [--OPTION VALUE ...]"
    parser.add_argument("run", help="Directory of the run")
    _, options = cli.parse(parser, Nothing, argv)
    config, run = take(ReplayConfig, options), Path(options["run"])
    check_ranges(config)
    from moco.reports.facts import read_facts

    read_facts(run)
    check_file("--output", config.output or run / "replay.png", ".png")
    log_to_stderr()
    from moco.training.replay import replay  # imports torch, so it waits for the settings

    return replay(run, **vars(config))
