"""Optimisers and schedules. Rates are pure functions of the step, so a resume restores none.

Sources: 1911.05722, section 4 (steps), 2003.04297 (cosine), 2104.02057 (LARS, warm-up, key momentum
along a cosine), 2502.16982 (Muon with the rates of AdamW).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from moco.algorithm.muon import muon
from moco.config import ModelConfig, OptimConfig


def build_optimizer(
    encoder: Iterable[nn.Parameter], config: OptimConfig, predictor: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build LARS, timm's Muon, or torch's SGD or AdamW, fused where possible.

    Args:
        predictor: Its parameters; where their rate is constant, their groups say `constant`.
    """
    parameters, behind = ([p for p in some if p.requires_grad] for some in (encoder, predictor))
    if config.predictor_schedule == "same":
        groups = _groups([*parameters, *behind], config)
    else:
        last = [group | {"constant": True} for group in _groups(behind, config) if group["params"]]
        groups = _groups(parameters, config) + last
    parameters = [*parameters, *behind]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.name == "lars":
        return LARS(groups, config.lr, config.sgd_momentum, trust=config.lars_trust)
    if config.name == "muon":
        options = {"momentum": config.sgd_momentum, "nesterov": config.nesterov, "betas": betas}
        return muon()(groups, config.lr, **options)
    # Gradients must be unscaled before they are clipped, which fused optimisers do too late; and
    # torch's fused SGD takes no momentum of some parameters without that of all (torch 2.14.1).
    plain = config.clip_grad_norm == 0 and config.freeze_backbone_epochs == 0
    fused = plain and all(
        p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters
    )
    if config.name == "adamw":
        return torch.optim.AdamW(groups, config.lr, betas=betas, fused=fused)
    return torch.optim.SGD(
        groups,
        config.lr,
        momentum=config.sgd_momentum,
        dampening=config.dampening,
        nesterov=config.nesterov,
        fused=fused,
    )


def _groups(parameters: list[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Part parameters of one dimension, those of norms and biases, from the others.

    They are a group of their own where weight decay or adaptation leaves them out.
    """
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    if config.name == "lars" or not config.decay_norm_and_bias:
        groups[0]["params"] = [p for p in parameters if p.ndim > 1]
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    if config.name == "lars":
        groups[1]["trust"] = None
    return groups


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate each layer scales by its own |weights| / |update|.

    Args:
        params: Parameters, or groups of them; `trust` None in a group leaves it plain SGD.
        weight_decay: Added to the gradient, and so part of the update.
        trust: Factor of |weights| / |update|.

    Source: arXiv:1708.03888; with the order of operations of arXiv:2104.02057's code. timm's `Lars`
    divides by |gradient| + decay * |weights| instead, and is off by 1.5e-4 after 50 steps.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float | None = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the device is not waited for."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = [p.grad for p in parameters]
            if group["weight_decay"]:
                updates = torch._foreach_add(updates, parameters, alpha=group["weight_decay"])
            if group["trust"] is not None:
                weights, norms = torch._foreach_norm(parameters), torch._foreach_norm(updates)
                ratios = [
                    torch.where((w > 0) & (u > 0), group["trust"] * w / u, 1.0)
                    for w, u in zip(weights, norms, strict=True)
                ]
                updates = torch._foreach_mul(updates, ratios)
            for p in parameters:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            velocities = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(parameters, velocities, alpha=-group["lr"])
        return loss


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Return the rate of optimiser step `step`, counted from 0.

    While the backbone is frozen the rate is at its highest, for a fresh head. Warm-up then rises
    linearly, step by step. After it, cosine falls to 0 over the rest of the
    run as 0.5 * (1 + cos(pi * e / E)); with `schedule_per: epoch`, e counts whole epochs, as in v1
    and v2. `stable` stays, and falls linearly to 0 from `decay_start` on (2405.18392). `plateau` is
    constant here: `Plateau` scales it.
    """
    frozen = frozen_steps(config, steps_per_epoch)
    if step < frozen:
        return _stable(config, step, total_steps)
    warmup = frozen + config.warmup_epochs * steps_per_epoch
    if step < warmup:
        start = config.lr * config.warmup_start
        rising = start + (config.lr - start) * (step - frozen) / (warmup - frozen)
        return min(rising, _stable(config, step, total_steps))
    if config.schedule == "cosine":
        if config.schedule_per == "epoch":
            step = max(step // steps_per_epoch * steps_per_epoch, math.ceil(warmup))
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if config.schedule == "step":
        passed = bisect_right(config.milestones, step // steps_per_epoch)
        return config.lr * config.gamma**passed
    return _stable(config, step, total_steps)


def frozen_steps(config: OptimConfig, steps_per_epoch: int) -> float:
    """Return the steps at the start in which the backbone's weights stay as they are."""
    return config.freeze_backbone_epochs * steps_per_epoch


def _stable(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the rate without warm-up of `stable`, and of what is constant."""
    if config.schedule != "stable":
        return config.lr
    start = decay_start(config, total_steps)
    return config.lr * min((total_steps - step) / (total_steps - start), 1.0)


def decay_start(config: OptimConfig, total_steps: int) -> int:
    """Return the step at which `stable` begins to fall, counted from 0; it is at least one long."""
    return min(round(total_steps * (1 - config.decay_share)), total_steps - 1)


def step_before_decay(config: OptimConfig, total_steps: int) -> int:
    """Return the last step before `stable` falls; 0 with other schedules."""
    return decay_start(config, total_steps) if config.schedule == "stable" else 0


def key_momentum(config: ModelConfig, step: int, total_steps: int) -> float:
    """Return the momentum m of a step: constant, or along half a cosine (2104.02057)."""
    start, end = config.key_momentum, config.key_momentum_end
    if config.key_momentum_schedule == "constant":
        return start
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))


class Plateau:
    """Lower the rate when a metric stops improving, as torch's ReduceLROnPlateau does.

    It scales a factor of `learning_rate`, so that warm-up still holds. A higher metric is better
    unless it is a loss.
    """

    def __init__(self, config: OptimConfig) -> None:
        # The scheduler needs an optimiser; this one's rate is the factor, and it trains nothing.
        self._factor = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._factor,
            mode="min" if config.plateau_metric.endswith("loss") else "max",
            factor=config.gamma,
            patience=config.plateau_patience,
        )

    @property
    def factor(self) -> float:
        """Factor of the rate, 1 at the start."""
        return float(self._factor.param_groups[0]["lr"])

    def read(self, metric: float) -> None:
        """Show the scheduler a new value of the watched metric."""
        self._scheduler.step(metric)

    def state_dict(self) -> dict[str, float]:
        """Return the factor and the counters as plain numbers."""
        state = self._scheduler.state_dict()
        return {
            "factor": self.factor,
            "best": float(state["best"]),
            "bad": int(state["num_bad_epochs"]),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        self._factor.param_groups[0]["lr"] = state["factor"]
        self._scheduler.best = state["best"]
        self._scheduler.num_bad_epochs = int(state["bad"])
