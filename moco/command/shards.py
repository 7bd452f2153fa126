"""The command `shards`: turn a folder of images into shards."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moco.checks import check_ranges
from moco.command.cli import build_parser, parse
from moco.command.judge import flat_options, take
from moco.judge_config import ShardsConfig
from moco.log import log_to_stderr


class Nothing:
    """This command has no groups of settings, only the options of `ShardsConfig`."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, write the shards, and return where they are."""
    words = list(argv)
    for place, name in ((0, "folder"), (2, "output")):  # which stand first, without their names
        if len(words) > place and not words[place].startswith("-"):
            words.insert(place, f"--{name}")
    parser = build_parser("Turn a folder into shards.", Nothing, flat_options(ShardsConfig))
    parser.usage = "%(prog)s FOLDER OUTPUT [--OPTION VALUE ...]"
    _, options = parse(parser, Nothing, words)
    config = take(ShardsConfig, options)
    check_ranges(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written goes
    log_to_stderr()
    from moco.images.packing import pack

    return pack(**asdict(config))
