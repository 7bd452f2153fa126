"""Patterns: which shards `data.root` names, on a disk or in a store, and which split each is of.

A pattern has braces (`train-{000..146}.tar`, `{train,val}-0.tar`) or stars, or is a folder. A shard
is of the split that its file name begins with, as `train-0001.tar` and `val-0001.tar`; where no
name says so, all shards are trained on. Addresses never hold a password or a key: those come from
the environment. This room needs no torch.
"""

from __future__ import annotations

import glob
import os
import re
from typing import NamedTuple

from moco.checks import check_root
from moco.config import DataConfig, UserError
from moco.images.formats import shown
from moco.images.labels import HELD_OUT, TRAIN
from moco.images.stores import is_remote, listed

ENDINGS = {"shards": ".tar", "parquet": ".parquet"}  # by data.dataset
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 10_000_000  # shards; more would be a typing mistake


class Splits(NamedTuple):
    """Addresses of the shards that are trained on, and of those that are held out."""

    train: list[str]
    held_out: list[str]


def find_shards(data: DataConfig) -> Splits:
    """Return the shards that `data.root` names; a store is asked where it has stars or a folder.

    Raises:
        UserError: None is there, or the store does not answer.
    """
    check_root(data)
    ending = ENDINGS[data.dataset]
    addresses = _addresses(data.root, ending)
    if not addresses:
        raise UserError(
            f"data.root {data.root!r} names no shard: give a pattern such as "
            f"DIR/train-{{0000..0146}}{ending} or DIR/*{ending}, or the folder that holds them"
        )
    splits: dict[str, list[str]] = {}
    for address in addresses:
        splits.setdefault(first_word(address), []).append(address)
    held = next((name for name in HELD_OUT if name in splits), None)
    train = next((name for name in TRAIN if name in splits), None)
    if not train:
        chosen = [a for a in addresses if first_word(a) not in HELD_OUT]
        return Splits(chosen or addresses, splits[held] if held and chosen else [])
    return Splits(splits[train], splits[held] if held else [])


def first_word(address: str) -> str:
    """Return the letters that a shard's file name begins with, in lower case."""
    return re.match(r"[a-z]*", address.rpartition("/")[2].lower())[0]


def _addresses(root: str, ending: str) -> list[str]:
    remote = is_remote(root)
    found: dict[str, None] = {}
    for pattern in expand_braces(root):
        if remote:
            plain = pattern.endswith(ending) and "*" not in pattern
            names = [pattern] if plain else listed(pattern, ending)
        else:
            path = os.path.abspath(os.path.expanduser(pattern))
            path = os.path.join(path, f"*{ending}") if os.path.isdir(path) else path
            names = sorted(glob.glob(path)) if "*" in path else [path]
        found.update(dict.fromkeys(names))
    missing = [] if remote else [name for name in found if not os.path.isfile(name)]
    if missing:
        raise UserError(
            f"data.root {root!r}: {shown(missing[0])} is not there ({len(missing)} of "
            f"{len(found)} shards): give a pattern of files that exist"
        )
    return list(found)


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for, in its order.

    Raises:
        UserError: A brace is not closed, or they are too many.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, end, commas = 0, -1, [start]
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0:
            end = place
            break
        if depth == 1 and pattern[place] == ",":
            commas.append(place)
    if end < 0:
        raise UserError(f"data.root {pattern!r}: a brace is not closed")
    body, rest = pattern[start + 1 : end], expand_braces(pattern[end + 1 :])
    parts = [pattern[a + 1 : b] for a, b in zip(commas, [*commas[1:], end], strict=True)]
    if span := _RANGE.fullmatch(body):
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") else 0
        middles = [f"{n:0{width}d}" for n in range(first, min(last, first + _MOST) + 1)]
    else:
        middles = [name for part in parts for name in expand_braces(part)]
    if len(middles) * len(rest) > _MOST or (span and not middles):
        raise UserError(f"data.root {pattern!r}: {{{body}}} is no range that shards can have")
    return [pattern[:start] + middle + after for middle in middles for after in rest]
