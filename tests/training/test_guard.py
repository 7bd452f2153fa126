"""The guard against numbers that are not finite: what a step left out leaves untouched.

How whole runs stop and go on because of it: tests/test_faults.py.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from steps import make_batches, make_module, make_views
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moco.algorithm import pretrain
from moco.config import OptimConfig, RunError
from moco.training.guard import NonFiniteGuard

STEPS = 5


@pytest.fixture
def loss_at(monkeypatch):
    """Add something to the loss of one call; a constant leaves the gradients finite."""

    def make(call: int, value: float) -> None:
        calls, info_nce = [], pretrain.info_nce

        def changed(*arguments):
            calls.append(1)
            loss, logits = info_nce(*arguments)
            return (loss + value if len(calls) == call else loss), logits

        monkeypatch.setattr(pretrain, "info_nce", changed)

    return make


class Look(pl.Callback):
    """Keep weights, statistics and optimiser state after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.optimizer: list[dict[int, dict[str, Any]]] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))
        self.optimizer.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def fit(allowed: int = 9, accumulate: int = 1, plugin: Any = None, **optim: Any) -> Look:
    """Train a few steps under the guard."""
    module, look = make_module().float(), Look()
    module.optim = OptimConfig(lr=0.01, schedule="constant", weight_decay=1e-3, **optim)
    module.accumulate = accumulate
    module.steps_per_epoch = module.total_steps = STEPS
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        callbacks=[NonFiniteGuard(allowed, Path("none")), look], enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, plugins=plugin,
    )  # fmt: skip
    views = [(a.float(), b.float()) for a, b in make_views(16, steps=STEPS * accumulate)]
    batches = make_batches(views, 1, 0, True, False)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return look


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Name the parts of the state that moved, counters aside."""
    return {
        name for name, value in after.items()
        if not value.equal(before[name]) and "num_batches" not in name
    }  # fmt: skip


def half_precision() -> MixedPrecision:
    """Mixed fp16 with its gradient scaler, on a CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize("plugin", [None, half_precision], ids=["fp32", "fp16"])
def test_an_infinite_loss_with_finite_gradients_is_left_out(loss_at, plugin):
    loss_at(3, float("inf"))
    look = fit(plugin=plugin and plugin())
    moved = changed(look.states[1], look.states[2])
    assert not [name for name in moved if name.startswith("query_encoder")]
    momentum = [slot["momentum_buffer"] for slot in look.optimizer[1].values()]
    kept = [slot["momentum_buffer"] for slot in look.optimizer[2].values()]
    assert all(map(torch.Tensor.equal, momentum, kept))
    assert changed(look.states[2], look.states[3])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("plugin", [None, half_precision], ids=["fp32", "fp16"])
def test_a_first_step_left_out_leaves_no_momentum_behind(loss_at, value, plugin):
    loss_at(1, value)
    look = fit(plugin=plugin and plugin(), dampening=0.5)
    assert look.optimizer[0] == {}, "a skipped first update leaves its momentum uninitialised"
    first = fit(plugin=plugin and plugin(), dampening=0.5).optimizer[0]
    assert look.optimizer[1].keys() == first.keys(), "the second step is SGD's first"
    assert all(slot["momentum_buffer"].isfinite().all() for slot in look.optimizer[1].values())


def test_a_first_step_that_overflows_fp16_is_the_scalers_business():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
    look = fit(allowed=0, plugin=plugin)
    assert look.optimizer[0] == {}
    assert plugin.scaler.get_scale() < 2.0**40
    assert all(t.isfinite().all() for t in look.states[-1].values())


