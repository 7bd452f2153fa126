"""Write the page of all settings:  python docs/settings.py > docs/settings.md"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parent.parent))

from moco.config import TrainConfig
from moco.config.setting import Auto
from moco.judge_config import (
    EmbedConfig,
    ExportConfig,
    JudgeConfig,
    KNNConfig,
    LinearConfig,
    QualityConfig,
    ReplayConfig,
    ReportConfig,
    SearchConfig,
    SelectConfig,
    ShardsConfig,
    ViewsConfig,
)

INTRODUCTION = """\
# Settings

This page is made from `moco/config/` and `moco/judge_config.py` by `python docs/settings.py`;
`--help` of each command says the same. A recipe (YAML) writes `FIELD: VALUE` below `GROUP:`, the
command line `--GROUP.FIELD VALUE`. A list is written `[1, 2]`. A run's `config.yaml` holds what was
asked for, and in its section `decided` what `auto` came to.

`train.py` takes the groups `model`, `optim`, `data`, `trainer` and `run`. Besides, `--config FILE`
names a recipe (later ones win), `--resume RUN` goes on with a run, and `--extend EPOCHS` with it
makes that run longer (`--yes`: although the rate jumps). `--init_from FILE` starts a new run from
the weights of a checkpoint (`--allow_partial`: although it fits only in part).
"""
EVALUATION = """\
# Settings of evaluation, export and features

These have no group. `eval_linear.py`, `eval_knn.py`, `embed` and `quality` also take the group
`data`, whose defaults are then the checkpoint's own; of it, `batch_size`, `chunks`, `pairs` and the
settings of views belong to pretraining and are refused, but for `flip` and `upscale`. `views` takes
all settings of training; the other commands take their own alone.
"""


def page() -> str:
    """Return the whole page: a table for each group."""
    groups = [_section(f"`{name}`", kind) for name, kind in get_type_hints(TrainConfig).items()]
    judging = {"Both": JudgeConfig, "`eval_linear.py`": LinearConfig, "`eval_knn.py`": KNNConfig}
    others = judging | {"`export.py`": ExportConfig, "`report`": ReportConfig}
    others |= {"`embed`": EmbedConfig, "`search`": SearchConfig, "`select`": SelectConfig}
    others |= {"`views`": ViewsConfig, "`replay`": ReplayConfig}
    others |= {"`shards`": ShardsConfig, "`quality`": QualityConfig}
    parts = [_section(title, kind) for title, kind in others.items()]
    return "\n".join([INTRODUCTION, *groups, EVALUATION, *parts])


def _section(title: str, kind: type) -> str:
    """Return the table of one dataclass, under its name and the first line of its docstring."""
    hints = get_type_hints(kind)
    rows = [_row(item, hints[item.name]) for item in dataclasses.fields(kind)]
    head = "| setting | meaning | default | values |\n|---|---|---|---|"
    return "\n".join([f"## {title}\n", f"{kind.__doc__}\n", head, *rows, ""])


def _row(item: dataclasses.Field, kind: Any) -> str:
    factory = item.default_factory
    default = item.default if factory is dataclasses.MISSING else factory()
    shown = "needed" if default is dataclasses.MISSING else _value(default)
    cells = [f"`{item.name}`", item.metadata["meaning"], shown, _values(item, kind)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value(value: Any) -> str:
    """Write a value as YAML does."""
    if value == "":
        return "empty"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _values(item: dataclasses.Field, kind: Any) -> str:
    """Say what a field takes: its choices, or its type and range."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    null = " or `null`" if type(None) in get_args(kind) else ""
    names = {int: "whole number", float: "number", str: "text", float | None: "number"}
    names |= {float | list[float] | Auto: "number, list of numbers or `auto`"}
    names |= {int | Auto: "whole number or `auto`", float | Auto: "number or `auto`"}
    names |= {list[int]: "list of whole numbers", list[float]: "list of numbers"}
    names[list[str]] = "words"
    names[float | list[float] | None] = "number, a list of two numbers"
    limits = {"above": "above", "at_least": "at least", "at_most": "at most"}
    given = [
        f"{words} {item.metadata[key]}" for key, words in limits.items() if key in item.metadata
    ]
    return ", ".join([names[kind] + null, *given])


if __name__ == "__main__":
    print(page(), end="")
