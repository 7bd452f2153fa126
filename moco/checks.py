"""Checks of settings: values out of range, and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import math
import re
from operator import ge, gt, le
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moco.config import OptimConfig, TrainConfig, UserError
from moco.config.data import PER_VIEW, DataConfig, per_view
from moco.config.setting import LEAST_VIEW

MOST_COMBINATIONS = 1024  # of a view's patches; Fast-MoCo has 6


def check_parts(config: TrainConfig, *groups: str) -> None:
    """Check groups of settings for a part that is built without a run.

    Args:
        config: Settings; the other groups as they are by default.
        groups: The part's: model, optim, data.

    Raises:
        UserError: A setting is left to `auto`, is out of range, or contradicts another.
    """
    names = [*config.undecided(), *(["model.key_bn"] if config.model.key_bn == "auto" else [])]
    if left := [name for name in names if name.partition(".")[0] in groups]:
        raise UserError(
            f"{', '.join(left)} is auto, which a run decides (moco.pretrain): give its value"
        )
    for group in groups:
        check_ranges(getattr(config, group), f"{group}.")
    _check_optim(config.optim)
    if "data" in groups:
        _check_data(config.data)
        _check_sizes(config.data)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first field outside its declared range or choices."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        else:
            _check_value(name, value, item.metadata, hints[item.name])


def _check_value(name: str, value: Any, limits: Any, kind: Any) -> None:
    if value is None and type(None) not in get_args(kind):
        raise UserError(f"{name} is null: give a value, or leave the line out for the default")
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(map(str, get_args(kind)))}")
    if isinstance(value, str) and (wanted := _instead_of_text(value, kind)):
        raise UserError(f"{name} is {value!r}: give {wanted}")
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UserError(f"{name} is {value}: give finite numbers")
    for number in numbers:
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_number(name, value, number, limits)


def _instead_of_text(text: str, kind: Any) -> str:
    """Say what a field of this kind takes in the place of a text; empty where it takes that."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal or str in kinds:
        return ""
    if Literal["auto"] in kinds:
        return "" if text == "auto" else "a number, a list of numbers, or auto"
    if get_origin(kind) is list:
        return "a list of numbers"
    if any(get_origin(each) is list for each in kinds):
        return "a number or a list of numbers"
    return "true or false" if bool in kinds else "a number"


def _check_number(name: str, value: Any, number: float, limits: Any) -> None:
    """Raise UserError when a number, the value of a field or one of its list, is out of range."""
    for bound, holds in (("above", gt), ("at_least", ge), ("at_most", le)):
        if bound in limits and not holds(number, limits[bound]):
            need = f"{bound.replace('_', ' ')} {limits[bound]}"
            raise UserError(f"{name} is {value}: it must be {need} ({limits['meaning']})")


def check(config: TrainConfig) -> None:
    """Raise UserError for values out of range and for settings that contradict each other."""
    check_ranges(config)
    _check_optim(config.optim)
    if config.trainer.max_steps == 0:
        raise UserError("trainer.max_steps is 0: give a number of steps, or -1 to train max_epochs")
    if "trainer.max_epochs" in config.undecided() and not config.run.minutes:
        raise UserError(
            "trainer.max_epochs is auto and run.minutes 0: give the minutes that the run may take, "
            "as in --run.minutes 10, or a number of epochs"
        )
    if config.ends_by_clock:
        _check_clock(config)
    _check_data(config.data)
    check_root(config.data)
    if not config.undecided():
        check_together(config)


def _check_optim(optim: OptimConfig) -> None:
    if optim.nesterov and (optim.sgd_momentum == 0 or optim.dampening != 0):
        raise UserError(
            "optim.nesterov is true: it needs optim.sgd_momentum above 0 and optim.dampening 0"
        )
    if optim.name == "muon" and optim.sgd_momentum == 1:
        raise UserError("optim.sgd_momentum is 1: with optim.name muon it must be below 1")
    if optim.milestones != sorted(optim.milestones):
        raise UserError(f"optim.milestones is {optim.milestones}: list the epochs in rising order")


def _check_data(data: DataConfig) -> None:
    for name in PER_VIEW:
        if getattr(data, name) is not None:
            per_view(getattr(data, name), f"data.{name}")
    if any(value <= 0 for value in data.std):
        raise UserError(f"data.std is {data.std}: give positive values")
    if data.pairs not in ("", "own") and not data.pairs.lower().endswith(".csv"):
        pattern_of_pairs(data.pairs)


def pattern_of_pairs(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that has a group.

    Raises:
        UserError: It is none, or names nothing.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"data.pairs {pattern!r} is no regular expression ({error}), nor the name of a .csv "
            "file: mend it"
        ) from None
    if not found.groups:
        raise UserError(
            f"data.pairs {pattern!r} has no group: put what names the thing in parentheses, as in "
            "(place[0-9]+)_"
        )
    return found


def check_root(data: DataConfig) -> None:
    """Raise UserError where no images are named, and for an address that holds credentials.

    These would stand in logs, in config.yaml and in every checkpoint; the text is never repeated.
    """
    root = data.root
    if data.dataset not in ("digits", "own") and not root:
        raise UserError(
            f"data.root is empty: give the directory of {data.dataset}, as in --data.root PATH"
        )
    scheme, _, rest = root.partition("://")
    if rest and "@" in rest.split("/")[0]:
        raise UserError(
            f"data.root ({scheme}://...) holds a user or a password: leave it out, and give "
            "credentials by the environment"
        )
    if scheme in ("http", "https") and "?" in rest:
        raise UserError(
            f"data.root ({scheme}://...) has a query, which may hold a key: give the plain "
            "address, and credentials by the environment"
        )


