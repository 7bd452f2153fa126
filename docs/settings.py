"""Write docs/settings.md from moco/config.py:  python docs/settings.py

tests/test_docs.py checks that the page is what this writes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

from moco.config import JudgeConfig, KNNConfig, LinearConfig, TrainConfig

PAGE = Path(__file__).with_name("settings.md")
INTRODUCTION = """# Settings

`python docs/settings.py` writes this page from `moco/config.py`, where every setting is declared.
In a YAML recipe a setting stands below its group; on the command line it is `--GROUP.SETTING
VALUE`. What `auto` comes to is decided when a run starts, and said in its log.
"""


def page() -> str:
    """Return the whole page in Markdown."""
    parts = [INTRODUCTION]
    for group, kind in get_type_hints(TrainConfig).items():
        parts.append(section(f"`{group}`", kind, f"{group}."))
    parts.append(section("`eval_knn.py` and `eval_linear.py`", JudgeConfig, "--"))
    parts.append(section("`eval_knn.py` alone", KNNConfig, "--"))
    parts.append(section("`eval_linear.py` alone", LinearConfig, "--"))
    return "\n".join(parts)


def section(title: str, kind: type, prefix: str) -> str:
    """Return a heading and a table of one group of settings."""
    about = " ".join((kind.__doc__ or "").split())
    lines = [f"## {title}", "", about, "", "| setting | default | values | meaning |"]
    lines.append("|---|---|---|---|")
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        given = item.default is not dataclasses.MISSING
        default = item.default if given else item.default_factory()
        allowed, meaning = values(hints[item.name], item.metadata), cell(item.metadata["meaning"])
        lines.append(f"| `{prefix}{item.name}` | {shown(default)} | {allowed} | {meaning} |")
    return "\n".join([*lines, ""])


def shown(default: Any) -> str:
    """Return a default as YAML has it."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    plain = isinstance(default, str | bool | None)
    return f"`{words.get(default, default) if plain else default}`"


def values(kind: Any, metadata: Any) -> str:
    """Return the choices of a setting, or its type and range."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    name = getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind)
    limits = [
        f"{words} {metadata[key]:,}" if abs(metadata[key]) >= 10000 else f"{words} {metadata[key]}"
        for key, words in (("above", "above"), ("at_least", "from"), ("at_most", "to"))
        if key in metadata
    ]
    return cell(" ".join([name.replace(" | None", " or null") + (":" if limits else ""), *limits]))


def cell(text: str) -> str:
    """Keep a text inside one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
