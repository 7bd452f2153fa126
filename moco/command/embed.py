"""The command `embed`: write the features of any images to a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.checks import check_ranges
from moco.command import cli
from moco.command.early import check_images, check_name, check_new_folder, check_package
from moco.command.judge import check_devices, flat_options, image_reader, take
from moco.command.launch import start_ranks
from moco.config import UserError
from moco.judge_config import EmbedConfig, EvalDataConfig
from moco.run_directory import run_of, stored_groups


def main(argv: Sequence[str], *given: Any) -> dict[str, Any]:
    """Parse the command line, embed, and return what was written.

    Args:
        argv: Words.
        given: What Python gives beside them, as `moco.evaluation.own.Given` takes it.
    """
    about = "Write the features of any images to a Parquet file."
    parser = cli.build_parser(about, EvalDataConfig, flat_options(EmbedConfig))
    parser.usage = (
        "%(prog)s --checkpoint ANY --output DIR [--data.root IMAGES] [--OPTION VALUE ...] "
        "[--data.FIELD VALUE ...]"
    )
    groups, options = cli.parse(parser, EvalDataConfig, argv)
    config, data = take(EmbedConfig, options), groups.data
    for settings in (groups, config):
        check_ranges(settings)
    if config.features == "patch" and (config.index or config.map):
        name = "index" if config.index else "map"
        raise UserError(f"--{name} takes one vector for each image, and --features patch gives "
                        "maps: leave one out")  # fmt: skip
    check_package("pyarrow", "embed")
    from moco.checkpoints.places import check_place

    check_place(config.checkpoint)
    check_name(config.backbone, "backbone")
    check_new_folder(config.output)
    read_data, is_named = image_reader(parser, argv, data)
    run_dir = run_of(Path(config.checkpoint))
    stored = (stored_groups(run_dir) if run_dir else {}).get("data", {})
    if stored or is_named:
        check_images(read_data(stored))
    check_devices(config)
    start_ranks(config.devices, "give the command again, which goes on")
    from moco.evaluation.own import Given
    from moco.reports.embed import embed  # imports torch, so it waits for the settings

    return embed(config, read_data, Given(*given))
