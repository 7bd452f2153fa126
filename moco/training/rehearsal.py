"""A rehearsal: some steps before a run, which tell how long it will take and what it needs.

It trains as the run will, by the same Trainer, on a module that is thrown away, and writes nothing.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from moco import distributed
from moco.algorithm.pretrain import MoCo
from moco.config import TrainConfig
from moco.config.setting import MOST_EPOCHS
from moco.images.growth import growth
from moco.images.loader import PretrainData
from moco.training.build import build_trainer, compile_parts, set_length, size_unit
from moco.training.decide import Decided
from moco.training.explain import fit
from moco.training.outlook import clock_time, duration

log = logging.getLogger("moco")
BATCHES, AT_LEAST = 20, 6  # of a rehearsal
FIRST = 5  # batches that do not count: they compile, and choose kernels
SECONDS = 30.0  # after which it ends, with at least so many batches


@dataclass
class Pace:
    """How fast a run is.

    Attributes:
        seconds: Per batch, the mean of the run: smaller views take less, as their area says.
        wait_share: Part of that time spent waiting for images.
        memory: Most bytes in use: of the GPU, or of this process.
    """

    seconds: float
    wait_share: float
    memory: int


class _Clock(pl.Callback):
    """Measure batches, and end the rehearsal after enough of them."""

    def __init__(self, data: PretrainData) -> None:
        self.data = data
        self.ends: list[tuple[float, float]] = []
        self._sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Give SIGTERM back: Lightning would end with code 0, and there is nothing to save yet."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and self._sigterm is not None:  # it was set in Python, or is the default
            signal.signal(signal.SIGTERM, self._sigterm)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note when a batch ended, and what was waited until then.

        The host waits for a GPU where a time is read, and else goes ahead of it as in a run.
        """
        number, ends = len(self.ends) + 1, [end for end, _ in self.ends]
        is_long = False
        if number >= AT_LEAST:  # of a GPU, which is behind, only the first batches tell
            foreseen = ends[0] + number * (ends[FIRST - 1] - ends[FIRST - 2])
            is_long = max(time.perf_counter(), foreseen) - ends[0] > SECONDS
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(
            number >= BATCHES or is_long, all=False
        )
        is_read = number <= FIRST or trainer.should_stop
        if trainer.strategy.root_device.type == "cuda" and is_read:
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), self.data.wait_seconds))

    def pace(self) -> tuple[float, float]:
        """Return seconds per batch and the share of waiting, without the first few batches."""
        ends = self.ends[min(FIRST - 1, len(self.ends) - 2) :]
        (start, waited), (end, waited_then) = ends[0], ends[-1]
        seconds = max(end - start, 1e-9)
        return seconds / (len(ends) - 1), (waited_then - waited) / seconds


def rehearse(config: TrainConfig, decided: Decided, module: MoCo, data: PretrainData) -> Pace:
    """Train a module for some batches; it must not be used again.

    Args:
        config: Settings; how long the run is does not matter.
        decided: What they came to.
        module: As the run would start.
        data: Prepared; it can be used again.
    """
    endless = {"trainer.max_epochs": MOST_EPOCHS, "trainer.max_steps": -1}
    grown = growth(config.data, MOST_EPOCHS, size_unit(module.query_encoder))
    share = grown.work(0, MOST_EPOCHS) / MOST_EPOCHS
    # All of the network trains, as it does in most of a run.
    usual = {"data.image_size_start": 0, "optim.freeze_backbone_epochs": 0}
    config = config.changed(endless | usual)
    module.optim_config = config.optim
    log.info("trying some steps, to see how long they take")
    set_length(module, config, data)
    own = compile_parts(config, decided, module, data)
    module.wants_metrics = False  # a run takes them at few steps
    clock = _Clock(data)
    trainer = build_trainer(config, decided, logger=False, callbacks=[*own, clock])
    fit(trainer, module, data)
    data.wait_seconds, data.trainer = 0.0, None
    seconds, waited = clock.pace()
    return agreed(Pace(seconds * share, waited, used_memory(decided.accelerator)))


def agreed(pace: Pace) -> Pace:
    """Return rank 0's pace on all ranks: what follows from it must be the same everywhere."""
    return distributed.from_first(lambda: pace)


def used_memory(accelerator: str) -> int:
    """Return the most bytes that this process has used, of a GPU or in main memory."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def checkpoint_bytes(module: MoCo, optimizer: str) -> int:
    """Return the size of one checkpoint: the module, and what the optimiser keeps of gradients."""
    stored = sum(value.nbytes for value in module.state_dict().values())
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return stored + trained * (2 if optimizer == "adamw" else 1)


def tell_plan(
    config: TrainConfig,
    decided: Decided,
    module: MoCo,
    data: PretrainData,
    pace: Pace,
    start_step: int,
) -> dict[str, Any]:
    """Print a table of what a run would be, and return its figures.

    Args:
        pace: Measured.
        start_step: Of a run that goes on, else 0.
    """
    set_length(module, config, data)
    steps = module.total_steps - start_step
    work, total = data.growth.work, module.total_steps  # the pace is the mean of a whole run
    share = work(start_step, total) / work(0, total) * total if start_step else steps
    seconds = pace.seconds * share * module.accumulate
    size = checkpoint_bytes(module, config.optim.name)
    images = config.data.batch_size / pace.seconds
    rows = _decisions(config, decided)
    rows += [
        ("steps", f"{steps}", f"{module.steps_per_epoch} an epoch"),
        ("images/s", f"{images:.0f}", f"{pace.wait_share:.0%} of the time waiting for images"),
        ("an epoch", duration(pace.seconds * module.steps_per_epoch * module.accumulate), ""),
        ("in all", duration(seconds), f"until {clock_time(seconds)}, without kNN readings"),
        ("memory", f"{pace.memory / 2**30:.1f} GiB", f"most in use, {decided.accelerator}"),
        ("disk", f"{size * (config.run.keep_checkpoints + 1) / 2**20:.0f} MiB", "checkpoints"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, value, why in rows if distributed.rank() == 0 else ():
        line = f"{name:{widths[0]}}  {value:{widths[1]}}  {why}".rstrip()
        print(line, file=sys.stderr)
    return {
        "plan": {"settings": decided.settings, "steps": steps},
        "seconds": round(seconds, 1),
        "images_per_second": round(images, 1),
        "wait_share": round(pace.wait_share, 3),
        "memory_bytes": pace.memory,
        "checkpoint_bytes": size,
    }


def _decisions(config: TrainConfig, decided: Decided) -> list[tuple[str, str, str]]:
    """Return the name, the value and the reason of all that was decided."""
    chosen, computed = [], []
    for name, why in decided.reasons.items():
        if name in decided.settings:
            chosen.append((name, _shown(config.value(name)), why))
        elif hasattr(decided, name):
            computed.append((name, str(getattr(decided, name)) or "none", why))
    return chosen + computed


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
