"""Pretrain an encoder without labels:  python train.py --config configs/quickstart.yaml"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.command import cli
from moco.config import TrainConfig, UserError, check
from moco.run_directory import find_run, read_config

EXTRAS = {
    "resume": {
        "type": str,
        "default": "",
        "help": "Go on exactly with a run directory or checkpoint, or `auto`: the latest run",
    },
    "init_from": {
        "type": str,
        "default": "",
        "help": "Start a new run from the weights of a checkpoint in any layout",
    },
    "allow_partial": {
        "action": "store_true",
        "help": "Take a file of --init_from although it fits only in part",
    },
}


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, train, and return the results."""
    parser = cli.build_parser("Pretrain an encoder with MoCo.", TrainConfig, EXTRAS)
    config, extra = cli.parse(parser, TrainConfig, argv)
    recipe = next((Path(p).stem for p in cli.option_values(argv, "--config")), "")
    if found := find_run(extra["resume"], config.run.dir) if extra["resume"] else None:
        # A resumed run starts from its own settings; the command line has the last word, and is
        # checked.
        stored = read_config(found[0], parsed=bool(recipe))
        if stored:
            config, extra = cli.parse(parser, TrainConfig, ["--config", str(stored), *argv])
    check(config)
    if extra["resume"] and extra["init_from"]:
        raise UserError(
            "--resume and --init_from exclude each other: a resumed run has its weights"
        )
    if extra["allow_partial"] and not extra["init_from"]:
        raise UserError("--allow_partial is about the file of --init_from: leave it out")
    from moco.training.run import pretrain  # brings torch: only once the settings stand

    return pretrain(config, extra["resume"], recipe, extra["init_from"], extra["allow_partial"])


if __name__ == "__main__":
    cli.run_main(main)
