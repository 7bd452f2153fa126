"""A run of `stable` with minutes in the place of epochs ends in time, its decay done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import yaml
from runs import TINY, assert_same_end, at, copy_until, load, main_on_rank, run_tiny

import train
from moco import distributed
from moco.algorithm.optim import decay_start, learning_rate
from moco.config import OptimConfig, UserError
from moco.training import clock, metrics, run, saving
from moco.training.rehearsal import Pace
from moco.training.replay import replay

pytestmark = pytest.mark.usefixtures("in_tmp")
STABLE = ["--optim.schedule", "stable", "--optim.decay_share", "0.25", "--optim.warmup_epochs", "1"]
BY_CLOCK = [*STABLE, "--trainer.max_epochs", "auto"]
MINUTES = ["--run.minutes", "2.05"]  # 123 s


class Machine(pl.Callback):
    """A machine whose steps take the given seconds, by a clock of its own."""

    def __init__(self, *paces: float) -> None:
        self.paces, self.now = paces, 0.0

    def on_train_batch_start(self, trainer, *_) -> None:
        self.now += self.paces[min(trainer.global_step, len(self.paces) - 1)]

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let the next runs of train.py be timed by it, and their rehearsals take no time."""
        told = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: 0.0)
        patch.setattr(metrics, "time", told)
        patch.setattr(saving, "time", told)  # so that a checkpoint takes none
        patch.setattr(run, "rehearse", lambda *_: Pace(self.paces[0], 0.0, 1))
        real = run.pretrain
        patch.setattr(run, "pretrain", lambda *a, **k: real(*a, **k, callbacks=[self]))


def on_machine(*paces: float, words: list[str]) -> dict:
    """Run train.py on such a machine."""
    with pytest.MonkeyPatch.context() as patch:
        Machine(*paces).install(patch)
        return train.main(words)


