"""The rehearsal before a run: ranks agree on it, it can be stopped, and it leaves no trace."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from pictures import write_pictures
from runs import STREAMED, assert_same_end, load

import train
from moco.algorithm.pretrain import MoCo
from moco.config import RunError, UserError
from moco.distributed import rank
from moco.training import rehearsal, run
from moco.training.rehearsal import Pace

pytestmark = pytest.mark.usefixtures("in_tmp")
FOLDER = str(Path(__file__).parents[2] / "configs" / "folder.yaml")
CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--run.knn_every", "0"]
CPU += ["--run.report", "false"]
CPU += ["--optim.schedule", "cosine"]  # not by the clock: how many steps is then asked before


@pytest.fixture
def asked(tmp_path):
    """Write 40 pictures of 20 x 24 pixels, and ask for a run on them."""
    names = [f"{number:02d}.png" for number in range(40)]
    write_pictures(tmp_path / "pictures", names, np.random.default_rng(0), size=(24, 20))
    return ["--config", FOLDER, "--data.root", str(tmp_path / "pictures"), *CPU]


@pytest.fixture
def two_steps(monkeypatch):
    """A rehearsal takes two steps, and finds that ten minutes hold a quarter of an epoch."""
    real = rehearsal.rehearse

    def measured(*arguments) -> Pace:
        monkeypatch.setattr(rehearsal, "BATCHES", 2)
        return Pace(300.0, 0.0, real(*arguments).memory)

    monkeypatch.setattr("moco.training.run.rehearse", measured)


def test_a_rehearsal_ends_on_ctrl_c(asked, monkeypatch):
    def interrupted(clock, trainer, *rest) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(rehearsal._Clock, "on_train_batch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*asked, "--run.dir", "run"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path("run").exists()


def test_sigterm_is_not_lightnings_in_a_rehearsal(asked, two_steps, monkeypatch):
    real, handlers = rehearsal._Clock.on_train_batch_end, []
    before = signal.getsignal(signal.SIGTERM)

    def noted(clock, trainer, *rest) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        real(clock, trainer, *rest)

    monkeypatch.setattr(rehearsal._Clock, "on_train_batch_end", noted)
    train.main([*asked, "--run.plan", "true"])
    assert {*handlers} == {before}


def test_what_a_library_raises_in_a_rehearsal_is_explained(asked, monkeypatch):
    def full(*_) -> None:
        raise MemoryError

    monkeypatch.setattr(rehearsal._Clock, "on_train_batch_end", full)
    with pytest.raises(RunError, match="memory ran out with data.batch_size 16: lower it"):
        train.main([*asked, "--run.dir", "run"])


def test_a_run_goes_on_again_and_again_by_the_same_command_line(asked, two_steps):
    asked += ["--trainer.max_epochs", "4", "--data.image_size", "16", "--run.checkpoint_every", "1"]
    asked += ["--optim.warmup_epochs", "9", "--run.keep_checkpoints", "99"]
    train.main([*asked, "--run.dir", "whole"])
    train.main([*asked, "--run.dir", "cut"])
    before = yaml.safe_load(Path("cut/config.yaml").read_text())
    for step in (2, 4):
        for path in Path("cut/checkpoints").glob("*.ckpt"):
            if path.name != f"step_{step:09d}.ckpt":
                path.unlink()
        train.main([*asked, "--run.dir", "cut", "--resume", "auto"])
        assert_same_end("whole", "cut")
        after = yaml.safe_load(Path("cut/config.yaml").read_text())
        assert after["optim"] == before["optim"] and after["data"] == before["data"]
        settings = load("cut/checkpoints/last.ckpt")["decided"]["settings"]
        assert settings["optim.warmup_epochs"] == 0.4


def test_a_run_has_the_memory_of_its_rehearsal(asked, two_steps, monkeypatch):
    """On a GPU a captured step holds as much as the run's own."""
    built, alive = [], []
    real, assemble = run.build_module, run.assemble

    def build(*arguments):
        built.append(weakref.ref(module := real(*arguments)))
        return module

    def look(*arguments, **options):
        alive.extend(module() is not None for module in built)
        return assemble(*arguments, **options)

    monkeypatch.setattr(run, "build_module", build)
    monkeypatch.setattr(run, "assemble", look)
    train.main([*asked, "--run.dir", "run"])
    assert alive == [False, True]


class _Trainer:
    """Stand in for Lightning's, on a GPU."""

    strategy = SimpleNamespace(
        root_device=torch.device("cuda"), reduce_boolean_decision=lambda decision, all: decision
    )
    should_stop = False


def test_the_host_waits_for_a_gpu_where_the_pace_is_read(monkeypatch):
    """Between two readings it goes ahead, as in a run."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(clock.ends)))
    clock, trainer = rehearsal._Clock(SimpleNamespace(wait_seconds=0.0)), _Trainer()
    while not trainer.should_stop:
        clock.on_train_batch_end(trainer)
    assert waits == [0, 1, 2, 3, 4, rehearsal.BATCHES - 1] and len(clock.ends) == rehearsal.BATCHES


def test_ranks_take_one_pace(two_ranks):
    assert two_ranks.run(_pace_on_rank) == [(0.5, 0.25, 7)] * 2


def _pace_on_rank() -> tuple[float, float, int]:
    found = rehearsal.agreed(Pace(0.5 + rank(), 0.25, 7 + rank()))
    return found.seconds, found.wait_share, found.memory


def test_a_plan_with_bad_files_leaves_nothing_behind(asked, two_steps):
    root = Path(asked[3])
    (root / "07.png").write_bytes(b"no picture")
    for how in ([], STREAMED):
        before = sorted(Path().rglob("*"))
        asked += ["--data.max_bad_fraction", "0.5", "--run.plan", "true"]
        assert train.main([*asked, *how])["plan"]["steps"]
        assert sorted(Path().rglob("*")) == before


def test_too_many_bad_files_end_a_rehearsal_too(asked, two_steps):
    for number in range(1, 40, 2):
        (Path(asked[3]) / f"{number:02d}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        train.main([*asked, *STREAMED, "--run.plan", "true"])


def test_a_rehearsal_trains_the_whole_network(asked, two_steps, monkeypatch):
    trained = []
    end = rehearsal._Clock.on_train_batch_end

    def noted(clock, trainer, module, *rest) -> None:
        first = next(module.query_encoder.backbone.parameters())
        trained.append(first in trainer.optimizers[0].state)
        end(clock, trainer, module, *rest)

    monkeypatch.setattr(rehearsal._Clock, "on_train_batch_end", noted)
    frozen = ["--optim.freeze_backbone_epochs", "1", "--optim.warmup_epochs", "0.1"]
    train.main([*asked, *frozen, "--run.plan", "true"])
    assert trained and all(trained)


def test_a_rehearsal_computes_as_the_run_will(asked, two_steps, monkeypatch):
    monkeypatch.setattr("moco.training.hardware.choose_compile", lambda *_: ("eager", "for once"))
    real, taken, compiled = MoCo.training_step, [], []

    def compile_step(module, backend, make_batch):
        compiled.append(module)
        plain = module.training_step
        module.training_step = lambda images, batch_idx: plain(make_batch(images), batch_idx)

    def noted(module, *batch):
        taken.append(module)
        assert not (module is taken[0] and module.wants_metrics)
        return real(module, *batch)

    monkeypatch.setattr(MoCo, "training_step", noted)
    monkeypatch.setattr(MoCo, "compile_step", compile_step)
    train.main([*asked, "--run.dir", "run"])
    assert {*map(id, taken)} == {*map(id, compiled)} and len(compiled) == 2
