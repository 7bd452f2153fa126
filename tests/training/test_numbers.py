"""Numbers that are not finite, and collapse: what a run does then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from runs import PARTS, at, load, run_tiny, same, tensors

import train
from moco.algorithm import pretrain
from moco.config import RunError
from moco.images.bad_files import BadFiles
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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_left_out_changes_neither_weights_nor_optimiser(images, nan_at, optimizer):
    nan_at(1, 4)
    result = run_tiny(images, "--run.skip_nonfinite", "2", "--optim.name", optimizer)
    assert result["steps"] == 6
    state = at(6)
    assert all(t.isfinite().all() for part in PARTS[:2] for t in tensors(state[part]))
    before, after = at(3), at(4)
    assert same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    moved = [k for k, v in after["state_dict"].items() if not v.equal(before["state_dict"][k])]
    assert any(name.startswith("queue.") for name in moved)
    assert not [n for n in moved if n.startswith("query_encoder") and "num_batches" not in n]
    assert not [n for n in moved if n.endswith(("running_mean", "running_var"))]


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint(images, nan_at):
    nan_at(4)
    with pytest.raises(RunError) as error:
        run_tiny(images)
    text = str(error.value)
    assert "not finite at step 4 (lr 0.005)" in text
    assert f"last good checkpoint is {Path('run/checkpoints/last.ckpt')}" in text
    assert "--run.skip_nonfinite" in text
    assert load("run/checkpoints/last.ckpt")["global_step"] == 3
    result = train.main(["--resume", "run"])  # the fault was passing: the run goes on
    assert result["steps"] == 6


def test_the_count_of_steps_left_out_survives_a_resume(images, nan_at):
    nan_at(2, 4)
    with pytest.raises(RunError, match="step 4"):
        run_tiny(images, "--run.skip_nonfinite", "1")
    nan_at(1)
    with pytest.raises(RunError, match="step 4"):
        train.main(["--resume", "run"])


def test_weights_that_overflow_reach_no_checkpoint(images):
    with pytest.raises(RunError, match="not finite"):
        run_tiny(images, "--optim.lr", "1e20", "--optim.weight_decay", "1e30")
    for path in Path("run").rglob("*.ckpt"):
        assert all(t.isfinite().all() for t in tensors(load(path)["state_dict"]))


def _guarded_on_rank(allowed: int, bad_rank: int, what: str):
    """Train four steps on two ranks; at the third, one rank's images or loss are not finite."""
    from steps import MODEL, as_rank, make_batches, make_module, make_views

    rank, world = as_rank()
    module = make_module(MODEL)
    batches = make_batches(make_views(16, steps=4), world, rank, True, False)
    if rank == bad_rank and what == "images":
        batches[2].query_views[0][0] = float("nan")
        batches[2].key_views[0][0] = float("nan")
    info_nce, calls, states = pretrain.info_nce, [], []

    def infinite(*arguments):  # by a constant, so that the gradients stay finite
        calls.append(1)
        loss, logits = info_nce(*arguments)
        return loss + (float("inf") if len(calls) == 3 else 0), logits

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            states.append({k: v.numpy().copy() for k, v in module.state_dict().items()})

    module.steps_per_epoch = module.total_steps = 4
    guard = NonFiniteGuard(allowed, Path("none"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=DDPStrategy(broadcast_buffers=False),
        max_epochs=1, logger=False, callbacks=[guard, Keep()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    if rank == bad_rank and what == "loss":
        pretrain.info_nce = infinite
    try:
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    except RunError as error:
        return str(error), states
    finally:
        pretrain.info_nce = info_nce
    return "", states


@pytest.mark.parametrize(("allowed", "what"), [(0, "images"), (1, "images"), (1, "loss")])
def test_all_ranks_leave_out_what_is_bad_on_one(two_ranks, allowed, what):
    (said_0, states_0), (said_1, states_1) = two_ranks.run(_guarded_on_rank, allowed, 1, what)
    assert said_0 == said_1
    assert ("not finite at step 3" in said_0) == (allowed == 0)
    for states in (states_0, states_1):
        for name in states[0]:
            if allowed and "num_batches" not in name:
                assert np.isfinite(states[-1][name]).all(), name
            if allowed and name.startswith("query_encoder") and "num_batches" not in name:
                assert (states[1][name] == states[2][name]).all(), name
                weight = name.endswith("weight")
                assert not weight or (states[3][name] != states[2][name]).any()


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
