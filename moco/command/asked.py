"""The door for Python, at the end: the commands `search`, `select` and `report` as functions.

`moco.command.door` has `pretrain`, and says how settings are handed over.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moco.command.door import Pretrained
from moco.command.words import words_of
from moco.config import UserError

if TYPE_CHECKING:
    from torch import nn

Place = str | os.PathLike[str]


def search(
    index: Place, query: Any = "", *, backbone: nn.Module | None = None, **settings: Any
) -> dict[str, Any]:
    """Find images like one, or with duplicates=True pairs that are alike, as `moco search` does.

    Args:
        index: Directory that `embed` has written.
        query: Path of an image; or a PIL image, an array or a tensor, H x W x C or C x H x W.
        backbone: The module of your own whose features these are, to take those of the query.
        settings: Others of `moco search`, such as k=5 or picture="found.png".

    Returns:
        The neighbours, each with id, path, label and similarity; or the file of the pairs.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.command.search import main

    given, is_place = {"index": os.fspath(index)}, isinstance(query, str | os.PathLike)
    if is_place:
        given |= {"query": os.fspath(query)}
    elif not hasattr(query, "__array_interface__") and not hasattr(query, "__array__"):
        raise UserError(
            f"query is a {type(query).__name__}: give the path of an image, a PIL image, an array "
            "or a tensor"
        )
    if isinstance(backbone, str):
        raise UserError(f"backbone is {backbone!r}: the features know it; give a module or nothing")
    return main(words_of({**given, **settings}), None if is_place else query, backbone)


def select(index: Place, count: int, **settings: Any) -> dict[str, Any]:
    """Choose the images that are worth a label first, as `moco select` does.

    Args:
        index: Directory that `embed` has written.
        count: How many.
        settings: Others of `moco select`, such as output="first.csv".

    Returns:
        The file that lists them, and the first ten paths.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.command.select import main

    return main(words_of({"index": os.fspath(index), "count": count, **settings}))


def report(
    runs: Place | Pretrained | Sequence[Place | Pretrained], **settings: Any
) -> dict[str, Any]:
    """Show what one run has learnt, or several side by side, on one page, as `moco report` does.

    Args:
        runs: Directories, or what `pretrain` has returned: one, or several.
        settings: Others of `moco report`, such as output="page.html".

    Returns:
        Path of the page, its bytes, the images on each map and the seconds that it took.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.command.report import main

    several = [runs] if isinstance(runs, str | os.PathLike | Pretrained) else runs
    return main([*words_of(settings), *map(_directory, several)])


def _directory(run: Place | Pretrained) -> str:
    """Return the directory of a run."""
    place = run.metrics.get("run_dir") if isinstance(run, Pretrained) else os.fspath(run)
    if not place:
        raise UserError("this run has left no directory: it was a plan, or rank 0 has it")
    return place
