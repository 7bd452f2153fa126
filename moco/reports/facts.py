"""Facts: what a run directory tells of its run, without its images and its weights.

RUN_DIR/run.json holds when, where and how the run was started, each time, and what it came to; the
settings are in config.yaml and the readings in metrics.csv. This room needs no torch.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moco.config import TrainConfig, UserError
from moco.run_directory import last_whole, read_config
from moco.whole_files import whole_file

NOTE = "run.json"


@dataclass
class Facts:
    """A run as its directory tells it.

    Attributes:
        asked: The settings as they were asked for.
        config: The settings with what `auto` came to.
        decided: What the run has decided, as config.yaml holds it.
        starts: A dict for each start of the run, as `note_start` wrote it; may be empty.
        result: What the run returned at its end; may be empty.
        rows: Readings by their names in metrics.csv, in rising order of their steps.
        checkpoint: The newest whole one; None where there is none.
    """

    path: Path
    asked: TrainConfig
    config: TrainConfig
    decided: dict[str, Any]
    starts: list[dict[str, Any]]
    result: dict[str, Any]
    rows: list[dict[str, float]]
    checkpoint: Path | None

    @property
    def name(self) -> str:
        """Return what the run is called."""
        return self.path.absolute().name

    @property
    def resumed_at(self) -> list[int]:
        """List the steps after which the run went on, having been stopped."""
        return [start["step"] for start in self.starts if start.get("step", 0) > 0]

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return the steps and the finite values of a metric."""
        return [(int(row["step"]), row[metric]) for row in self.rows if metric in row]

    def latest(self) -> dict[str, float]:
        """Return the last reading of each metric."""
        found: dict[str, float] = {}
        for row in self.rows:
            found |= row
        return found

    def differences(self) -> list[tuple[str, Any, Any, str]]:
        """List the settings that are not at their defaults: name, value, default, and who said so.

        A setting comes from a command line, as the run began or went on, from the recipe, or from a
        decision of the run.
        """
        words = [word for start in self.starts for word in start.get("command", [])]
        typed = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        usual, own, chosen = (each.flat() for each in (TrainConfig(), self.config, self.asked))
        found = []
        for name, value in own.items():
            if value == usual[name]:
                continue
            is_extended = name == "trainer.max_epochs" and "extend" in typed
            by = "command line" if name in typed or is_extended else "recipe"
            is_asked = chosen[name] == value or is_extended
            found.append((name, value, usual[name], by if is_asked else "auto"))
        return found


def read_facts(run_dir: Path) -> Facts:
    """Read what a run directory holds.

    Raises:
        UserError: It is no run directory.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no directory: name a run directory, as runs/NAME")
    content = read_config(run_dir)
    if not content:
        raise UserError(f"{run_dir} holds no readable config.yaml: name a run directory")
    decided = content.pop("decided")
    asked = TrainConfig.from_dict(content)
    ends = {f"data.{n}": decided[n] for n in ("min_value", "max_value") if decided.get(n)}
    try:
        config = asked.changed({**(decided.get("settings") or {}), **ends})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{run_dir / 'config.yaml'} is damaged in its section decided") from None
    note = _read_note(run_dir)
    result = note.get("result")
    return Facts(
        run_dir,
        asked,
        config,
        decided,
        _dicts(note.get("starts")),
        result if isinstance(result, dict) else {},
        _read_rows(run_dir / "metrics.csv"),
        last_whole(run_dir),
    )


def note_start(run_dir: Path, step: int, recipe: str, command: Sequence[str], device: str) -> None:
    """Add a start of a run to its run.json; a directory that takes no file is left as it is.

    Args:
        step: After which it goes on; 0: it begins.
    """
    starts = _dicts(_read_note(run_dir).get("starts"))
    starts = [start for start in starts if start.get("step", 0) < step]  # later steps are repeated
    start = {
        "at": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "step": step,
        "recipe": recipe,
        "command": [os.fsencode(word).decode("utf-8", "backslashreplace") for word in command],
        "device": device,
        "machine": platform.node(),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
    }
    _write_note(run_dir, {"starts": [*starts, start]})


def note_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Add to its run.json what a run has come to."""
    _write_note(run_dir, _read_note(run_dir) | {"result": result})


def _read_note(run_dir: Path) -> dict[str, Any]:
    try:
        note = json.loads((run_dir / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _write_note(run_dir: Path, note: dict[str, Any]) -> None:
    # A disk may be full; nothing else depends on the note.
    with contextlib.suppress(OSError), whole_file(run_dir / NOTE) as temporary:
        temporary.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    """Return the commit of this code, with a mark where files differ from it; may be empty.

    An installed package may lie inside another project's checkout, whose commit says nothing.
    """
    room = Path(__file__)
    is_tracked = ["git", "ls-files", "--error-unmatch", room.name]
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        for words in (is_tracked, command):
            found = subprocess.run(
                words, cwd=room.parent, capture_output=True, text=True, timeout=5
            )
            if found.returncode:
                return ""
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _read_rows(path: Path) -> list[dict[str, float]]:
    """Read metrics.csv, leaving out what is empty, torn or not finite."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except OSError:
        return []
    rows = []
    for row in csv.DictReader(text.splitlines()):
        values: dict[str, float] = {}
        for name, value in row.items():
            with contextlib.suppress(TypeError, ValueError):
                values[name] = float(value)
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if "step" in values:
            rows.append(values)
    return sorted(rows, key=lambda row: row["step"])
