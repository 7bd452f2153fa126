"""What reliability costs: a checkpoint, and the guard against numbers that are not finite.

    python benchmarks/reliability.py [--model.backbone resnet50 ...]

The guard's cost is measured twice: the time inside its hooks as a share of a step's (medians), and
the ratio of the times of two ways to train that take turns, block by block, in one process, with it
and without it (median, lower and upper quartile: noise of some percent on shared cores). A
checkpoint's cost is the median time of a save (written, flushed to disk, renamed) against five
minutes between saves. Any option of train.py may be given; the default is ResNet-50.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import wait
from moco.checks import check
from moco.command import cli
from moco.config import TrainConfig
from moco.training import run
from moco.training.guard import NonFiniteGuard
from moco.training.saving import Checkpoints

EXTRAS = {
    "blocks": {"type": int, "default": 16, "help": "Turns with and without the guard, half each"},
    "block_steps": {"type": int, "default": 2, "help": "Steps of one turn"},
    "saves": {"type": int, "default": 5, "help": "Checkpoints that are timed"},
}
DEFAULTS = [
    *("--model.backbone", "resnet50", "--model.queue_size", "1024", "--data.dataset", "digits"),
    *("--data.channels", "3", "--data.image_size", "224", "--data.upscale", "28"),
    *("--data.batch_size", "32", "--run.knn_every", "0", "--trainer.log_every_n_steps", "1000"),
    *("--trainer.max_epochs", "1000", "--run.checkpoint_every", "1000000"),
]
HOOK_SECONDS: dict[int, float] = {}  # of each guarded step


class TakeTurns(pl.Callback):
    """Switch the guard on and off block by block, and time the blocks."""

    def __init__(self, block_steps: int) -> None:
        self.block_steps, self.step = block_steps, 0
        self.guarded = True
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Begin a block; the first two warm up."""
        if self.step % self.block_steps == 0:
            wait()
            now = time.perf_counter()
            if self.step > 2 * self.block_steps:
                self.seconds[self.guarded].append(now - self.begin)
            self.begin, self.guarded = now, not self.guarded
            guard = next(c for c in trainer.callbacks if isinstance(c, NonFiniteGuard))
            guard.enabled = self.guarded
        self.step += 1


def guard_can_be_off() -> None:
    """Teach the guard, here only, to do nothing while it is switched off."""
    for name in ("on_before_optimizer_step", "on_train_batch_end"):
        method = getattr(NonFiniteGuard, name)

        def only_if_on(self, trainer, module, *args, method=method):
            if getattr(self, "enabled", True):
                wait()
                start = time.perf_counter()
                method(self, trainer, module, *args)
                wait()
                batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
                HOOK_SECONDS[batch] = HOOK_SECONDS.get(batch, 0) + time.perf_counter() - start

        setattr(NonFiniteGuard, name, only_if_on)


def main(argv: list[str]) -> dict[str, Any]:
    """Train, taking turns; then save a few times."""
    parser = cli.build_parser("Cost of the guards and of checkpoints.", TrainConfig, EXTRAS)
    config, extra = cli.parse(parser, TrainConfig, [*DEFAULTS, *argv])
    blocks, block_steps = extra["blocks"], extra["block_steps"]
    turns, saves = TakeTurns(block_steps), []
    guard_can_be_off()

    class TimeSaves(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            saver = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
            for _ in range(extra["saves"]):
                before = saver.seconds
                saver.save(trainer)
                saves.append(saver.seconds - before)

    config.trainer.max_steps = (blocks + 3) * block_steps
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = str(Path(folder) / "run")
        check(config)
        run.pretrain(config, callbacks=[turns, TimeSaves()])
        size = (Path(config.run.dir) / "checkpoints" / "last.ckpt").stat().st_size
    pairs = zip(turns.seconds[True], turns.seconds[False], strict=False)
    ratios = [with_it / without for with_it, without in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    save = statistics.median(saves)
    step = statistics.median(turns.seconds[False]) / block_steps
    hooks = statistics.median(HOOK_SECONDS.values())
    return {
        "guard_hooks_percent": round(100 * hooks / step, 2),
        "guard_hooks_seconds": round(hooks, 4),
        "guard_cost_percent": round(100 * (middle - 1), 2),
        "guard_cost_quartiles": [round(100 * (low - 1), 2), round(100 * (high - 1), 2)],
        "step_seconds": round(step, 4),
        "pairs": len(ratios),
        "checkpoint_seconds": round(save, 3),
        "checkpoint_mib": round(size / 2**20, 1),
        "checkpoint_cost_percent_every_5_minutes": round(100 * save / 300, 3),
    }


if __name__ == "__main__":
    logging.getLogger("moco").setLevel(logging.WARNING)
    print(json.dumps(main(sys.argv[1:])))