def _check_clock(config: TrainConfig) -> None:
    """Raise UserError where a setting needs the length of a run that the clock has still to fix."""
    for name, usual in (("model.key_momentum_schedule", "constant"), ("data.image_size_start", 0)):
        if (value := config.value(name)) != usual:
            raise UserError(
                f"{name} is {value}, which follows from the length of the run, and with "
                f"optim.schedule stable run.minutes fixes that as it trains: set it to {usual}, or "
                "trainer.max_epochs to a number"
            )


def check_together(config: TrainConfig) -> None:
    """Raise UserError where numbers that may be left to `auto` contradict others."""
    optim, data = config.optim, config.data
    if (optim.schedule, optim.plateau_metric) == ("plateau", "val/knn_top1") and (
        not 0 < config.run.knn_every < config.trainer.max_epochs
    ):
        raise UserError(
            f"optim.plateau_metric is val/knn_top1 but run.knn_every is {config.run.knn_every} and "
            f"trainer.max_epochs {config.trainer.max_epochs}, so kNN is not read while the rate "
            "could follow it: set run.knn_every to 1, or train longer"
        )
    _check_sizes(data)
    _check_queues(config)
    _check_patches(config)


def _check_sizes(data: DataConfig) -> None:
    """Raise UserError where sizes of views, channels and their values contradict each other."""
    for name in ("image_size_start", "image_size_end"):
        if 0 < (side := getattr(data, name)) < LEAST_VIEW:
            raise UserError(f"data.{name} {side} is below {LEAST_VIEW} pixels: raise it, or take 0")
    if data.image_size_end > data.image_size:
        raise UserError(
            f"data.image_size_end {data.image_size_end} is above data.image_size "
            f"{data.image_size}: lower it, or take 0 for views of data.image_size"
        )
    if data.image_size_start >= data.view_side:
        raise UserError(
            f"data.image_size_start {data.image_size_start} is not below "
            f"{data.view_side_setting} {data.view_side}: lower it, or take 0 for views that do not "
            "grow"
        )
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values and len(values) != data.channels:
            raise UserError(
                f"data.{name} has {len(values)} values for data.channels {data.channels}: give "
                "one each"
            )
    _check_values(data)


def _check_queues(config: TrainConfig) -> None:
    """Raise UserError where queues and batches contradict each other."""
    model, data = config.model, config.data
    if model.queues == 2 and (model.queue_size == 0 or model.symmetric == "none"):
        raise UserError(
            "model.queues is 2, one for the keys of each view: it needs model.queue_size above 0 "
            "and model.symmetric mean or sum"
        )
    keys = data.batch_size * model.keys_per_image
    if 0 < model.queue_size < keys:
        raise UserError(
            f"model.queue_size {model.queue_size} is below the {keys} keys of "
            f"one step (data.batch_size {data.batch_size}, model.symmetric {model.symmetric}): "
            "raise it, or lower data.batch_size"
        )
    if model.queue_size == 0 and config.trainer.accumulate_grad_batches > 1:
        raise UserError(
            "trainer.accumulate_grad_batches is above 1 with model.queue_size 0: the negatives are "
            "the batch's own keys, and smaller batches would be another loss; keep data.batch_size "
            "and set data.chunks instead, which saves the same memory"
        )


def _check_patches(config: TrainConfig) -> None:
    """Raise UserError where views do not divide into patches, or patches do not combine."""
    patches, combine, data = config.model.patches, config.model.combine, config.data
    start = "data.image_size_start", data.image_size_start
    for name, side in ((data.view_side_setting, data.view_side), start):
        if side % patches:
            raise UserError(
                f"{name} {side} does not divide into model.patches {patches} along a side: "
                f"take {max(side // patches, 4) * patches}"
            )
    if combine > patches**2:
        raise UserError(
            f"model.combine {combine} is above the {patches**2} patches of a view "
            f"(model.patches {patches}): lower it"
        )
    if (count := math.comb(patches**2, combine)) > MOST_COMBINATIONS:
        raise UserError(
            f"model.patches {patches} and model.combine {combine} make {count} queries of a view, "
            f"above {MOST_COMBINATIONS}: lower one of them"
        )


def _check_values(data: DataConfig) -> None:
    """Raise UserError where min_value and max_value do not fit the channels or one another."""
    ends = [getattr(data, name) for name in ("min_value", "max_value")]
    for name, value in zip(("min_value", "max_value"), ends, strict=True):
        if isinstance(value, list) and len(value) not in (1, data.channels):
            raise UserError(
                f"data.{name} has {len(value)} values for data.channels {data.channels}: give one, "
                "or one each"
            )
    if "auto" in ends:
        return
    low, high = (value if isinstance(value, list) else [value] for value in ends)
    count = max(len(low), len(high))
    low, high = (value * count if len(value) == 1 else value for value in (low, high))
    if any(bottom >= top for bottom, top in zip(low, high, strict=True)):
        raise UserError(
            f"data.min_value {ends[0]} is not below data.max_value {ends[1]}: change one of them"
        )
