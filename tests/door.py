"""Small runs from Python, and how they are resumed and compared."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import numpy as np
from runs import assert_same_end
from steps import as_rank

import moco

TINY = {
    **{"model.backbone": "resnet10t", "model.stem": "cifar", "model.width": 0.125},
    **{"model.embedding_dim": 16, "model.queue_size": 32, "model.bn_splits": 2},
    **{"data.image_size": 16, "data.batch_size": 16, "optim.lr": 0.01, "run.knn_every": 0},
    **{"trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.max_epochs": 2},
    **{"run.checkpoint_every": 1, "run.keep_checkpoints": 99, "run.report": False},
}
STREAMED = {"data.resident": "off", "data.num_workers": 2}
PIXELS = np.random.default_rng(0).integers(0, 255, (48, 20, 20, 3), dtype=np.uint8)


def pretrain(images, run_dir="run", **settings):
    return moco.pretrain(images, dir=run_dir, **{**TINY, **settings})


def assert_resumes(images, run_dir="run", step=2, **given):
    """Go on from the middle of an epoch, in a copy of the run, and compare the ends."""
    shutil.copytree(run_dir, "again")
    checkpoint = f"again/checkpoints/step_{step:09d}.ckpt"
    run = moco.pretrain(images, resume=checkpoint, **given)
    assert run.metrics["steps"] == 6
    assert_same_end(run_dir, "again")


def pretrain_on_rank(folder: str, **given: object) -> tuple[dict, bool]:
    """Train, or go on, as the script of one rank of several; return the results."""
    as_rank()
    os.chdir(folder)
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    run = moco.pretrain(PIXELS, **given)
    return run.metrics, run.encoder is not None
