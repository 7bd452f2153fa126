"""What the commands `knn` and `linear` share: options, and checks that need no encoder."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from moco.checks import check_ranges
from moco.command import cli
from moco.command.early import check_images, check_name, check_output
from moco.command.launch import start_ranks
from moco.command.paths import check_stored_root
from moco.config import DataConfig, UserError
from moco.judge_config import (
    LISTS,
    NAMING,
    EmbedConfig,
    EvalDataConfig,
    JudgeConfig,
    KNNConfig,
    LinearConfig,
)
from moco.run_directory import run_of, stored_groups

Settings = tuple[JudgeConfig, Any, Callable[[dict[str, Any]], DataConfig]]


def read_settings(argv: Sequence[str], kind: type, about: str) -> Settings:
    """Parse and check a command line; with `--devices N`, start N ranks of it.

    Args:
        argv: The words after the command's name.
        kind: LinearConfig or KNNConfig.
        about: First line of the help.

    Returns:
        Common settings, the command's own, and a function that reads the data settings, given the
        checkpoint's as defaults.

    Raises:
        UserError: Wrong settings, no such checkpoint, or more devices than there are.
    """
    parser = cli.build_parser(about, EvalDataConfig, flat_options(JudgeConfig, kind))
    parser.usage = "%(prog)s --checkpoint FILE [--OPTION VALUE ...] [--data.FIELD VALUE ...]"
    config, extra = cli.parse(parser, EvalDataConfig, argv)
    judge, own = take(JudgeConfig, extra), take(kind, extra)
    for settings in (config, judge, own):
        check_ranges(settings)
    check_linear(own) if kind is LinearConfig else check_knn(own)
    if not judge.checkpoint:
        raise UserError(
            "checkpoint is empty: give a file, as in --checkpoint RUN/checkpoints/last.ckpt"
        )
    from moco.checkpoints.places import check_place
    from moco.images.folders import is_same_place

    for path in (judge.checkpoint, *judge.reference):
        check_place(path)
    check_name(judge.backbone, "backbone")
    check_output(Path(judge.output or Path(judge.checkpoint).parent))

    def read_data(stored: dict[str, Any]) -> DataConfig:
        is_moved = config.data.root and not is_same_place(config.data.root, stored.get("root", ""))
        if is_moved and stored.get("dataset") in ("digits", "own"):  # which lie in no directory
            stored = stored | {"dataset": "folder"}
        return data_reader(parser, argv, LISTS if is_moved else ())(stored)

    run_dir = run_of(Path(judge.checkpoint))
    if stored := stored_groups(run_dir) if run_dir else {}:
        check_images(read_data(stored["data"]))
    check_devices(judge)
    start_ranks(judge.devices, "run the command again")
    return judge, own, read_data


def image_reader(
    parser: Any, argv: Sequence[str], data: DataConfig
) -> tuple[Callable[[dict[str, Any]], DataConfig], bool]:
    """As `data_reader`; where images are named here, the settings that name the run's do not count.

    Returns:
        The function, and whether images are named.
    """
    is_named = bool(data.root or data.dataset in ("digits", "own"))
    return data_reader(parser, argv, NAMING if is_named else ()), is_named


def data_reader(
    parser: Any, argv: Sequence[str], left_out: Sequence[str] = ()
) -> Callable[[dict[str, Any]], DataConfig]:
    """Return a function that reads the data settings, given a checkpoint's as defaults.

    Args:
        parser, argv: Of the command.
        left_out: Fields whose defaults the checkpoint does not give.
    """
    known = {item.name for item in dataclasses.fields(DataConfig)} - {*left_out}

    def read_data(stored: dict[str, Any]) -> DataConfig:
        defaults = {f"data.{name}": value for name, value in stored.items() if name in known}
        parser.set_defaults(defaults)
        data = cli.parse(parser, EvalDataConfig, argv)[0].data
        check_stored_root(data, stored)
        return data

    return read_data


def check_devices(config: JudgeConfig | EmbedConfig) -> None:
    """Raise UserError when there are fewer GPUs, or on a CPU fewer cores, than devices."""
    if config.devices == 1:
        return
    from moco.training.hardware import count_gpus

    gpus = count_gpus(config.accelerator)
    there, kind = (gpus, "GPUs") if gpus else (os.cpu_count() or 1, "CPU cores")
    if config.devices > there:
        raise UserError(f"devices is {config.devices} but there are {there} {kind}: lower it")


def check_linear(config: LinearConfig) -> None:
    """Raise UserError for rates that are not positive and milestones that fall."""
    if any(not (math.isfinite(rate) and rate > 0) for rate in config.learning_rates):
        raise UserError(f"learning_rates is {config.learning_rates}: give positive numbers")
    if config.milestones != sorted(config.milestones):
        raise UserError(f"milestones is {config.milestones}: list the epochs in rising order")


def check_knn(config: KNNConfig) -> None:
    """Raise UserError for lists that are empty or hold numbers below 1."""
    for name in ("k", "shots"):
        values = getattr(config, name)
        if not values or min(values) < 1:
            raise UserError(
                f"{name} is {values}: give whole numbers from 1 up, as in --{name} [10]"
            )


class Nothing:
    """The groups of settings of a command that has only options of its own."""


def read_own(
    argv: Sequence[str], kind: type, about: str, usage: str, **words: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Parse and check a command line that has no groups of settings.

    Args:
        argv: The words after the command's name.
        kind: Dataclass of the options.
        about, usage: First line of the help, and what the command is given.
        words: Positional arguments: name to the keyword arguments of `add_argument`.

    Returns:
        The options, and all values by name.
    """
    parser = cli.build_parser(about, Nothing, flat_options(kind))
    parser.usage = f"%(prog)s {usage} [--OPTION VALUE ...]"
    for name, options in words.items():
        parser.add_argument(name, **options)
    _, given = cli.parse(parser, Nothing, argv)
    config = take(kind, given)
    check_ranges(config)
    return config, given


def flat_options(*kinds: type) -> dict[str, dict[str, Any]]:
    """Return the fields of dataclasses as options without a group, in the form of `extras`."""
    options = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            option = {"type": hints[item.name], "help": cli.option_help(item.metadata)}
            if item.default is not dataclasses.MISSING:
                option["default"] = item.default
            elif item.default_factory is not dataclasses.MISSING:
                option["default"] = item.default_factory()
            else:
                option["required"] = True
            if hints[item.name] == list[str]:  # words that follow
                option |= {"type": str, "nargs": "+"}
            elif get_origin(hints[item.name]) is list:  # or one number, see `take`
                each = get_args(hints[item.name])[0]
                option |= {"type": list[each] | each, "metavar": "N or [N,...]"}
            if hints[item.name] is bool:  # its name alone means true
                option |= {"nargs": "?", "const": True}
            options[item.name] = option
    return options


def take(kind: type, values: dict[str, Any]) -> Any:
    """Build a dataclass from those entries of `values` that are its fields; a number alone in the
    place of several is a list of one."""
    hints, given = get_type_hints(kind), {}
    for item in dataclasses.fields(kind):
        value, is_list = values[item.name], get_origin(hints[item.name]) is list
        given[item.name] = [value] if is_list and isinstance(value, int | float) else value
    return kind(**given)
