"""Judge an encoder by its nearest neighbours:  python eval_knn.py --checkpoint ANY"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.command import cli
from moco.command.launch import judge_main
from moco.config import KNNConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, judge, and return the results."""
    settings = judge_main(
        __file__, argv, KNNConfig, "Judge an encoder by nearest neighbours and by few labels."
    )
    from moco.evaluation.judge import judge_knn  # brings torch: only once the settings stand

    return judge_knn(*settings)


if __name__ == "__main__":
    cli.run_main(main)