def asked(images, *words: str, run_dir: str = "run") -> list[str]:
    return [*TINY, "--data.root", str(images), "--run.dir", run_dir, *BY_CLOCK, *MINUTES, *words]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Train for 2.05 minutes at ten seconds a step, and for as many steps said beforehand."""
    folder = tmp_path_factory.mktemp("clock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        on_machine(10.0, words=asked(images, run_dir="clock"))
        run_tiny(images, *STABLE, "--trainer.max_epochs", "4", run_dir="epochs")
    return folder


def test_it_is_the_run_of_the_epochs_that_it_came_to(runs):
    assert_same_end(str(runs / "clock"), str(runs / "epochs"))
    assert load(runs / "clock/checkpoints/before_decay.ckpt")["global_step"] == 9
    content = yaml.safe_load((runs / "clock/config.yaml").read_text())
    assert (content["trainer"]["max_epochs"], content["trainer"]["max_steps"]) == ("auto", -1)
    assert content["decided"]["settings"]["trainer.max_steps"] == 12
    assert content["decided"]["settings"]["trainer.max_epochs"] == 4
    assert "fixed after step 9" in content["decided"]["reasons"]["trainer.max_steps"]


@pytest.mark.parametrize(
    ("paces", "steps", "start"),
    [
        ((4.0,), 30, 22),
        ((20.0,), 6, 4),
        ((5.0,) * 4 + (20.0,), 9, 7),  # a neighbour came
        ((20.0,) * 2 + (4.0,), 22, 16),  # one left
        ((50.0, 4.0), 19, 14),  # the first step compiles
    ],
)
def test_it_ends_in_time_whatever_the_speed(images, paces, steps, start):
    found = on_machine(*paces, words=asked(images))
    assert (found["steps"], load("run/checkpoints/before_decay.ckpt")["global_step"]) == (
        steps,
        start,
    )
    spent = sum(paces[min(step, len(paces) - 1)] for step in range(steps))
    assert 123 - 2 * paces[-1] < spent < 123
    rates = [at(step)["optimizer_states"][0]["param_groups"][0]["lr"] for step in (start, steps)]
    assert rates == [0.01, pytest.approx(0.01 / (steps - start))]


def test_a_first_step_beyond_the_minutes_lets_the_rate_fall_at_once(images):
    assert on_machine(200.0, 4.0, words=asked(images))["steps"] == 3
    assert load("run/checkpoints/before_decay.ckpt")["global_step"] == 2


@pytest.mark.parametrize("step", [9, 10, 11])
def test_what_is_fixed_stays_on_a_slower_machine(runs, step):
    assert (
        on_machine(500.0, words=["--resume", copy_until(runs / "clock", step, decay=9)])["steps"]
        == 12
    )
    assert_same_end("run", str(runs / "clock"))


@pytest.mark.parametrize(("pace", "steps"), [(10.0, 12), (30.0, 8)])
def test_time_before_a_resume_counts(runs, said, pace, steps):
    """The same machine fixes the same step; a slower one another, which is said."""
    assert (
        on_machine(pace, words=["--resume", copy_until(runs / "clock", 5, decay=9)])["steps"]
        == steps
    )
    assert any("after step 5 the run has 1.2 of its 2.05 minutes left" in line for line in said)
    content = yaml.safe_load(Path("run/config.yaml").read_text())
    assert content["decided"]["settings"]["trainer.max_steps"] == steps
    if steps == 12:
        assert_same_end("run", str(runs / "clock"))


def test_more_minutes_lengthen_it_before_and_epochs_after(runs):
    run_dir = copy_until(runs / "clock", 5, decay=9)
    with pytest.raises(UserError, match="the clock has not fixed yet how long the run is: give it"):
        train.main(["--resume", run_dir, "--extend", "1"])
    found = on_machine(10.0, words=["--resume", run_dir, "--run.minutes", "4.05"])
    assert found["steps"] == 24
    assert on_machine(9.0, words=["--resume", run_dir, "--extend", "2"])["steps"] == 30
    assert load("run/checkpoints/before_decay.ckpt")["global_step"] == 22


def test_few_minutes_let_the_rate_fall_at_once(runs):
    run_dir = copy_until(runs / "clock", 5, decay=9)
    assert on_machine(10.0, words=["--resume", run_dir, "--run.minutes", "0.1"])["steps"] == 8
    assert load("run/checkpoints/before_decay.ckpt")["global_step"] == 6


def on_own_machine(paces: tuple[float, float], words: list[str], folder: str) -> tuple[dict, str]:
    """Run on a rank whose machine has a pace of its own; return what it ended with."""
    with pytest.MonkeyPatch.context() as patch:
        Machine(paces[distributed.rank()]).install(patch)
        return main_on_rank("train", words, folder)


def test_ranks_fix_the_same_step(two_ranks, images, tmp_path):
    words = [*asked(images), "--model.key_bn", "plain"]
    (found, _), _ = two_ranks.run(on_own_machine, (10.0, 30.0), words, str(tmp_path))
    assert found["steps"] == 12  # as rank 0 decides
    assert at(12)["global_step"] == 12


def test_the_step_of_the_decay_gives_the_length():
    for share in (0.01, 0.2, 0.34, 0.5, 0.9):
        config = OptimConfig(schedule="stable", decay_share=share)
        for step in range(1, 300):
            total = clock.longest(config, step)
            assert decay_start(config, total) == step
            assert total - step == pytest.approx(share * total, abs=1)


def test_the_decay_does_not_wait_for_the_warm_up():
    config = OptimConfig(schedule="stable", lr=1.0, decay_share=0.5, warmup_epochs=2)
    rates = [learning_rate(config, step, 4, 8) for step in range(8)]
    assert rates == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.5, 0.25]


def test_what_follows_from_the_length_is_refused(images):
    with pytest.raises(UserError, match="model.key_momentum_schedule is cosine, which follows"):
        train.main(asked(images, "--model.key_momentum_schedule", "cosine"))


def test_marks_stay_few_and_the_pace_is_that_of_the_last_steps():
    config = OptimConfig(schedule="stable", decay_share=0.1)
    told = SimpleNamespace(seconds=0.0)
    settings = SimpleNamespace(optim=config, run=SimpleNamespace(minutes=1e9))
    own = clock.Clock(settings, None, told, None, None)
    for step in range(1, 5001):
        told.seconds += 1.0 if step <= 4000 else 3.0
        own._mark(step)
    assert len(own._marks) <= clock.MOST_MARKS
    assert own._pace(5000) == pytest.approx(3.0)  # of the last 556


@pytest.mark.parametrize("is_fixed", [True, False])
def test_a_step_from_before_the_length_stands_is_replayed_as_it_was(images, is_fixed):
    """The rehearsal took the run for one of 3 steps, whose rate would have fallen by then."""
    on_machine(40.0, 10.0, words=asked(images))
    settings, stored = Path("run/config.yaml"), load("run/checkpoints/step_000000004.ckpt")
    assert stored["decided"]["is_open"]
    if not is_fixed:  # as where it was stopped early
        content = yaml.safe_load(settings.read_text())
        settings.write_text(yaml.safe_dump(content | {"decided": stored["decided"]}))
    for step in (3, 6):
        Path(f"run/checkpoints/step_{step - 1:09d}.ckpt").unlink()
        found = replay(Path("run"), step)
        assert found["checkpoint_step"] == step - 2 and found["exact"]
        assert found["loss"] == pytest.approx(found["logged_loss"], rel=1e-5)
