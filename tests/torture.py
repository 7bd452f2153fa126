"""Torture: kill short runs at random moments, resume each until it is done, compare the ends.

    python tests/torture.py --kills 30 --seed 0          (or: make torture)

Signals 9, TERM and INT come at random moments: while a run starts, trains, saves or has just been
resumed. Every run must end with the weights, queue, optimiser and metrics of one left alone, every
exit code must say what happened, and no traceback may appear. Processes are forks of this one, so
that each has its own address space and signals but does not import torch again.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a fork after a thread pool would hang
os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import timm
import torch
from pictures import write_pictures

import moco.training.run  # noqa: F401  imported before the forks
import train
from moco.command import cli

ROOT = Path(__file__).parent.parent
TIMED = ("train/images_per_second", "train/wait_share")
PARTS = ("state_dict", "optimizer_states", "plateau", "epoch_loss", "global_step")
KILLS_A_RUN = 6
LIMIT_S = 300  # for one process, which is taken for hung after it
EXPECTED = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130,)}
COMMON = [
    *("--model.backbone", "resnet10t", "--model.stem", "cifar", "--model.width", "0.125"),
    *("--model.embedding_dim", "16", "--model.queue_size", "100", "--data.batch_size", "16"),
    *("--data.image_size", "16", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--trainer.log_every_n_steps", "1", "--run.knn_every", "1", "--run.knn_k", "5"),
    *("--run.checkpoint_every", "4", "--optim.schedule", "plateau"),
    *("--run.report", "false"),
]


def recipes(folder: Path) -> dict[str, list[str]]:
    """Return the options of runs of many kinds on 112 generated images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 56), ("test", 8)):
        for name in ("a", "b"):
            names = [f"{i}.png" for i in range(count)]
            write_pictures(folder / split / name, names, rng, small=4)
    data = [*COMMON, "--data.dataset", "folder", "--data.root", str(folder)]
    resident = [*data, "--data.resident", "memory"]
    streamed = [*data, "--data.resident", "off", "--data.num_workers", "1"]
    in_batch = ["--model.queue_size", "0", "--model.head", "mlp_bn", "--model.predictor", "mlp"]
    return {
        "resident": resident,
        "streamed": streamed,
        "accumulating": [*streamed, "--trainer.accumulate_grad_batches", "2"],
        "symmetric": [*resident, "--model.symmetric", "mean", "--model.queues", "2"],
        "bf16": [*resident, "--trainer.precision", "bf16-mixed", "--optim.name", "muon"],
        "dropout": resident,  # `start` builds the network with it
        "v3": [*resident, *in_batch, "--model.symmetric", "sum", "--optim.name", "lars"],
        "ranks": [*resident, "--trainer.devices", "2", "--model.key_bn", "shuffle"],
    }


def start(arguments: list[str], log: Path, drops: bool = False) -> int:
    """Fork a process that runs train.py with `arguments`; return its id.

    Args:
        drops: Whether the network drops features and paths at random.
    """
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGQUIT)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]  # with which the launcher starts ranks
    if drops:
        timm.create_model = partial(timm.create_model, drop_rate=0.3, drop_path_rate=0.3)
    code = 70
    try:
        cli.run_main(train.main)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a process that long; return its exit code, negative for a signal, or None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def finish(pid: int, log: Path) -> int:
    """Wait for the end; a process that does not end is killed, and that is a failure."""
    code = wait(pid, LIMIT_S)
    if code is None:
        os.kill(pid, signal.SIGQUIT)  # the log then says where each thread is
        time.sleep(1)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise SystemExit(f"a process hung for {LIMIT_S} s:\n{log.read_text()}")
    return code


def same(a: Any, b: Any) -> bool:
    """Tell whether two nested states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


def differences(one: Path, other: Path) -> list[str]:
    """Name what differs between the ends of two runs."""
    a, b = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)
    )
    found = [part for part in PARTS if not same(a[part], b[part])]
    first, second = (
        [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(text)]
        for text in ((run / "metrics.csv").read_text().splitlines() for run in (one, other))
    )
    rows = [f"{x} {y}" for x, y in zip(first, second, strict=False) if x != y]
    if len(first) != len(second):
        rows.append(f"{len(first)} and {len(second)} rows")
    return found + [f"metrics.csv: {row}" for row in rows[:2]]


def lock_of(options: list[str]) -> str:
    """Return the path of the lock of a run, which the refusal of a second run names last."""
    return str(Path(options[options.index("--run.dir") + 1]) / ".lock")


def run_killed(
    options: list[str], kills: list[int], longest: float, log: Path, chance, drops: bool
) -> int:
    """Start a run again and again until it is done, killing it with each of `kills` in turn.

    Returns:
        How many kills hit it before it was done.
    """
    hits = 0
    while True:
        pid = start(options, log, drops)
        code = wait(pid, chance.uniform(0, longest)) if hits < len(kills) else finish(pid, log)
        if code is None:
            number = kills[hits]
            os.kill(pid, number)
            code = finish(pid, log)
            if code not in (*EXPECTED[number], 0):
                raise SystemExit(f"exit code {code} after signal {number}:\n{log.read_text()}")
        elif code == 2 and log.read_text().rstrip().endswith("remove " + lock_of(options) + ")"):
            time.sleep(0.1)  # ranks end a moment after their launcher was killed
            continue
        elif code:
            raise SystemExit(f"a run ended by itself with {code}:\n{log.read_text()}")
        if code == 0:
            return hits
        hits += 1


def torture(folder: Path, kills: int, epochs: int, seed: int) -> None:
    """Kill until `kills` processes have died; raise SystemExit at the first difference."""
    chance = random.Random(seed)
    log, done, runs = folder / "log.txt", 0, 0
    chosen = recipes(folder / "images")
    whole: dict[str, tuple[Path, float]] = {}
    while done < kills:
        name = list(chosen)[runs % len(chosen)]
        options = [*chosen[name], "--trainer.max_epochs", str(epochs), "--run.dir"]
        if name not in whole:
            begin = time.monotonic()
            whole[name] = folder / f"whole-{name}", 0.0
            left = [*options, str(whole[name][0])]
            if code := finish(start(left, log, name == "dropout"), log):
                raise SystemExit(f"the run left alone ended with {code}:\n{log.read_text()}")
            whole[name] = whole[name][0], time.monotonic() - begin
        left_alone, seconds = whole[name]
        run, runs = folder / f"run-{runs}", runs + 1
        numbers = [list(EXPECTED)[n % 3] for n in range(done, min(kills, done + KILLS_A_RUN))]
        # The longest wait is a third of the whole run, so a run is killed several times.
        resumed = [*options, str(run), "--resume", "auto"]
        drops = name == "dropout"
        done += run_killed(resumed, numbers, seconds / 3, log, chance, drops)
        if found := differences(left_alone, run):
            raise SystemExit(
                f"{name} run {run} differs from the one left alone: {found}\n{log.read_text()}"
            )
        shutil.rmtree(run)
    if "Traceback" in (text := log.read_text()):
        raise SystemExit(f"a traceback appeared:\n{text}")
    print(f"{done} kills over {runs} runs: every run ended as if left alone")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Kill short runs and compare how they end.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=12, help="length of each run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        torture(folder, options.kills, options.epochs, options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
