"""The command `views`: draw the view pairs of a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.checks import check
from moco.command import cli
from moco.command.early import check_file, check_images
from moco.command.judge import flat_options
from moco.config import TrainConfig
from moco.judge_config import ViewsConfig
from moco.log import log_to_stderr


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, draw, and return where the picture is."""
    about = "Draw what an encoder would see: images, and the two views of each in three epochs."
    parser = cli.build_parser(about, TrainConfig, flat_options(ViewsConfig))
    config, extra = cli.parse(parser, TrainConfig, argv)
    check(config)
    output = Path(extra["output"])
    check_file("--output", output, ".png")
    check_images(config.data)
    log_to_stderr()
    from moco.training.preview import preview  # imports torch, so it waits for the settings

    return preview(config, output)
