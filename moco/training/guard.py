"""Guards of a run's numbers: a bad step touches nothing, a collapse is told. Lightning callbacks.

`NonFiniteGuard` works on the device and asks nothing of it between readings: keep it so. `Watch`
looks at readings alone. docs/faults.md lists what they answer.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco import distributed
from moco.config import RunError
from moco.images.bad_files import BadFiles
from moco.run_directory import last_whole

log = logging.getLogger("moco")
COLLAPSED, COLLAPSED_READINGS = 0.05, 20  # spread, and readings in a row; an even sphere has 1
LEAST_SCALE = 1e-4  # of fp16's loss; below it nothing is learnt (fairseq's min_loss_scale)


class NonFiniteGuard(pl.Callback):
    """Leave a step out whose loss or gradient is not finite; stop, or go on up to `allowed` times.

    The device decides, and the host reads the count where it waits for the device anyway: at a
    reading and before a checkpoint (on a CPU after every step). Until then bad steps change
    nothing: fused optimisers skip an update whose `found_inf` is 1, BatchNorm's statistics are put
    back, and the queue refuses keys that are not finite.

    Args:
        allowed: Steps of the run that may be left out.
        run_dir: Where the last good checkpoint is looked for.
    """

    def __init__(self, allowed: int, run_dir: Path) -> None:
        self.allowed, self.run_dir = allowed, run_dir
        self._skipped = self._told = 0  # a tensor on the device once training has started
        self._first: Any = -1
        self._rates: dict[int, float] = {}
        self._before: Tensor | None = None
        self._lost: Tensor | None = None  # whether SGD's first update was skipped
        self._scaler: torch.amp.GradScaler | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Move the counters to the device, and list what is judged and what is put back."""
        self._parameters = list(module.query_encoder.parameters())
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._told = int(self._skipped)
        self._skipped = torch.tensor(self._told, device=module.device)
        self._first = torch.tensor(-1, device=module.device)
        self._stats = [
            buffer
            for encoder in (module.query_encoder, module.key_encoder)
            for name, buffer in encoder.named_buffers()
            if name.endswith(("running_mean", "running_var"))  # others are constants
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember BatchNorm's statistics as they were before this optimiser step."""
        if batch_idx % module.accumulate == 0 and self._stats:
            self._before = self._flat_stats()

    def _flat_stats(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._stats])

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the step on the device, alike on all ranks, and take back what it changed."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        overflow = ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        bad = module.bad_losses > 0
        if self._stats:
            after = self._flat_stats()
            bad = bad | ~after.isfinite().all()
        # A scaler raises its scale until gradients overflow, and skips that step by itself.
        found = (bad if self._scaler else bad | overflow).float()
        module.bad_losses.zero_()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        bad = found > 0
        optimizer.found_inf = found
        if self._scaler:  # it sets its own `found_inf`, and looks at gradients alone
            gradients[0] += torch.where(bad, math.nan, 0.0)
        if not optimizer.state and optimizer.defaults.get("momentum"):
            self._lost = bad | overflow
        self._rates[trainer.global_step + 1] = optimizer.param_groups[0]["lr"]
        self._first = torch.where(bad & (self._first < 0), trainer.global_step + 1, self._first)
        self._skipped += bad
        if self._stats and (bad.device.type != "cpu" or bad):
            kept = torch.where(bad, self._before, after)
            torch._foreach_copy_(self._stats, kept.split([b.numel() for b in self._stats]))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Read the count where it costs nothing."""
        if self._lost is not None:
            # Once per run the host asks: a first update that the device skipped leaves SGD's
            # momentum uninitialised (torch 2.15, optim/sgd.py, is_first_step).
            if self._lost:
                trainer.optimizers[0].state.clear()
            self._lost = None
        if module.wants_metrics or module.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Fetch the count; raise RunError when more steps were bad than are allowed."""
        if self._scaler and self._scaler.get_scale() < LEAST_SCALE:
            raise RunError(
                "gradients are not finite in fp16 at any loss scale: start anew with "
                f"trainer.precision bf16-mixed or 32-true, {self._last_good()}"
            )
        skipped = int(self._skipped)
        rates, self._rates = self._rates, {}
        if skipped == self._told:
            return
        self._told, step = skipped, int(self._first)
        self._first.fill_(-1)
        what = f"loss or gradient is not finite at step {step} (lr {rates.get(step, math.nan):g})"
        if skipped > self.allowed:
            raise self._error(what)
        if distributed.rank() == 0:
            log.warning("%s: left out, %d of %d that are allowed", what, skipped, self.allowed)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Let nothing but finite numbers into a checkpoint: the last one is always a good one."""
        if isinstance(self._skipped, Tensor):
            self.read()
        state = [v for v in module.state_dict().values() if v.is_floating_point()]
        if not torch.stack(torch._foreach_norm(state)).isfinite().all():
            raise self._error(f"weights are not finite after step {trainer.global_step}")

    def _last_good(self) -> str:
        last = last_whole(self.run_dir)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _error(self, what: str) -> RunError:
        return RunError(
            f"{what}, {self._last_good()}: start anew with a lower optim.lr or more "
            f"optim.warmup_epochs, or leave such steps out with --resume {self.run_dir} "
            "--run.skip_nonfinite N"
        )

    def state_dict(self) -> dict[str, int]:
        """Keep the count through a resume."""
        return {"skipped": int(self._skipped)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take it back."""
        self._skipped = state["skipped"]


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
