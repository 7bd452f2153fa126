"""Checkpoints that a thread writes while training goes on, and when they are written at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from runs import PARTS, at, run_tiny, same, trained

from moco.training import writing

pytestmark = pytest.mark.usefixtures("in_tmp")


class SlowDisk(pl.Callback):
    """Let the disk take nothing before the end of a step; note at which steps it takes a file."""

    def __init__(self, monkeypatch, until: int) -> None:
        self.until, self.may_write, self.taken = until, threading.Event(), []
        save = torch.save

        def slow(checkpoint, file) -> None:
            assert self.may_write.wait(300)
            self.taken.append((checkpoint["global_step"], self.step))
            save(checkpoint, file)

        monkeypatch.setattr(writing.torch, "save", slow)

    def on_train_batch_end(self, trainer, *args) -> None:
        self.step = trainer.global_step
        if self.step == self.until:
            self.may_write.set()


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(
    images, with_callback, monkeypatch
):
    trained(images, run_dir="whole")
    disk = SlowDisk(monkeypatch, until=5)
    with_callback(disk)
    run_tiny(images, "--run.checkpoint_every", "3")
    (saved, taken), (last, _) = disk.taken
    assert (saved, last) == (3, 6) and taken >= 5
    assert at(3, "run")["global_step"] == 3
    assert [part for part in PARTS if not same(at(3)[part], at(3, "whole")[part])] == []


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["--run.checkpoint_every", "0"], [6]),
        (["--run.checkpoint_every=-1"], [3, 6]),
        (["--run.checkpoint_every", "4"], [4, 6]),
        (["--run.checkpoint_every", "0", "--run.checkpoint_minutes", "1e-9"], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_run_saves_by_steps_by_epochs_by_the_clock_and_at_its_end(images, settings, steps):
    run_tiny(images, *settings)
    names = sorted(path.name for path in Path("run/checkpoints").glob("step_*"))
    assert names == [f"step_{step:09d}.ckpt" for step in steps]
