"""Guards of a run's numbers: what is not finite stops the run, a collapse is told.

Both classes are Lightning callbacks. `NonFiniteGuard` computes one number a step on the device and
never waits for the device between readings. `Watch` looks at readings alone. docs/faults.md lists
the faults that they answer.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from moco.config import RunError
from moco.evaluation.findings import COLLAPSED
from moco.images.bad_files import BadFiles
from moco.run_directory import last_whole

log = logging.getLogger("moco")
COLLAPSED_READINGS = 20  # in a row
LEAST_SCALE = 1e-4  # of fp16's loss; below it nothing is learnt (fairseq's min_loss_scale)


class NonFiniteGuard(pl.Callback):
    """Stop the run when a loss, gradient or BatchNorm statistic is not finite; save no such state.

    Each optimiser step leaves the largest absolute value of all these on the device: it is finite
    if they are. The host fetches these values at the next reading, at the end of an epoch and
    before every checkpoint, where it waits for the device anyway, and all ranks agree on them.

    Args:
        run_dir: Where the last good checkpoint is looked for.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._largest: dict[tuple[int, float], Tensor] = {}  # (step, rate) since the last reading
        self._scaler: torch.amp.GradScaler | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """List what is judged at each step."""
        self._parameters = [*module.query_encoder.parameters(), *module.predictor.parameters()]
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._is_first_update = not trainer.optimizers[0].state
        self._statistics = [
            buffer
            for network in (module.query_encoder, module.predictor, module.key_encoder)
            for name, buffer in network.named_buffers()
            if name.endswith(("running_mean", "running_var"))  # other buffers may hold -inf: masks
        ]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the step's largest value; the sum of losses covers all accumulated batches."""
        # fp16's scaler raises its scale until gradients overflow, and skips those steps by itself.
        gradients = [] if self._scaler else [p.grad for p in self._parameters if p.grad is not None]
        step, rate = trainer.global_step + 1, optimizer.param_groups[0]["lr"]
        judged = [module.loss_sum, *gradients, *self._statistics]
        self._largest[step, rate] = get_total_norm(judged, math.inf)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read where the host waits for the device anyway, before other callbacks do."""
        if self._scaler and self._is_first_update:
            # A first update that the scaler skips leaves the momentum of a fused SGD uninitialised.
            self._is_first_update = self._scaler.state_dict()["_growth_tracker"] == 0
            if self._is_first_update:
                trainer.optimizers[0].state.clear()
        if module.wants_metrics or batch_idx + 1 == trainer.num_training_batches:
            self.read()

    def read(self) -> None:
        """Fetch the values of the steps since the last reading.

        Raises:
            RunError: One of them is not finite on any rank, or fp16's scale is too low.
        """
        if self._scaler and self._scaler.get_scale() < LEAST_SCALE:
            what = "gradients are not finite in fp16 at any loss scale"
            raise self._error(what, "set trainer.precision bf16-mixed or 32-true")
        if not self._largest:
            return
        are_bad = _on_any_rank(~torch.stack([*self._largest.values()]).isfinite())
        for (step, rate), is_bad in zip(self._largest, are_bad, strict=True):
            if is_bad:
                raise self._error(f"loss or gradient is not finite at step {step} (lr {rate:g})")
        self._largest.clear()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Let nothing but finite numbers into a checkpoint: the last one is always a good one."""
        self.read()
        slots = [slot.values() for slot in trainer.optimizers[0].state.values()]
        state = [*checkpoint["state_dict"].values(), *(value for slot in slots for value in slot)]
        tensors = [v for v in state if isinstance(v, Tensor) and v.is_floating_point()]
        if _on_any_rank(~get_total_norm(tensors, math.inf).isfinite()[None])[0]:
            raise self._error(f"weights are not finite after step {trainer.global_step}")

    def _error(
        self, what: str, remedy: str = "lower optim.lr or raise optim.warmup_epochs"
    ) -> RunError:
        last = last_whole(self.run_dir)
        if last is None:
            return RunError(f"{what}, no checkpoint was written yet: {remedy} and start again")
        return RunError(
            f"{what}, the last good checkpoint is {last}: {remedy} in a new run with --init_from "
            f"{last}, or go on with --resume {self.run_dir} if the cause has passed"
        )


def _on_any_rank(flags: Tensor) -> list[bool]:
    """Fetch flags; each is true where it is true on any rank, so that all ranks do the same."""
    if torch.distributed.is_initialized():
        flags = flags.float()
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return flags.bool().tolist()


class Watch(pl.Callback):
    """At each reading, agree on bad files, and warn once when the embeddings have collapsed."""

    def __init__(self, bad: BadFiles) -> None:
        self.bad = bad
        self._low = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Look at the newest reading; every rank comes here at the same step."""
        if not module.wants_metrics:
            return
        self.bad.agree()
        spread = float(module.metrics["train/spread"])
        self._low = self._low + 1 if spread < COLLAPSED else 0
        if self._low == COLLAPSED_READINGS and trainer.is_global_zero:
            log.warning(
                "collapse: train/spread is %.3f after step %d and has been below %g for %d "
                "readings, so all images look alike to the encoder. Likely causes: optim.lr too "
                "high, model.key_momentum too low (0.99 and more), model.temperature too high, a "
                "model.queue_size or data.batch_size too small, or views that leave nothing to "
                "tell apart (data.crop_min, blank images)",
                spread,
                trainer.global_step,
                COLLAPSED,
                COLLAPSED_READINGS,
            )
