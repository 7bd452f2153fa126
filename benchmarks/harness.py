"""What every benchmark needs: settings, ways that take turns, a table, and a record in JSON.

A speed is claimed as a ratio of two medians from one run in which the ways took turns, since a
machine with neighbours is slower at one minute than at the next. A target that is missed is said
so and is no error: a benchmark measures.

    seconds = interleave({"theirs": theirs, "ours": ours}, rounds=9)
    rows = [Row("theirs", seconds["theirs"], work=256),
            Row("ours", seconds["ours"], work=256, against={"theirs": 5})]
    report("views", {"views": table("Views of 32 px", rows, "views/s")}, options)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moco.command import cli
from moco.config import TrainConfig

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "torchvision", "pytorch-lightning", "timm", "pillow", "numpy", "lightly")


def clock(way: Callable[[], Any]) -> float:
    """Return the seconds that one call takes, with a GPU's queue empty before and after."""
    wait()
    start = time.perf_counter()
    way()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Wait until a GPU's queue is empty."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleave(
    ways: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    measure: Callable[[Callable[[], Any]], float] = clock,
) -> dict[str, list[float]]:
    """Let the ways take turns, A B C A B C, and return the seconds of every turn.

    Args:
        ways: Name to what is called.
        rounds: Turns of each that count.
        warmup: Turns of each before them.
        measure: Calls a way and returns its seconds; for ways that time themselves
            `lambda way: way()`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warmup, rounds):
        for name, way in ways.items():
            taken = measure(way)
            if turn >= 0:
                seconds[name].append(taken)
        progress(f"warm-up {turn + warmup + 1}" if turn < 0 else f"round {turn + 1} of {rounds}")
    return seconds


def progress(text: str) -> None:
    """Say on standard error where the run stands."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Row:
    """One way's line in a table.

    Attributes:
        name: Of the way.
        seconds: Of its turns.
        work: Images (or other things) of one turn: rates are work / seconds.
        against: Rows that this one is compared with, each with the ratio that is claimed;
            None claims nothing.
        bound: Rate that cannot be exceeded, in the table's unit.
    """

    name: str
    seconds: list[float]
    work: float = 1.0
    against: dict[str, float | None] = field(default_factory=dict)
    bound: float | None = None
    rates: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rates = [self.work / taken for taken in self.seconds]

    @property
    def median(self) -> float:
        """Rate of the median turn."""
        return self.work / statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """Return the lower and upper quartile of the rates."""
        return quartiles(self.rates)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and upper quartile, between the values as NumPy places them."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def figures(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Work out what a table shows, by name of the row: rates, ratios of medians, shares."""
    known = {row.name: row for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry: dict[str, Any] = {
            "median": _short(row.median),
            "quartiles": [_short(value) for value in row.quartiles()],
            "rounds": len(row.seconds),
        }
        if row.bound is not None:
            entry["share_of_bound"] = _short(row.median / row.bound)
        if row.against:
            entry["against"] = {
                other: _compare(row, known[other], target) for other, target in row.against.items()
            }
        found[row.name] = entry
    return found


def _compare(row: Row, base: Row, target: float | None) -> dict[str, Any]:
    """Return the ratio of the medians, and the quartiles of the ratios within single rounds, which
    tell how far the noise goes.
    """
    pairs = [a / b for a, b in zip(row.rates, base.rates, strict=True)]
    ratio = row.median / base.median
    found = {"ratio": _short(ratio), "ratio_quartiles": [_short(q) for q in quartiles(pairs)]}
    return found if target is None else found | {"target": target, "reached": ratio >= target}


def _short(value: float) -> float:
    """Round to four digits, for people and for files."""
    return float(f"{value:.4g}")


def table(title: str, rows: list[Row], unit: str) -> dict[str, dict[str, Any]]:
    """Print an aligned table on standard output and return its `figures`."""
    found = figures(rows)
    others = list(dict.fromkeys(other for row in rows for other in row.against))
    bound = any(row.bound is not None for row in rows)
    lines = [["", unit, "quartiles"]]
    lines[0] += [cell for other in others for cell in (f"x {other}", "target")]
    lines[0] += ["of bound"] if bound else []
    for name, entry in found.items():
        low, high = entry["quartiles"]
        line = [name, _rate(entry["median"]), f"{_rate(low)} to {_rate(high)}"]
        for other in others:
            line += _ratio(entry.get("against", {}).get(other))
        if bound:
            share = entry.get("share_of_bound")
            line.append("" if share is None else f"{100 * share:.0f} %")
        lines.append(line)
    print(f"\n{title}")
    print_columns(lines)
    return found


def _ratio(compared: dict[str, Any] | None) -> tuple[str, str]:
    """Return the cells of a ratio and of its target."""
    if compared is None:
        return "", ""
    low, high = compared["ratio_quartiles"]
    verdict = ""
    if "target" in compared:
        verdict = f"{compared['target']:g} {'reached' if compared['reached'] else 'missed'}"
    return f"{compared['ratio']:.2f} ({low:.2f}-{high:.2f})", verdict


def print_columns(lines: list[list[str]]) -> None:
    """Print cells in columns, the first flush left; columns without a word are left out."""
    full = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in full] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def arguments(doc: str, rounds: int) -> argparse.ArgumentParser:
    """Build a parser with what every benchmark takes; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each way ({rounds})")
    parser.add_argument("--json", default="", metavar="PATH", help="where the record goes")
    return parser


def train_settings(words: list[str]) -> TrainConfig:
    """Return the settings that train.py would have with these options."""
    config, _ = cli.parse(
        cli.build_parser("train.py's options", TrainConfig, {}), TrainConfig, words
    )
    return config


def report(name: str, results: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Write the record of a run, and print the results as the last line of standard output.

    Args:
        name: Of the benchmark; the record is `benchmarks/results/NAME.json` unless `--json` says
            otherwise.
        results: Plain values.
        options: As parsed; they are part of the record.

    Returns:
        The record.
    """
    path = Path(options.json) if options.json else RESULTS / f"{name}.json"
    record = {"benchmark": name, **surroundings(), "options": vars(options), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    progress(f"record: {path}")
    print(json.dumps({"benchmark": name, **results}), flush=True)
    return record


def surroundings() -> dict[str, Any]:
    """Return what a figure means nothing without: date, code, machine, libraries, command."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "command": " ".join(["python", *sys.argv]),
    }


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Ask git about this checkout; None where there is none."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
