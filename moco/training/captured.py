"""The captured step: on one GPU, forward, backward and optimiser are replayed in one launch.

A step that is one compiled graph has no hidden state: all that differs between two steps comes in
tensors that stay in their places. So a CUDA graph of it, with the backward pass and the optimiser,
serves the whole run. Lightning goes on as if it had called backward pass and optimiser itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.config import TrainConfig
from moco.images.steps import Indices
from moco.log import reason_of
from moco.training.decide import Decided

log = logging.getLogger("moco")
WARM_UP = 3  # steps before the capture: they compile, choose kernels and fill the optimiser's state

_BETWEEN = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)


def capturable(config: TrainConfig, decided: Decided) -> bool:
    """Tell whether a step that is one graph can be captured with its optimiser.

    SGD alone takes its rate from a tensor and keeps no other number on the host. Clipping and
    fp16's scaler come between backward pass and optimiser. Views that grow, and a backbone that is
    frozen for a while, are other graphs.
    """
    optim, grows = config.optim, config.data.image_size_start > 0
    is_plain = optim.name == "sgd" and not optim.clip_grad_norm
    is_plain &= not optim.freeze_backbone_epochs and not grows
    return decided.accelerator == "cuda" and is_plain and decided.precision != "16-mixed"


def comes_between(callback: pl.Callback) -> bool:
    """Tell whether a callback does something between backward pass and optimiser.

    In a captured step it would come too late: gradients that it clips have moved the weights.
    """
    own = (getattr(getattr(callback, name), "__func__", None) for name in _BETWEEN)
    return any(f is not getattr(pl.Callback, name) for f, name in zip(own, _BETWEEN, strict=True))


class CapturedStep(pl.Callback):
    """Take some steps as they are, capture the next one, and replay it from then on.

    What the run's own callbacks see between backward pass and optimiser, they now see after both:
    gradients and statistics are those of the step, and the weights are updated already.
    Where the capture fails, nothing of the step was computed, and the run goes on without it.

    Attributes:
        taken: Steps so far.
        graph: What was captured; None before, where that failed, and once the run has ended.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: Tensor
        self._images: Indices | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Take over what Lightning would call: step, backward pass and optimiser."""
        self._algorithm, self._optimizer = module.training_step, trainer.optimizers[0]
        self._update, groups = self._optimizer.step, self._optimizer.param_groups
        self._rates = [module.loss_sum.new_zeros(()) for _ in groups]
        self._stream = torch.cuda.Stream(module.device) if module.device.type == "cuda" else None
        module.training_step = self.step
        module.backward = lambda *args, **options: None
        module.optimizer_zero_grad = lambda *args: None
        self._optimizer.step = lambda closure: closure()

    def step(self, images: Indices, batch_idx: int) -> Tensor:
        """Take the whole step and return its loss, without a gradient."""
        self._bring_in(images)
        with self._rates_in_tensors():
            if self.taken == WARM_UP:
                self._capture()
            if self.graph:
                self.graph.replay()
            else:
                with self._aside():
                    self.loss = self._whole_step()
        self.taken += 1
        return self.loss

    def _whole_step(self) -> Tensor:
        loss = self._algorithm(self._images, 0)
        self._optimizer.zero_grad()
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
            self._update()
        return loss.detach()

    def _capture(self) -> None:
        graph, main = torch.cuda.CUDAGraph(), self._stream and torch.cuda.current_stream()
        # Threads that pin memory or write a checkpoint may do what a capture forbids.
        capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        try:
            # What is not allowed in a capture fails at its end once more, which leaves its stream
            # as the current one.
            with torch.cuda.stream(main), capture:
                self.loss = self._whole_step()
        except RuntimeError as error:
            reason = reason_of(error.__context__ or error)
            log.warning("the step cannot be captured here and goes on compiled (%s)", reason)
            return
        self.graph = graph
        log.info("the step is captured: one launch for forward, backward and optimiser")

    def _bring_in(self, images: Indices) -> None:
        """Copy what the loader yields to where the graph reads it."""
        values = {item.name: getattr(images, item.name) for item in fields(images)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if self._images is None:
            self._images = replace(images, **{name: t.clone() for name, t in tensors.items()})
        for name, value in tensors.items():
            getattr(self._images, name).copy_(value)

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Give back the graph's memory, which nobody else can have."""
        self.graph = self._images = None

    @contextlib.contextmanager
    def _rates_in_tensors(self) -> Iterator[None]:
        """Show the optimiser its rates as tensors, and everybody else as numbers."""
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate, number in zip(groups, self._rates, numbers, strict=True):
            group["lr"] = rate.fill_(number)
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Compute on the stream of the capture, since autograd remembers where it has been."""
        if self._stream is None:
            yield
            return
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)
