"""Optimisers against torch's own, schedules against closed forms."""

import itertools
import math

import pytest
import torch
from torch import nn

from moco.algorithm.optim import Plateau, build_optimizer, key_momentum, learning_rate
from moco.config import ModelConfig, OptimConfig

PER_EPOCH, EPOCHS = 7, 10
TOTAL = PER_EPOCH * EPOCHS


def rates(**settings) -> list[float]:
    config = OptimConfig(lr=0.5, **settings)
    return [learning_rate(config, step, PER_EPOCH, TOTAL) for step in range(TOTAL)]


def half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def test_cosine_per_epoch_is_a_staircase():
    expected = [0.5 * half_cosine(step // PER_EPOCH / EPOCHS) for step in range(TOTAL)]
    assert rates(schedule="cosine", schedule_per="epoch") == pytest.approx(expected)


def test_cosine_per_step_is_smooth():
    expected = [0.5 * half_cosine(step / TOTAL) for step in range(TOTAL)]
    assert rates(schedule="cosine", schedule_per="step") == pytest.approx(expected)


def test_warm_up_rises_from_0_by_step_and_the_cosine_takes_the_rest():
    got = rates(schedule="cosine", schedule_per="step", warmup_epochs=2)
    warm = 2 * PER_EPOCH
    assert got[:warm] == pytest.approx([0.5 * step / warm for step in range(warm)])
    rest = [0.5 * half_cosine((step - warm) / (TOTAL - warm)) for step in range(warm, TOTAL)]
    assert got[warm:] == pytest.approx(rest)
    assert got[0] == 0 and max(got) == got[warm] == 0.5


def test_warm_up_before_a_cosine_per_epoch():
    got = rates(schedule="cosine", schedule_per="epoch", warmup_epochs=2)
    rest = [
        0.5 * half_cosine((step // PER_EPOCH - 2) / (EPOCHS - 2))
        for step in range(2 * PER_EPOCH, TOTAL)
    ]
    assert got[2 * PER_EPOCH :] == pytest.approx(rest)


def test_fractional_warm_up_never_passes_the_highest_rate():
    for per in ("step", "epoch"):
        got = rates(schedule="cosine", schedule_per=per, warmup_epochs=1.5)
        assert max(got) <= 0.5 and got[11] == pytest.approx(0.5, rel=0.01)
        assert all(a >= b for a, b in itertools.pairwise(got[11:]))


def test_warm_up_goes_before_every_schedule():
    for schedule in ("step", "plateau", "constant"):
        got = rates(schedule=schedule, warmup_epochs=1, milestones=[5])
        assert got[:PER_EPOCH] == pytest.approx([0.5 * s / PER_EPOCH for s in range(PER_EPOCH)])
        assert got[PER_EPOCH] == 0.5


def test_milestones_multiply_at_the_first_step_of_their_epoch():
    got = rates(schedule="step", milestones=[3, 6], gamma=0.1)
    expected = [0.5] * (3 * PER_EPOCH) + [0.05] * (3 * PER_EPOCH) + [0.005] * (4 * PER_EPOCH)
    assert got == pytest.approx(expected)


def test_constant_and_plateau_keep_the_rate():
    assert rates(schedule="constant") == [0.5] * TOTAL
    assert rates(schedule="plateau") == [0.5] * TOTAL


def test_a_warm_up_as_long_as_the_run_is_no_error():
    got = rates(schedule="cosine", warmup_epochs=EPOCHS)
    assert got[-1] == pytest.approx(0.5 * (TOTAL - 1) / TOTAL)


def test_key_momentum_is_constant_unless_asked():
    config = ModelConfig(key_momentum=0.99, key_momentum_end=1.0)
    assert {key_momentum(config, step, 100) for step in (0, 50, 100)} == {0.99}


@pytest.mark.parametrize("end", [1.0, 0.999])
def test_key_momentum_on_a_cosine(end):
    config = ModelConfig(key_momentum=0.99, key_momentum_end=end, key_momentum_schedule="cosine")
    assert key_momentum(config, 0, 100) == pytest.approx(0.99, abs=1e-12)
    assert key_momentum(config, 50, 100) == pytest.approx((0.99 + end) / 2, abs=1e-12)
    assert key_momentum(config, 100, 100) == pytest.approx(end, abs=1e-12)
    assert key_momentum(config, 130, 100) == pytest.approx(end, abs=1e-12)
    if end == 1.0:  # 2104.02057's own form
        published = 1 - half_cosine(0.3) * (1 - 0.99)
        assert key_momentum(config, 30, 100) == pytest.approx(published, abs=1e-12)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> list:
    generator = torch.Generator().manual_seed(1)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        images = torch.randn(8, 4, generator=generator).to(next(net.parameters()).dtype)
        net(images).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.05},
        {"sgd_momentum": 0.0},
        {"dampening": 0.3},
        {"nesterov": True, "weight_decay": 0.05},
    ],
)
def test_sgd_is_torchs_own(settings):
    config = OptimConfig(lr=0.1, **settings)
    ours, theirs = small_net(), small_net()
    mine = train(ours, build_optimizer(ours.parameters(), config), [0.1, 0.1, 0.02, 0.02])
    plain = torch.optim.SGD(
        theirs.parameters(),
        0.1,
        momentum=config.sgd_momentum,
        dampening=config.dampening,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        foreach=False,
        fused=False,
    )
    for a, b in zip(mine, train(theirs, plain, [0.1, 0.1, 0.02, 0.02]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_sgd_by_hand_keeps_the_rate_outside_the_buffer():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([weight], OptimConfig(lr=0.1, weight_decay=0.5, sgd_momentum=0.9))
    value, velocity = 2.0, 0.0
    for rate, gradient in ((0.1, 1.0), (0.01, -3.0), (0.2, 0.5)):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.5 * value
        value -= rate * velocity
        assert weight.item() == pytest.approx(value, rel=1e-6)


def test_adamw_is_torchs_own():
    config = OptimConfig(name="adamw", lr=0.01, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95)
    # In fp64: a bias before a BatchNorm has no gradient but rounding, which AdamW makes large.
    ours, theirs = small_net().double(), small_net().double()
    mine = train(ours, build_optimizer(ours.parameters(), config), [0.01] * 4)
    plain = torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.8, 0.95), weight_decay=0.1)
    for a, b in zip(mine, train(theirs, plain, [0.01] * 4), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_decay_covers_batch_norm_and_biases(name):
    net = small_net()
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(net.parameters(), config)
    before = [p.detach().clone().fill_(1.0) for p in net.parameters()]
    for parameter in net.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * 0.95)


def test_frozen_parameters_stay_out():
    net = small_net()
    net[0].weight.requires_grad_(False)
    optimizer = build_optimizer(net.parameters(), OptimConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}


def readings(plateau: Plateau, metrics: list[float]) -> list[float]:
    factors = []
    for metric in metrics:
        plateau.read(metric)
        factors.append(plateau.factor)
    return factors


def test_plateau_lowers_after_its_patience():
    config = OptimConfig(schedule="plateau", plateau_patience=2, gamma=0.5)
    assert Plateau(config).factor == 1.0
    got = readings(Plateau(config), [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert got == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_plateau_of_knn_wants_more():
    config = OptimConfig(plateau_metric="val/knn_top1", plateau_patience=0, gamma=0.1)
    assert readings(Plateau(config), [50.0, 60.0, 55.0]) == pytest.approx([1, 1, 0.1])


@pytest.mark.parametrize("cut", range(1, 9))
def test_plateau_resumes_from_its_state(cut):
    config = OptimConfig(schedule="plateau", plateau_patience=1, gamma=0.5)
    metrics = [3.0, 2.0, 2.0, 2.5, 1.0, 1.0, 1.2, 1.1, 0.5]
    whole = readings(Plateau(config), metrics)
    first = Plateau(config)
    readings(first, metrics[:cut])
    state = first.state_dict()
    assert all(type(value) in (int, float) for value in state.values())
    second = Plateau(config)
    second.load_state_dict(state)
    assert readings(second, metrics[cut:]) == whole[cut:]
    assert whole[-1] < 1


def test_plateau_resumes_before_its_first_reading():
    second = Plateau(OptimConfig(plateau_patience=0))
    second.load_state_dict(Plateau(OptimConfig()).state_dict())
    assert readings(second, [1.0]) == [1.0]
