"""The command `search`: find images like one, or pairs of images that are nearly the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moco.command.early import check_file, check_package
from moco.command.judge import read_own
from moco.config import UserError
from moco.judge_config import SearchConfig

OWN = "own"  # what the result calls an image that Python gives


def main(argv: Sequence[str], image: Any = None, backbone: Any = None) -> dict[str, Any]:
    """Parse the command line, search, and return what was found.

    Args:
        argv: Words.
        image: What Python gives in the place of a path, as an item of its images.
        backbone: The module of the user's own whose weights the features' checkpoint holds.
    """
    about = "Find images like one, or pairs of images that are nearly the same."
    usage = "--index DIR (--query IMAGE | --duplicates)"
    config, _ = read_own(argv, SearchConfig, about, usage)
    if image is not None:
        config = replace(config, query=OWN)
    if bool(config.query) == config.duplicates:
        raise UserError("give one of --query IMAGE, for images like it, and --duplicates")
    check_package("pyarrow", "search")
    from moco.images.dicom import split_frame

    if config.query and image is None and not os.path.isfile(split_frame(config.query)[0]):
        raise UserError(f"--query {config.query} is no file: check the path")
    if config.picture:
        check_file("--picture", config.picture, ".png")
        if image is None and os.path.realpath(config.picture) == os.path.realpath(config.query):
            raise UserError(f"--picture {config.picture} is the image of --query: choose another")
    if config.output:
        check_file("--output", config.output, ".csv", ".json")
    from moco.reports.search import search  # imports torch only where an image is encoded

    return search(config, image, backbone)
