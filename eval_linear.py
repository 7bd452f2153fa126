"""Judge an encoder by a classifier on top of it:  python eval_linear.py --checkpoint ANY"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.command import cli
from moco.command.launch import judge_main
from moco.config import LinearConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line, judge, and return the results."""
    settings = judge_main(
        __file__, argv, LinearConfig, "Train a linear classifier on an encoder, or fine-tune it."
    )
    from moco.evaluation.judge import judge_linear  # brings torch: only once the settings stand

    return judge_linear(*settings)


if __name__ == "__main__":
    cli.run_main(main)
