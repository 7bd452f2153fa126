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
PATHS |= {"resume", "init_from", "checkpoint", "output", "index", "query", "picture"}


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
    if root != stored.get("root") or os.path.isabs(root) or data.dataset == "digits":
        return
    if root and not (data.download or os.path.exists(os.path.expanduser(root))):
        raise UserError(
            f"data.root {root!r} came from the checkpoint and is not in {os.getcwd()}: it is "
            "relative to the directory that the run was started in: start there, or give "
            "--data.root"
        )


def check_recipe(path: Path) -> None:
    """Raise UserError when a recipe is no file, and name the recipe that may be meant."""
    if path.is_dir():
        raise UserError(f"--config {path} is a directory: name a YAML file in it")
    if not path.is_file():
        folders = (Path("configs"), path.parent)
        recipes = {p.stem: p for f in folders for p in sorted(f.glob("*.yaml"))}
        near = difflib.get_close_matches(path.stem, recipes, n=1)
        listed = f"there are {', '.join(recipes)}" if recipes else "give the path of a YAML file"
        hint = f"did you mean {recipes[near[0]]}?" if near else listed
        raise UserError(f"--config {path} does not exist: {hint}")
