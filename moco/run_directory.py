"""Run directories: their names, what they hold, and which checkpoint a run goes on from.

This room needs no torch.
RUN_DIR/config.yaml      every setting as it was asked for, and what the run has decided
RUN_DIR/metrics.csv      one row per reading
RUN_DIR/run.json         when, where and how the run was started, and what it came to
RUN_DIR/report.html      the page of `moco.reports`
RUN_DIR/checkpoints/     last.ckpt, and the newest few as step_N.ckpt; before_decay.ckpt of `stable`
RUN_DIR/.lock            names the process that trains here, and is locked by it
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TextIO

import yaml

from moco.config import TrainConfig, UserError
from moco.whole_files import whole_file

log = logging.getLogger("moco")
RUNS = Path("runs")
BEST = "best.ckpt"  # by the reading that run.select names
HELD_OUT = "held_out.txt"  # names the images that are not trained on
BEFORE_DECAY = "before_decay.ckpt"  # of the schedule `stable`; `--extend` goes on from it
VERSION = 2  # of a checkpoint; version 1 stored none and drew other random numbers


def new_run(config: TrainConfig, recipe: str) -> Path:
    """Choose the directory of a new run, without making it.

    Raises:
        UserError: `run.dir` holds a run already, is a file, or cannot be made.
    """
    moment = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # microseconds: runs often start together
    path = Path(config.run.dir or RUNS / f"{recipe or config.data.dataset}-{moment}")
    check_new(path)
    return path


def check_new(path: Path) -> None:
    """Raise UserError when a new run cannot have this directory."""
    try:
        is_file, begun = path.is_file(), any((path / "checkpoints").glob("*.ckpt"))
        dead_link = _dead_link(path)
    except (OSError, ValueError) as error:
        raise UserError(f"run.dir {str(path)[:80]!r} is no possible directory: {error}") from None
    if is_file:
        raise UserError(f"run.dir {path} is a file: name a directory")
    if dead_link:
        raise UserError(f"run.dir {path}: {dead_link}: make that directory, or name another")
    if begun:  # a kill may have left a folder without checkpoints
        raise UserError(
            f"run.dir {path} holds a run already: go on with --resume {path}, or name another "
            "directory"
        )
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):  # whether a file can be made there
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


@contextlib.contextmanager
def sole_run(run_dir: Path, is_new: bool) -> Iterator[None]:
    """Make a run directory, and keep other runs out of it while the block runs.

    The lock belongs to this process alone: it ends with the process, however that ends, and forked
    workers do not inherit it. NFS keeps such locks for all its machines. Directories that were made
    here are removed at the end where nothing came to lie in them.

    Args:
        is_new: Whether no run may have begun in it.

    Raises:
        UserError: Another process trains in it or has just done so, or it takes no file.
    """
    path = run_dir / ".lock"
    try:
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unwritable(run_dir, error) from None
    with file:
        _lock(file, run_dir)
        try:
            if is_new:
                check_new(run_dir)
            yield
        finally:
            _remove_unused(made, path)


def _lock(file: TextIO, run_dir: Path) -> None:
    """Lock a file and write into it who this process is; raise UserError if another has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # the file system knows no locks
            reason = error.strerror
            log.warning("%s cannot be locked (%s): start no other run in it", run_dir, reason)
            return
        file.seek(0)
        raise UserError(
            f"run directory {run_dir} is in use by {file.read(200).strip() or 'another process'}: "
            "stop that run first, or name another directory with --run.dir (if its machine is "
            f"gone for good, remove {file.name})"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _remove_unused(made: list[Path], lock: Path) -> None:
    """Remove directories that were made for a run where nothing but its lock lies in them."""
    with contextlib.suppress(OSError):
        if made and os.listdir(lock.parent) == [lock.name]:
            lock.unlink()
            for folder in made:
                folder.rmdir()


def find_run(resume: str, run_dir: str) -> tuple[Path | None, Path] | None:
    """Find the run and the checkpoint that `--resume` means.

    Args:
        resume: A run directory, a checkpoint, or "auto": the run with the newest whole one.
        run_dir: `run.dir`, where "auto" looks if given.

    Returns:
        Run directory and checkpoint, or None if "auto" finds nothing to go on from. A copied
        checkpoint has no run directory: where it lies is not for a run to write to.

    Raises:
        UserError: No such run, or no checkpoint in it is whole.
    """
    if resume == "auto":
        runs = [Path(run_dir)] if run_dir else RUNS.glob("*/")
        newest_first = sorted((c for run in runs for c in _checkpoints(run)), key=_age)[::-1]
        good = next((path for path in newest_first if is_whole(path)), None)
        return (good.parent.parent, last_whole(good.parent.parent)) if good else None
    path = Path(resume)
    if path.is_file():
        if not is_whole(path):
            raise UserError(
                f"--resume {path} is torn or no checkpoint: name the run directory to use the "
                "one before"
            )
        return run_of(path), path
    if not path.is_dir():
        raise UserError(
            f"--resume {path} does not exist: name a run directory, a checkpoint, or auto"
        )
    if path.name == "checkpoints" and (path.parent / "config.yaml").is_file():
        raise UserError(f"--resume {path} lies in a run: name the run, {path.parent}")
    last = last_whole(path)
    if last is None:
        raise UserError(
            f"--resume {path} holds no whole checkpoint in {path / 'checkpoints'}: start a new run"
        )
    return path, last


def run_of(checkpoint: Path) -> Path | None:
    """Return the run directory that a checkpoint lies in, or None; of a link, its target counts."""
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints" or not (folder.parent / "config.yaml").is_file():
        return None
    named = checkpoint.parent.parent
    return named if named.samefile(folder.parent) else folder.parent


def last_whole(run_dir: Path) -> Path | None:
    """Return the newest checkpoint that is whole: last.ckpt, unless it is torn or left behind."""
    return next(whole_ones(run_dir), None)


def whole_ones(run_dir: Path) -> Iterator[Path]:
    """Yield a run's whole checkpoints, the one to go on from first."""
    return (path for path in _checkpoints(run_dir) if is_whole(path))


def _checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, the one to go on from first.

    That is last.ckpt, another name of the newest step's file, unless a kill or a full disk kept it
    from being renewed: then the newest step is younger. Steps of an earlier attempt, from before a
    resume further back, are older than last.ckpt.
    """
    folder = run_dir / "checkpoints"
    steps, last = sorted(folder.glob("step_*.ckpt"), reverse=True), folder / "last.ckpt"
    left_behind = bool(steps) and _age(steps[0]) > _age(last)
    return [*steps[:1], last, *steps[1:]] if left_behind else [last, *steps]


def _age(path: Path) -> float:
    """Return when a file was written, or 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint was written to its end and still reads as it was written.

    A torn archive lacks its directory, which stands at the end. Checksums find damaged bytes; torch
    does not compare them. They do not cover the directory: `moco.training.stored` finds what torch
    cannot read for that reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            named = any(name.endswith("data.pkl") for name in archive.namelist())
            return named and archive.testzip() is None
    except Exception:  # a damaged or foreign file can make zipfile raise anything
        return False


def same_images(found: Mapping[str, object], stored: Mapping[str, object]) -> bool:
    """Tell whether images are those of a checkpoint; an older version noted less about them."""
    return all(found.get(name) == value for name, value in stored.items())


def stored_groups(run_dir: Path) -> dict[str, dict[str, object]]:
    """Read the groups of settings in config.yaml; empty where it is missing or damaged."""
    content = read_config(run_dir)
    return {name: group for name, group in content.items() if name != "decided"}


def read_config(run_dir: Path) -> dict[str, dict[str, object]]:
    """Read config.yaml: the groups of settings, and what the run has decided; empty as above."""
    try:
        content = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        groups = {item.name: dict(content[item.name]) for item in dataclasses.fields(TrainConfig)}
        return groups | {"decided": dict(content.get("decided") or {})}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError):
        return {}


