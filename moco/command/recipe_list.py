"""The command `recipes`: list the recipes that come with the program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from moco.command.paths import recipes
from moco.config import UserError


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Print each recipe's name and the first sentence of its header; return name to path."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {sys.argv[0]}\n\nList the recipes that --config takes by name.")
        sys.exit(0)
    if argv:
        raise UserError(f"recipes takes no words, and was given {argv[0]!r}: leave it out")
    found = recipes()
    for name, path in found.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        about, stop, _ = first.partition(". ")
        print(f"{name:18} {about}{stop.strip()}", file=sys.stderr)
    return {"recipes": {name: str(path) for name, path in found.items()}}
