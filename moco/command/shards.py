"""The command `shards`: turn a folder of images into shards."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moco.command.judge import read_own
from moco.judge_config import ShardsConfig
from moco.log import log_to_stderr


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, write the shards, and return where they are."""
    words = list(argv)
    for place, name in ((0, "folder"), (2, "output")):  # which stand first, without their names
        if len(words) > place and not words[place].startswith("-"):
            words.insert(place, f"--{name}")
    config, _ = read_own(words, ShardsConfig, "Turn a folder into shards.", "FOLDER OUTPUT")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written goes
    log_to_stderr()
    from moco.images.packing import pack

    return pack(**asdict(config))
