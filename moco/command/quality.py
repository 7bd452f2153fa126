"""The command `quality`: measure an encoder on images without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.checks import check_ranges
from moco.command import cli
from moco.command.early import check_images, check_name
from moco.command.judge import flat_options, image_reader, take
from moco.config import UserError
from moco.judge_config import EvalDataConfig, QualityConfig


def main(argv: Sequence[str], *given: Any) -> dict[str, Any]:
    """Parse the command line, measure, and return the measures of each network by name.

    Args:
        argv: Words.
        given: What Python gives beside them, as `moco.evaluation.own.Given` takes it.
    """
    about = "Measure an encoder on images without labels, beside the untrained network."
    parser = cli.build_parser(about, EvalDataConfig, flat_options(QualityConfig))
    parser.usage = "%(prog)s --checkpoint ANY [--data.root IMAGES] [--OPTION VALUE ...]"
    groups, options = cli.parse(parser, EvalDataConfig, argv)
    config, data = take(QualityConfig, options), groups.data
    for settings in (groups, config):
        check_ranges(settings)
    if config.views % 2:
        raise UserError(f"views is {config.views}: give an even number, since they come in pairs")
    from moco.checkpoints.places import check_place

    check_place(config.checkpoint)
    check_name(config.backbone, "backbone")
    read_data, is_named = image_reader(parser, argv, data)
    if is_named:
        check_images(data)
    from moco.evaluation.own import Given
    from moco.evaluation.quality import quality  # imports torch, so it waits for the settings

    return quality(config, read_data, Given(*given))
