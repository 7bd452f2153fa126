"""A run beside other programs: how long its threads may spin while they wait for one another.

    python benchmarks/shared.py [--rounds N] [--seconds S] [--beside quiet loops torch]
                                [--ways ...] [any option of train.py]

How long threads spin is a matter of GOMP_SPINCOUNT, which the OpenMP library reads when it is
loaded; the run itself shortens it while the cores are shared (`moco/training/cores.py`), unless
that is set.

Each way is a process of its own that trains the quickstart for some seconds. The ways take turns:
alone, beside a busy Python loop per core, and beside another run as torch comes. Claims: alone at
least 95 % of the rate as torch comes, and beside others at least half of the fair share, which here
is half of that rate. The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import ROOT, Row, arguments, progress, report, table, train_settings
from moco.checks import check

AS_TORCH_COMES = "as torch comes"
DEFAULT = {"GOMP_SPINCOUNT": "300000"}  # the library's own, which keeps the run from changing it
WAYS = {
    AS_TORCH_COMES: DEFAULT,
    "ours": {},
    "100,000 turns": {"GOMP_SPINCOUNT": "100000"},
    "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BESIDE = ("quiet", "loops", "torch")
TARGETS = {"quiet": 0.95, "loops": 0.25, "torch": 0.25}  # of the rate alone, as torch comes


class Clock(pl.Callback):
    """Say when training goes at its pace, and stop after some seconds of it; tell the rate.

    Args:
        warmup: Seconds before them, in which the run notices its neighbours.
        seconds: To train for.
    """

    def __init__(self, warmup: float, seconds: float) -> None:
        self.warmup, self.seconds, self.steps = warmup, seconds, 0
        self.first = self.start = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Count a step after the warm-up."""
        now = time.perf_counter()
        self.first = self.first or now
        if now - self.first < self.warmup:
            return
        if not self.start:
            self.start = now
            print("trains", flush=True)
            return
        self.steps += 1
        if (taken := now - self.start) > self.seconds:
            print(self.steps * trainer.datamodule.config.batch_size / taken, flush=True)
            trainer.should_stop = True


def train(seconds: list[float], words: list[str]) -> None:
    """Train in this process, whose environment is set, and print the rate."""
    from moco.training.run import pretrain

    always = ["--config", str(ROOT / "configs/quickstart.yaml"), "--run.knn_every", "0"]
    always += ["--trainer.accelerator", "cpu", "--run.checkpoint_every", "1000000"]
    config = train_settings([*always, "--trainer.max_epochs", "9999", *words])
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = str(Path(folder) / "run")
        check(config)
        pretrain(config, callbacks=[Clock(*seconds)])


@contextlib.contextmanager
def running(seconds: list[float], words: list[str], way: dict[str, str]) -> Iterator[Any]:
    """Start a process that trains, wait until it does, and end it at last.

    Args:
        seconds: Of warm-up, and of training.
        words: Options of train.py.
        way: What is set in its environment.
    """
    set_here = {name for each in WAYS.values() for name in each}
    env = {name: value for name, value in os.environ.items() if name not in set_here} | way
    command = [sys.executable, __file__, "--train", *map(str, seconds), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    try:
        if process.stdout.readline() != "trains\n":
            raise RuntimeError(f"{' '.join(command)} did not come to train")
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def neighbours(beside: str, words: list[str]) -> Iterator[None]:
    """Keep the cores busy as `beside` says."""
    with contextlib.ExitStack() as stack:
        if beside == "torch":
            stack.enter_context(running([0, 1e9], words, DEFAULT))
        for _ in range((os.cpu_count() or 1) if beside == "loops" else 0):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        yield


def rate(seconds: list[float], words: list[str], way: dict[str, str]) -> float:
    """Return the images per second of a process."""
    with running(seconds, words, way) as process:
        return float(process.stdout.readline())


def main(argv: list[str]) -> dict[str, Any]:
    """Measure all ways in all company, and print a table of each."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--train", type=float, nargs=2, help="train here: warm-up and seconds")
    parser.add_argument("--warmup", type=float, default=5, help="seconds before a turn (5)")
    parser.add_argument("--seconds", type=float, default=10, help="of training in a turn (10)")
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=BESIDE, help="company")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="settings")
    options, words = parser.parse_known_args(argv)
    if options.train:
        train(options.train, words)
        return {}
    seconds = [options.warmup, options.seconds]
    taken: dict[str, dict[str, list[float]]] = {
        beside: {way: [] for way in options.ways} for beside in options.beside
    }
    for number in range(options.rounds):
        for beside, found in taken.items():
            with neighbours(beside, words):
                for name in found:
                    found[name].append(1 / rate(seconds, words, WAYS[name]))
                    progress(f"round {number + 1}, {beside}, {name}: {1 / found[name][-1]:.0f}")
    return report("shared", show(taken), options)


def show(taken: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Print a table of rates for each company, and return the figures.

    Args:
        taken: Company to way to the seconds of an image, of every turn.
    """
    alone = Row(AS_TORCH_COMES + ", quiet", taken.get("quiet", {}).get(AS_TORCH_COMES, []))
    results = {}
    for beside, found in taken.items():
        rows = [Row(name, seconds) for name, seconds in found.items()]
        if alone.seconds:
            for row in rows:
                row.against = {alone.name: TARGETS[beside]}
            rows.insert(0, alone)
        results[beside] = table(f"Beside: {beside}", rows, "images/s")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
