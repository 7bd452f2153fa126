"""The command `train`: parse the settings, start a rank per device, and train."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moco import slurm
from moco.checks import check
from moco.command import cli
from moco.command.early import check_start
from moco.command.launch import start_ranks
from moco.command.paths import check_stored_root
from moco.config import TrainConfig, UserError
from moco.log import log_to_stderr
from moco.run_directory import find_run, stored_groups

log = logging.getLogger("moco")

_FLAG: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "default": False}
EXTRAS = {
    "resume": {
        "type": str,
        "default": "",
        "help": "Go on exactly with a run directory or checkpoint, or `auto`: the run with the "
        "newest checkpoint",
    },
    "extend": {
        "type": int,
        "default": 0,
        "help": "With --resume: go on for so many epochs more; from before its decay with "
        "optim.schedule stable",
    },
    "yes": _FLAG | {"help": "Extend although the rate jumps"},
    "init_from": {
        "type": str,
        "default": "",
        "help": "Start a new run from the weights of a checkpoint in any layout",
    },
    "allow_partial": _FLAG | {"help": "Take a file of --init_from although it fits only in part"},
}


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, train, and return the results."""
    for name in ("--resume", "--init_from"):
        if "" in cli.option_values(argv, name):  # as of a variable that the shell does not know
            raise UserError(f"{name} is empty: name a run or a file, or leave it out")
    slurm.restartable = True
    arguments = settle(argv)
    from moco.training.run import pretrain  # imports torch, so it waits until the settings stand

    return pretrain(**arguments)


def settle(
    argv: Sequence[str], has_module: bool = False, usual: Sequence[str] = ()
) -> dict[str, Any]:
    """Parse and check a command line, and start a rank per device.

    Args:
        argv: The words after the command's name.
        has_module: Whether Python gives the backbone, which then has no known name.
        usual: Options in the place of the defaults.

    Returns:
        The arguments of `moco.training.run.pretrain`.

    Raises:
        UserError: Wrong settings, or a run that cannot start or go on with them.
    """
    parser = cli.build_parser("Pretrain an encoder with MoCo.", TrainConfig, EXTRAS)
    config, extra = cli.parse(parser, TrainConfig, argv, usual=usual)
    recipe = next((Path(p).stem for p in cli.option_values(argv, "--config")), "")
    resume = extra["resume"]
    if found := find_run(resume, config.run.dir) if resume else None:
        # A resumed run starts from its own settings; those on the command line override them, and
        # `pretrain` checks that the run may go on with them.
        stored = _stored_settings(*found, config.run.dir, not Path(resume).is_file())
        config, extra = cli.parse(parser, TrainConfig, argv, stored, usual)
        check_stored_root(config.data, stored["data"])
    if resume == "auto":
        # From here on it is this run: sought again, with the run.dir that a moved run has stored or
        # beside a run that has just saved, it could be another one or none.
        resume = str(found[0]) if found else ""
    check(config)
    if found:
        from moco.training.resuming import check_same

        check_same(config, stored, found[1])
    _check_extras(extra, resume)
    is_new = not (found and found[0])
    check_start(config, recipe, extra["init_from"], is_new, has_module)
    log_to_stderr()
    log.info("importing torch, Lightning and timm takes some seconds")
    _start_ranks(config)
    if extra["resume"] == "auto" and not resume and config.run.dir:
        resume = "auto"  # the process before may save its first checkpoint there until this begins
    options = {name: extra[name] for name in ("init_from", "allow_partial")}
    options |= {"extend_by": extra["extend"], "accept_jump": extra["yes"], "command": argv}
    return {"config": config, "resume": resume, "recipe": recipe, **options}


def _check_extras(extra: dict[str, Any], resume: str) -> None:
    """Raise UserError where options of this command contradict each other."""
    if extra["resume"] and extra["init_from"]:
        raise UserError(
            "--resume and --init_from exclude each other: a resumed run has its weights"
        )
    if extra["allow_partial"] and not extra["init_from"]:
        raise UserError("--allow_partial is about the file of --init_from: leave it out")
    if extra["extend"] and (extra["extend"] < 0 or not resume):
        raise UserError("--extend is a number of epochs more of a run that --resume names")
    if extra["yes"] and not extra["extend"]:
        raise UserError("--yes is about --extend: leave it out")


def _stored_settings(
    run_dir: Path | None, checkpoint: Path, wanted: str, is_newest: bool
) -> dict[str, Any]:
    """Return the settings of the run to resume: its config.yaml's, or else its checkpoint's.

    Args:
        run_dir, checkpoint: What `find_run` has found.
        wanted: `run.dir` of the command line, where a copied checkpoint may go on.
        is_newest: Whether no checkpoint was named, so that the newest that can be read is meant.
    """
    if run_dir and wanted and Path(wanted).absolute() != run_dir.absolute():
        raise UserError(
            f"run.dir is {wanted} but --resume goes on where the run lies, in {run_dir}: leave it "
            "out, or copy the checkpoint to elsewhere"
        )
    if run_dir and (stored := stored_groups(run_dir)):
        return stored
    # It imports torch, so it waits until it is needed.
    from moco.training.stored import last_readable, load_stored

    checkpoint = last_readable(run_dir) if run_dir and is_newest else checkpoint
    stored = asdict(TrainConfig.from_dict(load_stored(checkpoint)["config"]))
    if not run_dir:
        stored["run"]["dir"] = ""
    return stored


def _start_ranks(config: TrainConfig) -> None:
    """Start a rank per device, unless this process is one of several already."""
    from moco.training.hardware import choose_devices

    devices, _ = choose_devices(config)
    asked = int(os.environ.get("SLURM_NTASKS", "1"))
    if asked > devices and "RANK" not in os.environ:
        log.warning(
            "SLURM was asked for %d tasks and this process was started alone, so %d is used: start "
            "train.py with srun to use all",
            asked,
            devices,
        )
    start_ranks(devices, "go on with --resume from the last checkpoint")
