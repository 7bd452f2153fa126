"""What a run may go on with, and the road that works where it may not. This room needs no torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from moco.config import AUTOMATIC, TrainConfig, UserError
from moco.run_directory import run_of, same_images

# What may differ when a run goes on: where and how it runs, not what it computes. What `auto` in
# data.resident and model.compile came to is kept (`moco.training.decide`).
_MAY_DIFFER = {
    "data.root",
    "data.files",
    "data.labels",
    "data.download",
    "data.resident",
    "data.resident_budget",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.worker_timeout",
    "data.cache_gib",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.log_every_n_steps",
    "model.compile",
}
# Weights of other such settings do not fit.
_SHAPE = {f"model.{name}" for name in ("backbone", "stem", "width", "patch_size", "depth")}
_SHAPE |= {"model.num_heads", "data.channels"}


def check_same(config: TrainConfig, stored: dict[str, dict[str, Any]], where: Path) -> None:
    """Raise UserError when a run would go on with another recipe; name the differences.

    What is `auto` now is as the run has it: a recipe may leave more open than it did.

    Args:
        config: The settings to go on with.
        stored: Those of the run; what it left to the images is compared with its checkpoint.
        where: Its checkpoint.
    """
    before = TrainConfig.from_dict(stored).flat()
    changes = {
        name: value
        for name, value in config.flat().items()
        if value != before[name]
        and name not in _MAY_DIFFER
        and (not name.startswith("run.") or name in ("run.seed", "run.held_out"))
        and not ("auto" in (value, before[name]) and name in AUTOMATIC)
    }
    if not changes:
        return
    said = [f"{name} is {v!r} but the run has {before[name]!r}" for name, v in changes.items()]
    it = "it" if len(said) == 1 else "them"
    road = new_run_from(where, before["run.dir"], changes)
    if changes.keys() & _SHAPE:
        road = "train another network in a new run, without --resume"
    elif changes.keys() == {"trainer.max_epochs"}:
        more = changes["trainer.max_epochs"] - before["trainer.max_epochs"]
        road = f"go on for longer with --extend {more}" if more > 0 else road
    raise UserError(f"--resume {where}: {', '.join(said)}: leave {it} out, or {road}")


def check_images(
    found: dict[str, object], stored: object, config: TrainConfig, where: Path
) -> None:
    """Raise UserError when a run would go on with other images.

    A checkpoint of an older version does not name its images; then any are taken.
    """
    if not isinstance(stored, dict) or same_images(found, stored):
        return
    counts = f"{found['count']} images, the run has {stored.get('count')}"
    if found["count"] == stored.get("count"):
        counts = f"{found['count']} images as the run has, but others"
    road = new_run_from(where, config.run.dir, {"data.root": config.data.root})
    raise UserError(
        f"--resume {where}: the data set holds {counts}: give the same ones (an empty file may "
        f"stand for one that is lost), or {road} (images for kNN alone may be others: set "
        "run.knn_root)"
    )


def new_run_from(checkpoint: Path, named: str, changes: dict[str, Any]) -> str:
    """Say how a new run with other settings begins with a run's weights.

    Args:
        checkpoint: Of the run.
        named: Its `run.dir`, which the new run cannot have.
        changes: Name of a setting to its new value.
    """
    run_dir = run_of(checkpoint)
    words = ["--config", f"{run_dir / 'config.yaml'}"] if run_dir else ["--config", "RECIPE"]
    words += ["--init_from", str(checkpoint)]
    for name, value in changes.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        words += [f"--{name}", text]
    words += ["--run.dir", f"{named.rstrip('/')}-2"] if named else []
    return f"start a new run from its weights: {shlex.join(words)}"
