"""Numbers that are not finite, and collapse: what a run does then."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from runs import load, run_tiny, tensors

import train
from moco.algorithm import pretrain
from moco.config import RunError, UserError
from moco.images.bad_files import BadFiles
from moco.images.steps import StepLoader
from moco.training import guard
from moco.training.guard import NonFiniteGuard

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def nan_at(monkeypatch):
    """Make the loss of the given calls NaN."""

    def make(*numbers: int) -> None:
        calls, info_nce = [], pretrain.info_nce

        def bad(*arguments):
            calls.append(1)
            loss, logits = info_nce(*arguments)
            return (loss * float("nan") if len(calls) in numbers else loss), logits

        monkeypatch.setattr(pretrain, "info_nce", bad)

    return make


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint(images, nan_at):
    nan_at(4)
    with pytest.raises(RunError) as error:
        run_tiny(images)
    text = str(error.value)
    assert "not finite at step 4 (lr 0.005)" in text
    assert f"last good checkpoint is {Path('run/checkpoints/last.ckpt')}" in text
    assert "lower optim.lr" in text and "--resume run" in text
    assert load("run/checkpoints/last.ckpt")["global_step"] == 3
    result = train.main(["--resume", "run"])  # the fault was passing: the run goes on
    assert result["steps"] == 6


SELDOM = ["--trainer.log_every_n_steps", "1000", "--run.checkpoint_every", "100"]


@pytest.mark.parametrize(("step", "seen"), [(2, 3), (5, 6), (6, 6)])
def test_the_first_bad_step_is_named_and_never_saved(images, nan_at, step, seen, with_callback):
    """Between readings the run goes on; the end of an epoch, 3, and of the run, 6, are readings."""

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            begun.append(trainer.global_step + 1)

    begun: list[int] = []
    with_callback(Count())
    nan_at(step)
    with pytest.raises(RunError) as error:
        run_tiny(images, *SELDOM)
    assert f"not finite at step {step} (lr" in str(error.value)
    assert begun[-1] == seen
    assert not list(Path("run").rglob("*.ckpt"))
    assert "no checkpoint was written yet: lower optim.lr" in str(error.value)
    assert "start again" in str(error.value) and "--resume" not in str(error.value)
    assert run_tiny(images, *SELDOM)["steps"] == 6, "the same directory may be used again"


def test_a_checkpoint_between_readings_is_a_reading(images, nan_at):
    nan_at(2)
    with pytest.raises(RunError, match=r"not finite at step 2 .* is run/checkpoints/last\.ckpt"):
        run_tiny(images, "--trainer.log_every_n_steps", "1000")
    assert load("run/checkpoints/last.ckpt")["global_step"] == 1
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == [
        "last.ckpt",
        "step_000000001.ckpt",
    ]


def test_an_error_between_two_steps_saves_nothing_that_is_not_finite(
    images, nan_at, monkeypatch, said
):
    batches = StepLoader._batches

    def broken(self, *arguments):
        yield from itertools.islice(batches(self, *arguments), 2)
        raise UserError("the images went away")

    monkeypatch.setattr(StepLoader, "_batches", broken)
    nan_at(2)
    with pytest.raises(UserError, match="the images went away"):
        run_tiny(images, *SELDOM)
    assert not list(Path("run").rglob("*.ckpt"))
    assert any("not saved after step 2: loss or gradient is not finite" in line for line in said)


def test_weights_that_overflow_reach_no_checkpoint(images, monkeypatch):
    monkeypatch.setattr("moco.checks.check_ranges", lambda *_: None)  # it refuses such rates
    with pytest.raises(RunError, match="not finite"):
        run_tiny(images, "--optim.lr", "1e20", "--optim.weight_decay", "1e30")
    for path in Path("run").rglob("*.ckpt"):
        assert all(t.isfinite().all() for t in tensors(load(path)["state_dict"]))


def test_an_optimiser_that_overflows_reaches_no_checkpoint(images, monkeypatch):
    """AdamW's variance may be infinite while the weights, which it divides, are finite."""
    step = torch.optim.AdamW.step

    def overflow(self, closure=None):
        result = step(self, closure)
        next(iter(self.state.values()))["exp_avg_sq"].fill_(float("inf"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(RunError, match="weights are not finite after step 1"):
        run_tiny(images, "--optim.name", "adamw")
    assert not list(Path("run").rglob("*.ckpt"))


def _guarded_on_rank(bad_rank: int, what: str) -> tuple[str, int]:
    """Train on two ranks with a reading after every second step; one rank's third step is bad."""
    from steps import MODEL, as_rank, make_batches, make_module, make_views

    rank, world = as_rank()
    module = make_module(MODEL)
    batches = make_batches(make_views(16, steps=6), world, rank, True, False)
    if rank == bad_rank and what == "images":
        batches[2].query_views[0][0] = float("nan")
        batches[2].key_views[0][0] = float("nan")
    info_nce, calls = pretrain.info_nce, []

    def infinite(*arguments):  # by a constant, so that the gradients stay finite
        calls.append(1)
        loss, logits = info_nce(*arguments)
        return loss + (float("inf") if len(calls) == 3 else 0), logits

    class Sometimes(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.wants_metrics = batch_idx % 2 == 1

    module.steps_per_epoch = module.total_steps = 6
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=DDPStrategy(broadcast_buffers=False),
        max_epochs=1, logger=False, callbacks=[NonFiniteGuard(Path("none")), Sometimes()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    if rank == bad_rank and what == "loss":
        pretrain.info_nce = infinite
    try:
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    except RunError as error:
        return str(error), trainer.global_step
    finally:
        pretrain.info_nce = info_nce
    return "", trainer.global_step


@pytest.mark.parametrize("what", ["images", "loss"])
def test_all_ranks_stop_together_at_what_is_bad_on_one(two_ranks, what):
    (said_0, step_0), (said_1, step_1) = two_ranks.run(_guarded_on_rank, 1, what)
    assert said_0 == said_1 and step_0 == step_1 == 4
    assert "not finite at step 3 (lr" in said_0


def test_collapse_is_a_warning_with_causes_after_a_while(said):
    fake = SimpleNamespace(wants_metrics=True, global_step=7, is_global_zero=True)
    watch = guard.Watch(BadFiles(None, 0, None))
    low, high = torch.tensor(0.01), torch.tensor(0.9)
    for spread in [low] * (guard.COLLAPSED_READINGS - 1) + [high]:
        fake.metrics = {"train/spread": spread}
        watch.on_train_batch_end(fake, fake)
    assert not said, "shortly low is no collapse"
    fake.metrics = {"train/spread": low}
    for _ in range(guard.COLLAPSED_READINGS - 1):
        watch.on_train_batch_end(fake, fake)
    assert not said, "a reading above starts the count anew"
    for _ in range(guard.COLLAPSED_READINGS):
        watch.on_train_batch_end(fake, fake)
    assert len(said) == 1, "said once"
    for cause in ("optim.lr", "model.key_momentum", "model.temperature", "data.crop_min"):
        assert cause in said[0]