def write_config(config: TrainConfig, decided: dict[str, object], run_dir: Path) -> None:
    """Write config.yaml, whole or not at all: the settings as they were asked for, and what the run
    has decided.

    Raises:
        UserError: The directory takes no file.
    """
    content = {**asdict(config), "decided": decided}
    _write(run_dir / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())


def write_names(run_dir: Path, names: Iterable[str]) -> None:
    """Write held_out.txt, whole or not at all: the images that are not trained on, one a line.

    Raises:
        UserError: The directory takes no file.
    """
    _write(run_dir / HELD_OUT, b"".join(os.fsencode(name) + b"\n" for name in names))


def _write(path: Path, content: bytes) -> None:
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, ValueError) as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(run_dir: Path, error: Exception) -> UserError:
    """Say why a run directory takes no file, and what to do."""
    reason = _dead_link(run_dir) or getattr(error, "strerror", None) or str(error)
    is_full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room, or name" if is_full else "name"
    return UserError(
        f"run directory {run_dir} cannot be written ({reason}): {remedy} another with --run.dir"
    )


def _dead_link(path: Path) -> str:
    """Name the link of a path whose target does not exist; empty if there is none."""
    links = [part for part in (path, *path.parents) if part.is_symlink() and not part.exists()]
    return f"{links[-1]} links to {os.readlink(links[-1])}, which does not exist" if links else ""
