"""What the evaluation scripts do before torch is there: options, quick checks, and several
processes.

`judge_main` is their whole main; with `--devices N` it starts itself N times and ends as they end.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from moco.command import cli
from moco.config import (
    DataConfig,
    EvalDataConfig,
    JudgeConfig,
    KNNConfig,
    LinearConfig,
    UserError,
    check_ranges,
)

Settings = tuple[JudgeConfig, Any, Callable[[dict[str, Any]], DataConfig]]


def judge_main(script: str, argv: Sequence[str], kind: type, about: str) -> Settings:
    """Parse and check a command line; under `--devices N`, start N processes and do not come back.

    Args:
        script: File to start again.
        kind: LinearConfig or KNNConfig.
        about: First line of the help.

    Returns:
        Common settings, the script's own, and what reads data settings given the checkpoint's as
        defaults.

    Raises:
        UserError: Wrong settings, or no such checkpoint.
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
    if "://" not in judge.checkpoint and not os.path.exists(judge.checkpoint):
        raise UserError(f"checkpoint {judge.checkpoint} does not exist: check the path")
    if judge.devices > 1 and not is_launched():
        launch(script, argv, judge.devices)

    def read_data(stored: dict[str, Any]) -> DataConfig:
        known = {item.name for item in dataclasses.fields(DataConfig)}
        defaults = {f"data.{name}": value for name, value in stored.items() if name in known}
        parser.set_defaults(defaults)
        return cli.parse(parser, EvalDataConfig, argv)[0].data

    return judge, own, read_data


def check_linear(config: LinearConfig) -> None:
    """Raise UserError for rates and milestones that make no sense."""
    if any(not (math.isfinite(rate) and rate > 0) for rate in config.learning_rates):
        raise UserError(f"learning_rates is {config.learning_rates}: give positive numbers")
    if config.milestones != sorted(config.milestones):
        raise UserError(f"milestones is {config.milestones}: list the epochs in rising order")


def check_knn(config: KNNConfig) -> None:
    """Raise UserError for empty or senseless lists."""
    for name in ("k", "shots"):
        values = getattr(config, name)
        if not values or min(values) < 1:
            raise UserError(
                f"{name} is {values}: give whole numbers from 1 up, as in --{name} [10]"
            )


def flat_options(*kinds: type) -> dict[str, dict[str, Any]]:
    """Turn the fields of dataclasses into options without a group, as `build_parser` takes them."""
    options = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            fresh = item.default is dataclasses.MISSING
            options[item.name] = {
                "type": hints[item.name],
                "default": item.default_factory() if fresh else item.default,
                "help": cli.option_help(item.metadata),
            }
    return options


def take(kind: type, values: dict[str, Any]) -> Any:
    """Build a dataclass from those values that are its fields."""
    return kind(**{item.name: values[item.name] for item in dataclasses.fields(kind)})


def is_launched() -> bool:
    """Tell whether this process is one of several already, under torchrun or `launch`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(script: str, argv: Sequence[str], count: int) -> None:
    """Run `script` in `count` processes and end as they end; if one fails, the others are stopped.

    Raises:
        SystemExit: Always; 0, or the code of the first process that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    threads = str(max(1, (os.cpu_count() or 1) // count))
    processes = [
        subprocess.Popen(
            [sys.executable, script, *argv],
            env={"OMP_NUM_THREADS": threads}
            | os.environ
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        sys.exit(_wait(processes))
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Return 0 when all are done, or the first failure's code once rank 0 had time to say why."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed and codes[0] is None:
            try:
                return processes[0].wait(timeout=5) or failed[0]
            except subprocess.TimeoutExpired:
                return abs(failed[0])
        if failed:
            return abs(codes[0] or failed[0])
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