def test_gradients_that_overflow_at_any_loss_scale_stop_the_run(monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy

    def steep(*arguments):  # finite itself, but its gradient is not
        loss = cross_entropy(*arguments)
        return loss + ((loss - loss.detach()) ** 2).sqrt()

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", steep)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)
    with pytest.raises(RunError, match="at any loss scale"):
        fit(plugin=MixedPrecision("16-mixed", "cpu", scaler))


def test_the_optimiser_of_adam_counts_no_step_that_is_left_out(loss_at):
    loss_at(1, float("nan"))
    look = fit(name="adamw")
    assert {float(slot["step"]) for slot in look.optimizer[-1].values()} == {STEPS - 1}
    assert not [
        n for n in changed(look.states[0], make_module().float().state_dict()) if "query" in n
    ]


def test_accumulated_batches_are_left_out_together(loss_at):
    loss_at(5, float("nan"))  # the first batch of the third step
    look = fit(accumulate=2)
    moved = changed(look.states[3], look.states[5])
    assert not [n for n in moved if n.startswith("query_encoder")]
    assert not [n for n in moved if n.endswith(("running_mean", "running_var"))]
    assert changed(look.states[5], look.states[7])


@pytest.mark.parametrize("encoder", ["query_encoder", "key_encoder"])
def test_statistics_that_overflow_are_put_back(monkeypatch, encoder):
    """An infinite variance need not show in BatchNorm's output, nor in loss and gradients."""

    def overflow(module):
        if module.global_step == 2:
            buffers = dict(getattr(module, encoder).named_buffers())
            next(b for n, b in buffers.items() if "running_var" in n).fill_(math.inf)

    monkeypatch.setattr(pretrain.MoCo, "on_after_backward", overflow)
    look = fit()
    moved = changed(look.states[1], look.states[2])
    assert not [n for n in moved if "running" in n]
    with pytest.raises(RunError, match="step 3"):
        fit(allowed=0)


def on_a_gpu(momentum: float = 0.9) -> tuple[NonFiniteGuard, SimpleNamespace, SimpleNamespace, Any]:
    """A guard in the middle of training, on tensors that raise when the host wants to read them."""
    module = SimpleNamespace(
        query_encoder=torch.nn.Sequential(
            torch.nn.Linear(4, 4, device="cuda"), torch.nn.BatchNorm1d(4, device="cuda")
        ),
        key_encoder=torch.nn.BatchNorm1d(4, device="cuda"), accumulate=1, wants_metrics=False,
        bad_losses=torch.zeros((), device="cuda"), device=torch.device("cuda"),
    )  # fmt: skip
    for parameter in module.query_encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(module.query_encoder.parameters(), 0.1, momentum=momentum)
    trainer = SimpleNamespace(
        global_step=7, world_size=1, precision_plugin=SimpleNamespace(), optimizers=[optimizer]
    )
    return NonFiniteGuard(0, Path("none")), trainer, module, optimizer


def test_nothing_is_asked_of_the_device_between_readings():
    with FakeTensorMode():
        guard, trainer, module, optimizer = on_a_gpu()
        for parameter in module.query_encoder.parameters():  # a step has been taken before
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        guard.on_train_start(trainer, module)
        for number in range(3):
            guard.on_train_batch_start(trainer, module, None, number)
            guard.on_before_optimizer_step(trainer, module, optimizer)
            guard.on_train_batch_end(trainer, module)
        module.wants_metrics = True
        with pytest.raises(DataDependentOutputException):  # the control: a reading does ask
            guard.on_train_batch_end(trainer, module)


def test_sgd_without_momentum_asks_nothing_at_its_first_step_either():
    with FakeTensorMode():
        guard, trainer, module, optimizer = on_a_gpu(momentum=0)
        guard.on_train_start(trainer, module)
        guard.on_train_batch_start(trainer, module, None, 0)
        guard.on_before_optimizer_step(trainer, module, optimizer)
        guard.on_train_batch_end(trainer, module)


def test_a_backbone_with_buffers_of_any_shape_can_be_put_back(loss_at, monkeypatch):
    """Swin keeps its attention masks as buffers: those are no statistics."""
    from moco.algorithm.encoder import build_encoder

    def with_mask(*arguments):
        encoder = build_encoder(*arguments)
        encoder.register_buffer("mask", torch.full((2, 3), -math.inf), persistent=False)
        return encoder

    monkeypatch.setattr(pretrain, "build_encoder", with_mask)
    loss_at(2, math.nan)
    with pytest.raises(RunError, match="step 2"):
        fit(allowed=0)
    fit(allowed=1)
