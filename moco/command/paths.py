"""Paths that a user gives: `~` and variables in them, recipes and data sets that are not there."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from moco.config import DataConfig, UserError

# The options of all commands that hold a path, besides --config.
PATHS = {"data.root", "data.files", "data.labels", "run.dir", "run.knn_root"}
PATHS |= {"resume", "init_from", "checkpoint", "reference", "output", "index", "query", "picture"}
PATHS |= {"folder", "labels", "root"}


def expanded(name: str, path: str) -> str:
    """Replace `~`, `~USER`, `$NAME` and `${NAME}` in the path that a setting gives.

    Raises:
        UserError: One of them is unknown, and no file or directory has it in its name.
    """
    new = os.path.expandvars(os.path.expanduser(path))
    left = re.search(r"^~[^/]*|\$(\w+|\{[^}]*\})", new)
    if left and not os.path.exists(new):
        what = "user" if left[0].startswith("~") else "variable"
        raise UserError(
            f"{name} is {path!r}, and {left[0]} is no {what} that is known here: write the path out"
        )
    return new


def check_stored_root(data: DataConfig, stored: dict[str, Any]) -> None:
    """Raise UserError when a relative `data.root` that came from a checkpoint is not here.

    Args:
        data: Settings of the images.
        stored: Those that the checkpoint holds.
    """
    root = data.root
    if data.dataset in ("shards", "parquet"):
        return  # a pattern; what it names is asked for where it is opened
    if root != stored.get("root") or os.path.isabs(root) or data.dataset in ("digits", "own"):
        return
    if root and not (data.download or os.path.exists(os.path.expanduser(root))):
        raise UserError(
            f"data.root {root!r} came from the checkpoint and is not in {os.getcwd()}: it is "
            "relative to the directory that the run was started in: start there, or give "
            "--data.root"
        )


def recipes() -> dict[str, Path]:
    """Return the recipes that come with this program, by name."""
    installed = Path(__file__).parent.parent / "configs"
    folder = installed if installed.is_dir() else installed.parent.parent / "configs"  # a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(word: str) -> str:
    """Return the path of a recipe: the word is one, or the name of one that comes with the program.

    Raises:
        UserError: Neither; the recipe that may be meant is named.
    """
    path = expanded("--config", word)
    if not os.path.exists(path) and path in (known := recipes()):
        return str(known[path])
    check_recipe(Path(path))
    return path


def check_recipe(path: Path) -> None:
    """Raise UserError when a recipe is no file, and name the recipe that may be meant."""
    if path.is_dir():
        raise UserError(f"--config {path} is a directory: name a YAML file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"--config {path} is no regular file: write it to one, and name that")
    if not path.is_file():
        folders = (Path("configs"), path.parent)
        there = {name: name for name in recipes()}
        found = (p for folder in folders for p in sorted(folder.glob("[!.]*.yaml")))
        there |= {p.stem: str(p) for p in found}
        near = difflib.get_close_matches(path.stem, there, n=1)
        listed = f"there are {', '.join(there)}" if there else "give the path of a YAML file"
        hint = f"did you mean {there[near[0]]}?" if near else listed
        raise UserError(f"--config {path} does not exist: {hint}")
