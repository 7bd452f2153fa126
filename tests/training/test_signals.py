"""Signals before the first step and after a run, and checkpoints of a run that went back."""

from __future__ import annotations

import itertools
import shutil
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from processes import finish, start
from runs import TINY, run_tiny, trained

import train
from moco.images import loader
from moco.training import saving
from moco.training.writing import AtomicCheckpointIO

pytestmark = pytest.mark.usefixtures("in_tmp")

SIGTERM_IN_A_READING = """
import signal
from moco.command import cli
from moco.training import monitor
import train
read = monitor.KNNMonitor.read
def interrupted(self, *arguments, **options):
    read(self, *arguments, **options)
    signal.raise_signal(signal.SIGTERM)
monitor.KNNMonitor.read = interrupted
cli.run_main(train.main)
"""


def test_no_handler_is_left_after_a_run(images):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a test before may have left torch's
    before = [signal.getsignal(number) for number in numbers]
    run_tiny(images, "--trainer.max_steps", "1")
    assert [signal.getsignal(number) for number in numbers] == before


class HangUp(pl.Callback):
    """Close the terminal in the first step."""

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 0:
            signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_stops_the_run_unless_hangups_are_ignored(
    images, with_callback, is_ignored
):
    with_callback(HangUp())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        result = run_tiny(images, "--trainer.max_epochs", "1")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result["steps"], result.get("stopped_by")) == ((3, None) if is_ignored else (1, 1))
    assert torch.load(result["checkpoint"], weights_only=True)["global_step"] == result["steps"]


def test_a_signal_during_the_first_reading_stops_after_the_first_step(tmp_path):
    """The untrained network is read before the first step, and that may take minutes."""
    script = tmp_path / "interrupted.py"
    script.write_text(SIGTERM_IN_A_READING)
    digits = ["--data.dataset", "digits", "--run.knn_every", "1", "--data.upscale", "2"]
    process = start(*TINY, *digits, "--data.resident", "auto", "--run.dir", "run", script=script)
    code, _, err = finish(process)
    assert code == 143, err
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 1


INTERRUPT = """
import signal, sys
from moco.command import cli
import train
number, place = signal.Signals(int(sys.argv.pop(1))), sys.argv.pop(1)

class Loses:
    # Some libraries, and Python's own imports, lose what is raised within them.
    def find_spec(self, name, *_):
        if name == "moco.training.hardware":
            try:
                signal.raise_signal(number)
            except BaseException:
                pass

def interrupted(self):
    signal.raise_signal(number)
    return train_dataloader(self)

if place == "import":
    sys.meta_path.insert(0, Loses())
else:
    from moco.images.loader import PretrainData
    train_dataloader = PretrainData.train_dataloader
    PretrainData.train_dataloader = interrupted
cli.run_main(train.main)
"""


@pytest.mark.parametrize("place", ["import", "Lightning's set-up"])
@pytest.mark.parametrize(("number", "by"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_before_training_ends_at_once_with_its_code_and_one_line(
    images, tmp_path, number, by, place
):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPT)
    words = [str(int(number)), place, *TINY, "--data.root", str(images), "--run.dir", "run"]
    code, out, err = finish(start(*words, script=script))
    assert (code, out) == (128 + number, ""), err
    assert err.splitlines()[-1] == f"stopped by {by}"
    assert "Traceback" not in err and "finishing" not in err
    assert not list(Path("run").glob("checkpoints/*.ckpt"))


class PressCtrlC(pl.Callback):
    """Press Ctrl-C some times in a step, or before the first with step 0."""

    def __init__(self, step: int, times: int) -> None:
        self.step, self.times = step, times

    def on_train_start(self, *args) -> None:
        if self.step == 0:
            signal.raise_signal(signal.SIGINT)

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture
def default_ctrl_c():
    """Have Ctrl-C answered as Python does by itself, and leave it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_answered_at_once_and_saves(images, with_callback, default_ctrl_c, capfd):
    with_callback(PressCtrlC(step=2, times=1))
    result = run_tiny(images)
    assert (result["steps"], result["stopped_by"]) == (2, signal.SIGINT)
    err = capfd.readouterr().err
    assert err.count("finishing the step, then saving; Ctrl-C again stops now\n") == 1


def test_a_second_ctrl_c_does_not_wait_and_names_the_way_back(
    images, with_callback, default_ctrl_c
):
    with_callback(PressCtrlC(step=2, times=2))
    with pytest.raises(KeyboardInterrupt, match="go on after step 1 with --resume run"):
        run_tiny(images)
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


def test_a_second_ctrl_c_before_a_checkpoint_names_no_way_back(
    images, with_callback, default_ctrl_c
):
    with_callback(PressCtrlC(step=1, times=2))
    with pytest.raises(KeyboardInterrupt, match="^$"):
        run_tiny(images)


def test_ctrl_c_before_the_first_step_does_not_wait_for_it(
    images, with_callback, default_ctrl_c, capfd
):
    with_callback(PressCtrlC(step=0, times=1))
    with pytest.raises(KeyboardInterrupt, match="^$"):
        run_tiny(images)
    assert "finishing" not in capfd.readouterr().err
    assert not list(Path("run").glob("checkpoints/*.ckpt"))


def test_checkpoints_of_a_run_that_went_back_stay(images, monkeypatch):
    trained(images)
    kept: list[tuple[str, set[str]]] = []
    tidy = saving.Checkpoints._tidy

    def watched(self, also: list[str], path: Path) -> None:
        tidy(self, also, path)
        kept.append((path.name, {p.name for p in self.directory.glob("step_*")}))

    monkeypatch.setattr(saving.Checkpoints, "_tidy", watched)
    shutil.copy("run/checkpoints/step_000000001.ckpt", "first.ckpt")
    shutil.copytree("run", "back", copy_function=shutil.copy2)
    train.main(["--resume", "back/checkpoints/step_000000001.ckpt", "--run.keep_checkpoints", "2"])
    assert len(kept) == 5 and all(len(names) == 2 for _, names in kept)
    assert all(name in names for name, names in kept)


def test_a_save_that_failed_is_not_told_as_one(images, monkeypatch):
    """The images fail between two steps while the disk is full, so nothing can be saved."""
    said: list[str] = []
    monkeypatch.setattr(saving.log, "info", lambda text, *values: said.append(text))

    class Full(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            pass

    monkeypatch.setattr("moco.training.build.AtomicCheckpointIO", Full)

    batches = loader.StepLoader._batches

    def broken(self, *arguments):
        yield from itertools.islice(batches(self, *arguments), 2)
        raise saving.UserError("the images went away")

    monkeypatch.setattr(loader.StepLoader, "_batches", broken)
    with pytest.raises(saving.UserError):
        run_tiny(images)
    assert said and not any("saved after step" in text for text in said)
