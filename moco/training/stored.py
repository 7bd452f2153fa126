"""Stored: what a checkpoint of a run says, and how a run that goes on gets more epochs."""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moco.algorithm.optim import key_momentum, learning_rate
from moco.config import TrainConfig, UserError, unknown_settings
from moco.log import reason_of
from moco.run_directory import BEFORE_DECAY, VERSION, is_whole, stored_groups, whole_ones
from moco.training.autoconfigure import Settings
from moco.training.build import steps_per_epoch, total_steps
from moco.training.decide import Decided
from moco.training.resuming import check_images, check_same

log = logging.getLogger("moco")


def load_stored(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, its tensors by need.

    Raises:
        UserError: It cannot be read, or is none of ours.
    """
    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        reason = reason_of(error, 100)
        raise UserError(
            f"--resume {checkpoint} cannot be read ({reason}): name another checkpoint of the run"
        ) from None
    parts = {"config": dict, "global_step": int, "loops": dict}
    if not isinstance(stored, dict) or not all(
        isinstance(stored.get(name), kind) for name, kind in parts.items()
    ):
        raise UserError(
            f"--resume {checkpoint} is not a checkpoint of train.py: start from it with --init_from"
        )
    return stored


def last_readable(run_dir: Path) -> Path:
    """Return the newest checkpoint of a run that is whole and that can be read.

    Raises:
        UserError: There is none.
    """
    unread: list[Path] = []
    for path in whole_ones(run_dir):
        try:
            load_stored(path)
        except UserError:
            unread.append(path)
            continue
        for other in unread:
            log.warning("%s cannot be read; the one before is taken", other)
        return path
    tried = f" (not {unread[0].name})" if unread else ""
    raise UserError(
        f"--resume {run_dir} holds no checkpoint that can be read{tried}: start a new run"
    )


@dataclass
class Stored:
    """What a run goes on from.

    Attributes:
        step: Of the checkpoint.
        decided: What the run has decided; None in a run of an older version.
        asked: The settings that it was asked for, without what was left to `autoconfigure`.
    """

    step: int
    decided: Decided | None
    asked: TrainConfig

    def count(self, listed: int) -> int:
        """Return how many images an epoch draws from; those listed where that was not noted.

        Of resident ones those that cannot be read are left out, and known before they are decoded.
        """
        noted = self.decided.images if self.decided else None
        return listed if noted is None else noted


def read_stored(
    checkpoint: Path, config: TrainConfig, images: dict[str, Any], run_dir: Path
) -> tuple[TrainConfig, Stored]:
    """Check that a checkpoint belongs to these settings and images.

    Returns: The settings with those that the run has decided, and what it goes on from.

    Raises:
        UserError: Not one of our checkpoints, or of another recipe or data set.
    """
    stored = load_stored(checkpoint)
    asked, decided = stored_groups(run_dir), Decided.from_dict(stored.get("decided"))
    if decided:
        config = _as_decided(config, decided.settings, asked)
    begun = TrainConfig.from_dict(stored["config"])  # a recipe may leave more open since then
    names = config.undecided()
    left = {name: value for name in names if (value := begun.value(name)) != "auto"}
    config = config.changed(left)
    if decided:  # so that config.yaml, which holds the recipe of now, tells them as well
        decided.settings = left | decided.settings
        decided.reasons = dict.fromkeys(left, "as the run began") | decided.reasons
    check_same(config, stored["config"], checkpoint)
    check_images(images, stored.get("images"), config, checkpoint)
    if run_dir.exists() and not asked:
        log.warning(
            "%s is missing or damaged: the settings in %s are taken",
            run_dir / "config.yaml",
            checkpoint,
        )
    gone = {*unknown_settings(stored["config"]), *unknown_settings(asked)}
    if gone:
        names = ", ".join(sorted(gone))
        log.info("%s: stored settings that are gone are left out: %s", run_dir, names)
    if (version := stored.get("version", 1)) != VERSION:
        log.info(
            "--resume %s: the run was begun by version %s of moco, whose random numbers were "
            "others: it goes on, but not exactly",
            checkpoint,
            version,
        )
    if decided is None:
        log.info("%s keeps no decisions, of an older version: `auto` is decided anew", run_dir)
    return config, Stored(stored["global_step"], decided, begun)


def say_finished(settings: Settings, checkpoint: str, step: int) -> None:
    """Say that a run has nothing left to do, and how to train for longer."""
    road = "add --extend N"
    if _is_counted_in_steps(settings):
        road = f"start a new run with --init_from {checkpoint}"
    log.info("%s is finished after %d steps: nothing to do; to train longer, %s",
             checkpoint, step, road)  # fmt: skip


def _is_counted_in_steps(settings: Settings) -> bool:
    """Tell whether the run was given a number of steps, so that epochs do not lengthen it."""
    return settings.config.trainer.max_steps > 0 and "trainer.max_steps" not in settings.chosen


def extend(settings: Settings, stored: Stored, count: int, epochs: int, accept_jump: bool) -> None:
    """Give a run that goes on more epochs.

    Args:
        settings: Of the run.
        stored: What it goes on from.
        count: Images of the set.
        epochs: More than the run has.
        accept_jump: Whether the rate may jump, as where a cosine has a longer way.

    Raises:
        UserError: Steps or the clock end the run, or the schedules would jump.
    """
    config = settings.config
    if stored.decided and stored.decided.is_open:
        raise UserError(
            f"--extend {epochs}: the clock has not fixed yet how long the run is: give it more "
            f"time with --run.minutes, of which it has {config.run.minutes:g}"
        )
    if _is_counted_in_steps(settings):
        raise UserError(
            f"--extend {epochs}: the run ends after trainer.max_steps {config.trainer.max_steps}, "
            "so epochs do not matter: start a new run with --init_from"
        )
    batches, found = count // config.data.batch_size, []
    of_epoch = steps_per_epoch(config, batches)
    length = {"trainer.max_epochs": config.trainer.max_epochs + epochs}
    if config.trainer.max_steps > 0:
        length["trainer.max_steps"] = config.trainer.max_steps + epochs * of_epoch
    longer = config.changed(length)
    for each in (config, longer):
        total = total_steps(each, batches)
        rate = learning_rate(each.optim, stored.step, of_epoch, total)
        found.append((rate, key_momentum(each.model, stored.step, total)))
    (rate, momentum), (new_rate, new_momentum) = found
    if config.data.image_size_start and not accept_jump:
        raise UserError(
            f"--extend {epochs}: the size of the views follows from the length of the run, so it "
            "would jump, and a run that long from the start would have grown it later: add --yes "
            "to have it so"
        )
    jumps = [f"the rate would jump from {rate:.3g} to {new_rate:.3g}"] if rate != new_rate else []
    if momentum != new_momentum:
        jumps += [f"the key momentum would jump from {momentum:.6g} to {new_momentum:.6g}"]
    if jumps and not accept_jump:
        raise UserError(
            f"--extend {epochs}: after step {stored.step} {' and '.join(jumps)}, since that "
            "follows from the length of the run: add --yes to have it so; a run with "
            "optim.schedule stable and a constant key momentum can be extended without a jump"
        )
    for name in ("optim.warmup_epochs", "optim.freeze_backbone_epochs"):
        if name in settings.chosen:
            log.info("%s stays %g, which a run that long from the start need not have had", name,
                     settings.config.value(name))  # fmt: skip
    for name, value in length.items():
        settings.replace(name, value, f"extended by {epochs} epochs")


def before_decay(run_dir: Path, checkpoint: Path) -> Path:
    """Return the run's checkpoint from before its rate fell, or the given one where there is none.

    Raises:
        UserError: It is damaged.
    """
    path = run_dir / "checkpoints" / BEFORE_DECAY
    if not path.exists():
        return checkpoint
    if not is_whole(path):
        raise UserError(f"--extend: {path} is damaged: start a new run with --init_from")
    return path


def _as_decided(
    config: TrainConfig, settings: dict[str, Any], asked: dict[str, dict[str, Any]]
) -> TrainConfig:
    """Give settings the values that the run has decided, unless the user names others now."""
    kept = {}
    for name, value in settings.items():
        group, _, field = name.partition(".")
        if config.value(name) in ("auto", asked.get(group, {}).get(field)):
            kept[name] = value
    return config.changed(kept)
