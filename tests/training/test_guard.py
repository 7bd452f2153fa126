"""The guard against numbers that are not finite: what it sees, when it asks the device, and fp16.

How whole runs stop because of it: tests/training/test_numbers.py.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from steps import MODEL, make_batches, make_module, make_views
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco.algorithm import pretrain
from moco.config import ModelConfig, OptimConfig, RunError
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


@pytest.fixture
def steep(monkeypatch):
    """Make all gradients NaN while the loss stays finite."""
    cross_entropy = torch.nn.functional.cross_entropy

    def changed(*arguments):
        loss = cross_entropy(*arguments)
        return loss + ((loss - loss.detach()) ** 2).sqrt()

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", changed)


class Look(pl.Callback):
    """Keep weights, statistics and optimiser state after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.optimizer: list[dict[int, dict[str, Any]]] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))
        self.optimizer.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def fit(accumulate: int = 1, plugin: Any = None, model: ModelConfig = MODEL, **optim: Any) -> Look:
    """Train a few steps under the guard, which reads after each."""
    module, look = make_module(model).float(), Look()
    module.optim_config = OptimConfig(lr=0.01, schedule="constant", weight_decay=1e-3, **optim)
    module.accumulate = accumulate
    module.steps_per_epoch = module.total_steps = STEPS
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        callbacks=[NonFiniteGuard(Path("none")), look], enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, plugins=plugin,
    )  # fmt: skip
    views = [(a.float(), b.float()) for a, b in make_views(16, steps=STEPS * accumulate)]
    batches = make_batches(views, 1, 0, True, False)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return look


def half_precision(scale: float = 2.0**10, backoff: float = 0.5) -> MixedPrecision:
    """Mixed fp16 with its gradient scaler, on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("plugin", [None, half_precision], ids=["fp32", "fp16"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_seen_though_gradients_are(loss_at, value, plugin):
    loss_at(3, value)
    with pytest.raises(RunError, match=r"not finite at step 3 \(lr 0\.01\)"):
        fit(plugin=plugin and plugin())


def test_a_gradient_that_is_not_finite_is_seen_though_the_loss_is(steep):
    with pytest.raises(RunError, match="not finite at step 1 "):
        fit()


def test_one_bad_batch_of_several_that_are_accumulated_is_seen(loss_at):
    loss_at(5, math.inf)  # the first batch of the third step
    with pytest.raises(RunError, match="not finite at step 3 "):
        fit(accumulate=2)


def test_a_gradient_that_is_not_finite_in_the_predictor_alone_is_seen(monkeypatch):
    def spoil(module):
        if module.global_step == 2:
            module.predictor[3].weight.grad.fill_(math.nan)

    monkeypatch.setattr(pretrain.MoCo, "on_after_backward", spoil)
    with pytest.raises(RunError, match="not finite at step 3 "):
        fit(model=replace(MODEL, predictor="mlp"))


@pytest.mark.parametrize("encoder", ["query_encoder", "predictor", "key_encoder"])
def test_a_statistic_that_overflows_is_seen(monkeypatch, encoder):
    """An infinite variance need not show in BatchNorm's output, nor in loss and gradients."""

    def overflow(module):
        if module.global_step == 2:
            buffers = dict(getattr(module, encoder).named_buffers())
            next(b for n, b in buffers.items() if "running_var" in n).fill_(math.inf)

    monkeypatch.setattr(pretrain.MoCo, "on_after_backward", overflow)
    with pytest.raises(RunError, match="not finite at step 3 "):
        fit(model=replace(MODEL, predictor="mlp"))


def test_large_numbers_are_no_fault(loss_at):
    loss_at(2, 1e30)  # its square is not finite in fp32
    assert len(fit().states) == STEPS


def test_a_mask_of_infinities_is_no_statistic(monkeypatch):
    """Swin keeps its attention masks as buffers."""
    from moco.algorithm.encoder import build_encoder

    def with_mask(*arguments):
        encoder = build_encoder(*arguments)
        encoder.register_buffer("mask", torch.full((2, 3), -math.inf), persistent=False)
        return encoder

    monkeypatch.setattr(pretrain, "build_encoder", with_mask)
    assert len(fit().states) == STEPS


# fp16


def test_a_first_step_that_overflows_fp16_is_the_scalers_business():
    plugin = half_precision(2.0**40, backoff=2.0**-30)
    look = fit(plugin=plugin)
    assert look.optimizer[0] == {}, "a skipped first update leaves its momentum uninitialised"
    assert plugin.scaler.get_scale() == 2.0**10
    assert look.optimizer[-1], "later steps are taken"
    assert all(t.isfinite().all() for t in look.states[-1].values())
    slots = look.optimizer[-1].values()
    assert all(slot["momentum_buffer"].isfinite().all() for slot in slots)


def test_gradients_that_overflow_at_any_loss_scale_stop_the_run(steep):
    with pytest.raises(RunError, match="at any loss scale"):
        fit(plugin=half_precision(2.0**-12))


# What it asks of the device


def on_a_gpu(
    device: str = "cuda", momentum: float = 0.9
) -> tuple[NonFiniteGuard, SimpleNamespace, SimpleNamespace, Any]:
    """A guard in the middle of training, on tensors that raise when the host wants to read them."""
    module = SimpleNamespace(
        query_encoder=torch.nn.Sequential(
            torch.nn.Linear(4, 4, device=device), torch.nn.BatchNorm1d(4, device=device)
        ),
        key_encoder=torch.nn.BatchNorm1d(4, device=device), wants_metrics=False,
        predictor=torch.nn.Identity(),
        loss_sum=torch.zeros(1, device=device),
    )  # fmt: skip
    for parameter in module.query_encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(module.query_encoder.parameters(), 0.1, momentum=momentum)
    trainer = SimpleNamespace(
        global_step=7, num_training_batches=100, precision_plugin=SimpleNamespace(),
        optimizers=[optimizer],
    )  # fmt: skip
    return NonFiniteGuard(Path("none")), trainer, module, optimizer


@pytest.mark.parametrize("momentum", [0.9, 0])
def test_nothing_is_asked_of_the_device_between_readings(momentum):
    with FakeTensorMode():
        guard, trainer, module, optimizer = on_a_gpu(momentum=momentum)
        guard.on_train_start(trainer, module)
        for number in range(3):
            guard.on_before_optimizer_step(trainer, module, optimizer)
            guard.on_train_batch_end(trainer, module, None, None, number)
        module.wants_metrics = True
        with pytest.raises(DataDependentOutputException):  # the control: a reading does ask
            guard.on_train_batch_end(trainer, module, None, None, 3)


def test_a_step_costs_three_operations_whatever_the_depth():
    """Operations of torch, not kernels: the norms of all tensors, and the largest of these."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func.name())
            return func(*args, **(kwargs or {}))

    counted: list[str] = []
    _, trainer, module, optimizer = on_a_gpu("cpu")
    guard = NonFiniteGuard(Path("none"))
    guard.on_train_start(trainer, module)
    with Count():
        guard.on_before_optimizer_step(trainer, module, optimizer)
        guard.on_train_batch_end(trainer, module, None, None, 0)
    assert [name for name in counted if "aten" in name] == [
        "aten::_foreach_norm.Scalar", "aten::stack", "aten::linalg_vector_norm"
    ]  # fmt: skip
