"""Run a command by its name:  python -m moco train --config configs/quickstart.yaml"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from moco import __version__
from moco.command import cli
from moco.config import UserError

COMMANDS = {  # name: the module whose main it runs, and what it does
    "train": ("moco.command.train", "pretrain an encoder without labels"),
    "knn": ("moco.command.knn", "judge an encoder by its nearest neighbours"),
    "linear": ("moco.command.linear", "judge an encoder by a classifier on top of it"),
    "quality": ("moco.command.quality", "measure an encoder on images without labels"),
    "export": ("moco.command.export", "write a backbone in another layout"),
    "embed": ("moco.command.embed", "write the features of any images to a Parquet file"),
    "search": ("moco.command.search", "find images like one, or pairs that are nearly the same"),
    "select": ("moco.command.select", "choose the images that are worth a label first"),
    "report": ("moco.command.report", "show what runs have learnt, on one page"),
    "views": ("moco.command.views", "draw the view pairs of a run before it starts"),
    "replay": ("moco.command.replay", "make the batch of a step again, and its losses"),
    "shards": ("moco.command.shards", "turn a folder of images into shards"),
    "recipes": ("moco.command.recipe_list", "list the recipes that --config takes by name"),
}


def main() -> None:
    """Run the command that the first word names; its help and errors bear its name."""
    program = "moco" if Path(sys.argv[0]).stem == "moco" else "python -m moco"
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        lines = [f"  {command:8} {about}" for command, (_, about) in COMMANDS.items()]
        print(f"usage: {program} COMMAND [--OPTION VALUE ...]", *lines, sep="\n")
        print(f"What a command takes: {program} COMMAND --help; the version: {program} --version")
        return
    if name == "--version":
        print(f"moco {__version__}")
        return
    sys.argv = [f"{program} {name}", *sys.argv[2:]]
    cli.run_main(lambda argv: _run(name, argv))


def _run(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Import the command's module and run its main."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}: {hint}")
    return import_module(COMMANDS[name][0]).main(argv)


if __name__ == "__main__":
    main()
