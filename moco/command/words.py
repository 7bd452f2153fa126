"""Words: the settings of a Python call, written as the words of its command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

_FLAGS = ("yes", "allow_partial")  # options without a value
_SEVERAL = ("reference",)  # options of several words


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as the words of a command line."""
    words = []
    for name, value in settings.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if name in _FLAGS:
            words += [f"--{name}"] if value else []
            continue
        if name in _SEVERAL and not isinstance(value, str):
            words += [f"--{name}", *map(os.fspath, value)] if value else []
            continue
        text = value
        if not isinstance(value, str):
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**9)
            text = text.removesuffix("\n").removesuffix("\n...")
        words.append(f"--{name}={text}")
    return words


def _plain(value: Any) -> Any:
    """Return arrays, tensors, ranges, tuples and numbers of NumPy as YAML knows them."""
    if isinstance(value, tuple | list | range):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value
