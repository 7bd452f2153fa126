"""The command `knn`: judge an encoder by its nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.command.judge import read_settings
from moco.judge_config import KNNConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, judge, and return the results."""
    about = "Judge an encoder by nearest neighbours and by few labels."
    settings = read_settings(argv, KNNConfig, about)
    from moco.evaluation.judge import judge_knn  # imports torch, so it waits for the settings

    return judge_knn(*settings)
