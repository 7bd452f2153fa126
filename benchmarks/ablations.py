"""The papers' ablations in small: one setting changed at a time, all in equal time.

    python benchmarks/ablations.py --root CIFAR10_FOLDER [--steps 975] [--seeds 1] [--rows FILE]
                                   [--only NAME ...] [--words NAME=VALUE ...]

Trains `configs/cifar10_cpu.yaml` for `--steps` optimiser steps (975 are 5 epochs), and with one
setting changed for as many steps as take the same time, and prints kNN (k 200, T 0.1, backbone)
beside what the setting's paper found. A step's cost is the processor's time of short runs that take
turns, with views that grow as in the long ones. The seconds of the long runs follow one another, so
that other work on the machine makes them differ more than the costs do.

One thread, bf16. With `--rows FILE` each run is written there when it is judged, and not repeated
at the next start. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import (
    arguments,
    interleave,
    print_columns,
    progress,
    report,
    train_settings,
)
from benchmarks.loop import random_source
from benchmarks.race import RECIPE
from moco.config import DataConfig
from moco.training import run
from moco.training.own import NOTHING, Own
from moco.whole_files import whole_file

BASE = "the recipe"
PATCHES = ["--model.patches", "2", "--model.combine", "2"]
# What is changed, how, and what its paper found.
ROWS: dict[str, tuple[list[str], str]] = {
    BASE: ([], ""),
    "head of v1": (["--model.head", "linear"], "worse (2003.04297)"),
    "views of v1": (["--data.views", "v1"], "worse than v2's (2003.04297)"),
    "views of v2": (["--data.views", "v2"], "best of the two (2003.04297)"),
    "queue of 1,024": (["--model.queue_size", "1024"], "worse (1911.05722)"),
    "queue of 16,384": (["--model.queue_size", "16384"], "better (1911.05722)"),
    "key BatchNorm plain": (["--model.key_bn", "plain"], "worse: keys leak (1911.05722)"),
    "key momentum 0": (["--model.key_momentum", "0"], "fails (1911.05722)"),
    "key momentum 0.9": (["--model.key_momentum", "0.9"], "worse (1911.05722)"),
    "key momentum 0.999": (["--model.key_momentum", "0.999"], "best of a long run (1911.05722)"),
    "symmetric": (["--model.symmetric", "mean"], "better in equal epochs (2011.10566)"),
    "symmetric, two queues": (["--model.symmetric", "mean", "--model.queues", "2"], "not told"),
    "patches 2, combine 2": (PATCHES, "better (2207.08220)"),
}
COSTED = 30  # steps of a short run


class StepTimes(pl.Callback):
    """Take the processor's time from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the end of a step."""
        self.ends.append(time.process_time())


def train(
    name: str, steps: int, words: list[str], options: Any, own: Own = NOTHING
) -> tuple[dict[str, Any], float]:
    """Train a row for some steps; return what the run found and the processor seconds of a step."""
    words = [*RECIPE, *(f"--{word}" for word in options.words), *ROWS[name][0],
             *("--trainer.max_epochs", str(steps)),  # at least one step each
             "--trainer.accelerator", "cpu", "--run.report", "false",
             *("--run.knn_first", "false", "--trainer.precision", options.precision),
             *("--trainer.max_steps", str(steps), *words)]  # fmt: skip
    config = train_settings(words)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = str(Path(folder) / "run")
        found = run.pretrain(config, own=own, callbacks=[times])
    if found["steps"] != steps:
        raise RuntimeError(f"{name} took {found['steps']} steps, and not {steps}")
    return found, (times.ends[-1] - times.ends[0]) / (steps - 1)


def lengths(options: Any) -> dict[str, int]:
    """Return the steps of each row that take as long as `--steps` of the recipe."""
    own = Own(source=random_source(DataConfig(image_size=32)))
    words = ["--data.dataset", "own", "--run.held_out", "0", "--run.knn_every", "0"]
    names = [BASE, *(name for name in options.only if name != BASE)]
    ways = {name: lambda name=name: train(name, COSTED, words, options, own)[1] for name in names}
    found = interleave(ways, options.rounds, warmup=0, measure=lambda way: way())
    costs = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratios = {name: costs[BASE] / costs[name] for name in options.only}
    return {name: max(2, round(options.steps * ratio)) for name, ratio in ratios.items()}


def study(options: Any, kept: Path) -> dict[str, dict[str, Any]]:
    """Train and judge every row with every seed; return what was found, by row and seed."""
    told = {name: getattr(options, name) for name in ("root", "steps", "precision", "words")}
    content = json.loads(kept.read_text()) if kept.exists() else {"options": told, "rows": {}}
    if content["options"] != told:
        raise SystemExit(f"{kept} holds runs of {content['options']}: name another file")
    rows: dict[str, dict[str, Any]] = content["rows"]
    asked = [(name, seed) for seed in range(options.seeds) for name in options.only]
    missing = [each for each in asked if f"{each[0]}, seed {each[1]}" not in rows]
    steps = {row["name"]: row["steps"] for row in rows.values()}  # of an earlier start
    if any(name not in steps for name, _ in missing):
        steps = lengths(options) | steps
    for name, seed in missing:
        progress(f"{name}, seed {seed}, {steps[name]} steps")
        words = ["--data.root", options.root, "--run.seed", str(seed), "--run.knn_every", "1000"]
        found, cost = train(name, steps[name], words, options)
        seconds = round(cost * steps[name], 1)
        row = {"name": name, "steps": steps[name], "seconds": seconds, "knn": found["knn_top1"]}
        rows[f"{name}, seed {seed}"] = row
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
    return rows


def show(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print one line a row, with the means over its seeds; return the figures."""
    results: dict[str, Any] = {}
    lines = [["changed", "steps", "kNN", "difference", "processor s", "in its paper"]]
    for name in [name for name in ROWS if any(row["name"] == name for row in rows.values())]:
        own = [row for row in rows.values() if row["name"] == name]
        knn = [row["knn"] for row in own]
        results[name] = {"steps": own[0]["steps"], "knn": knn, "mean": statistics.mean(knn)}
        has_gain = name != BASE and BASE in results
        gain = f"{results[name]['mean'] - results[BASE]['mean']:+.1f}" if has_gain else ""
        seconds = statistics.mean(row["seconds"] for row in own)
        cells = [f"{own[0]['steps']:,}", f"{results[name]['mean']:.1f}"]
        cells += [gain, f"{seconds:.0f}", ROWS[name][1]]
        lines.append([name, *cells])
    print_columns(lines)
    return results


def main(argv: list[str]) -> dict[str, Any]:
    """Run the study on a labelled folder with train/ and test/."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--root", required=True, help="labelled folder with train/ and test/")
    parser.add_argument("--steps", type=int, default=975, help="of the recipe (975)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed", help="of all rows")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rows", default="", help="JSON file of the runs that are judged")
    parser.add_argument("--words", nargs="*", default=[], help="settings of all rows: NAME=VALUE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = study(options, Path(options.rows or Path(folder) / "rows.json"))
    return report("ablations", {"rows": show(rows)}, options)


if __name__ == "__main__":
    main(sys.argv[1:])
