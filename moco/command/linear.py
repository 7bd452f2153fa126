"""The command `linear`: judge an encoder by a classifier on top of it, or by fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.command.judge import read_settings
from moco.judge_config import LinearConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, judge, and return the results."""
    about = "Train a linear classifier on an encoder, or fine-tune it."
    settings = read_settings(argv, LinearConfig, about)
    from moco.evaluation.judge import judge_linear  # imports torch, so it waits for the settings

    return judge_linear(*settings)
