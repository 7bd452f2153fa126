"""Settings of small runs, and functions that run them and compare how they end."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import torch
from steps import as_rank

import train
from moco.training import trial

TINY = [
    *("--model.backbone", "resnet10t", "--model.stem", "cifar", "--model.width", "0.125"),
    *("--model.embedding_dim", "16", "--model.queue_size", "40", "--model.bn_splits", "2"),
    *("--data.dataset", "folder", "--data.image_size", "16", "--data.batch_size", "16"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--optim.lr", "0.01"),
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--run.knn_every", "0"),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "99"),
    *("--run.report", "false"),
]


PARTS = ("state_dict", "optimizer_states", "plateau", "epoch_loss", "global_step")
STREAMED = ["--data.resident", "off", "--data.num_workers", "2"]
STORE = tempfile.TemporaryDirectory(prefix="runs-of-tests-")
kept: dict[tuple[str, ...], Path] = {}
tried: dict[tuple, list[str]] = {}


def once(encoder, config, side: int, device: str, take=trial._pass) -> list[str]:
    """Try a network once in a process: most runs of the tests have the same one.

    What fails is tried again, and the tests of the trial itself forget what was tried.
    """
    groups, channels = config.model.bn_splits, config.data.channels
    if (key := (repr(encoder), groups, channels, side, device)) not in tried:
        tried[key] = take(encoder, config, side, device)
    return tried[key]


trial._pass = once


def run_tiny(root, *arguments: str, run_dir: str = "run") -> dict:
    return train.main([*TINY, "--data.root", str(root), "--run.dir", run_dir, *arguments])


def copy_until(run: Path, last_step: int, decay: int) -> str:
    """Copy a run to `run` as it was after a step; its rate falls from the step `decay` on."""
    shutil.copytree(run, "run")
    stored = Path("run/checkpoints")
    for path in stored.glob("step_*.ckpt"):
        if int(path.stem.split("_")[1]) > last_step:
            path.unlink()
    shutil.copyfile(stored / f"step_{last_step:09d}.ckpt", stored / "last.ckpt")
    if last_step < decay:
        (stored / "before_decay.ckpt").unlink()
    return "run"


def trained(root, *arguments: str, run_dir: str = "run") -> None:
    """Leave what `run_tiny` leaves; of equal words the first run of a process is copied."""
    words = (str(root), *arguments, run_dir)
    if words in kept:
        shutil.copytree(kept[words], run_dir)
        return
    run_tiny(root, *arguments, run_dir=run_dir)
    kept[words] = shutil.copytree(run_dir, Path(STORE.name, str(len(kept))))


def main_on_rank(script: str, words: list[str], folder: str) -> tuple[dict, list[str]]:
    """Run a script's main on each rank, as under torchrun; return its result and what it said."""
    as_rank()
    os.chdir(folder)
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("moco")
    logger.addHandler(handler)
    try:
        return importlib.import_module(script).main(words), said
    finally:
        logger.removeHandler(handler)


def error_line(err: str) -> str:
    """Return the one line that tells the error; a traceback beside it fails the test."""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err, err
    return lines[0]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def at(step: int, run_dir: str = "run") -> dict:
    return load(f"{run_dir}/checkpoints/step_{step:09d}.ckpt")


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def as_after(step: int, whole: str, run_dir: str = "run") -> None:
    """Copy a run as it was after a step: with the checkpoint of that step alone."""
    shutil.copytree(whole, run_dir)
    for path in Path(run_dir, "checkpoints").iterdir():
        if path.name != f"step_{step:09d}.ckpt":
            path.unlink()


def assert_same_end(first: str, second: str) -> None:
    a, b = load(f"{first}/checkpoints/last.ckpt"), load(f"{second}/checkpoints/last.ckpt")
    assert [part for part in PARTS if not same(a[part], b[part])] == []


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, dict | list | torch.Tensor) for t in tensors(v)]
