"""Settings of small runs, and functions that run them and compare how they end."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os

import torch
from steps import as_rank

import train

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


def run_tiny(root, *arguments: str, run_dir: str = "run") -> dict:
    return train.main([*TINY, "--data.root", str(root), "--run.dir", run_dir, *arguments])


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


def assert_same_end(first: str, second: str) -> None:
    a, b = load(f"{first}/checkpoints/last.ckpt"), load(f"{second}/checkpoints/last.ckpt")
    assert [part for part in PARTS if not same(a[part], b[part])] == []


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, dict | list | torch.Tensor) for t in tensors(v)]
