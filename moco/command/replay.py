"""The command `replay`: make the batch of a step again, draw it, and say what each image cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.command.early import check_file
from moco.command.judge import read_own
from moco.config import TrainConfig, UserError
from moco.judge_config import ReplayConfig
from moco.log import log_to_stderr


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, replay the step, and return its losses."""
    about = "Make the batch of any step of a run again: its files, its views and its losses."
    words = {"run": {"help": "Directory of the run"}}
    config, given = read_own(argv, ReplayConfig, about, "RUN_DIR --step N", **words)
    run = Path(given["run"])
    from moco.reports.facts import read_facts

    _check_given(read_facts(run).config, run)
    check_file("--output", config.output or run / "replay.png", ".png")
    log_to_stderr()
    from moco.training.replay import replay  # imports torch, so it waits for the settings

    return replay(run, **vars(config))


def _check_given(config: TrainConfig, run: Path) -> None:
    """Raise UserError where Python gave a run what no directory holds."""
    from moco.algorithm.names import is_own

    parts = {
        "images": config.data.dataset == "own",
        "views": config.data.views == "own",
        "pairs": config.data.pairs == "own",
        "backbone": is_own(config.model.backbone),
    }
    if given := [name for name, is_given in parts.items() if is_given]:
        raise UserError(
            f"{run} was given its {' and '.join(given)} in Python, which replay cannot ask for: it "
            "replays runs that settings alone describe, as of images in a folder (data.root)"
        )
