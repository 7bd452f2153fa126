"""MoCo in a Trainer of the user's own: what a run does besides steps, as callbacks.

`moco.training.run` builds its Trainer itself; here the user has built one, and nothing is decided.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from moco.algorithm.optim import step_before_decay
from moco.algorithm.pretrain import MoCo
from moco.checks import check_together
from moco.config import ModelConfig, RunConfig, TrainConfig, UserError
from moco.images import sources
from moco.images.loader import PretrainData
from moco.run_directory import VERSION
from moco.training.agreement import Agreement
from moco.training.build import allow_sizes, set_length
from moco.training.decide import choose_key_bn, choose_query_bn, views_for
from moco.training.guard import NonFiniteGuard, Watch
from moco.training.metrics import MetricsLogger, Progress
from moco.training.monitor import KNNMonitor
from moco.training.quality import Quality
from moco.training.saving import Checkpoints, Signals
from moco.training.shares import check_shares
from moco.training.trial import check_encoder
from moco.training.writing import AtomicCheckpointIO


def callbacks(
    module: MoCo,
    data: PretrainData,
    dir: str | os.PathLike[str],
    log_every: int = 50,
    checkpoint_every: int = 0,
    checkpoint_minutes: float = 10.0,
    keep_checkpoints: int = 2,
) -> list[pl.Callback]:
    """Return what a plain Trainer needs to train MoCo, and to save it so that it resumes exactly.

    They prepare the images on the Trainer's device, tell the schedules how long the run is and what
    its loss came to, log to the Trainer's loggers, watch for NaN, and write checkpoints, also after
    Ctrl-C and SIGTERM.
    `trainer.fit(..., ckpt_path=f"{dir}/checkpoints/last.ckpt")` goes on, mid-epoch too, and
    `moco.load_backbone` reads them.

    Args:
        module: Its `key_bn` must be decided: split on one device, shuffle on several.
        data: Not yet prepared; with `shuffle` where keys are split or shuffled.
        dir: Takes checkpoints/.
        log_every: Optimiser steps between readings.
        checkpoint_every: Steps between checkpoints; 0: by the clock alone, -1: once an epoch.
        checkpoint_minutes: Between further checkpoints; 0: there are none.
        keep_checkpoints: Newest checkpoints that are kept.
    """
    run_dir = Path(dir)
    run = RunConfig(
        seed=data.seed,
        dir=str(run_dir),
        knn_every=0,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        keep_checkpoints=keep_checkpoints,
    )
    config = TrainConfig(module.model_config, module.optim_config, data.config, run=run)
    metrics, signals = MetricsLogger(data, log_every, at_epochs=True), Signals()
    extras: dict[str, Any] = {"version": VERSION}
    quality, place = Quality(None, config, metrics), run_dir / "checkpoints"
    saver = Checkpoints(signals, metrics, quality, place, run, 0, extras, Agreement())
    first, monitor = Preparation(config, run_dir, saver), KNNMonitor(None, run, metrics, signals)
    return [first, signals, NonFiniteGuard(run_dir), metrics, monitor, saver, Progress(metrics)]


def check_whole_epochs(limit: int | float, batches: int) -> None:
    """Raise UserError where epochs are cut short: schedules, order and resume count whole ones.

    Args:
        limit: The Trainer's `limit_train_batches`, a share or, as a whole number, batches.
        batches: Of an epoch.
    """
    if limit < batches if isinstance(limit, int) else limit != 1:
        raise UserError(
            f"the Trainer's limit_train_batches is {limit} (overfit_batches and fast_dev_run set "
            "it too), and schedules and resume count whole epochs: leave these out, and set "
            "max_steps or max_epochs for a short run"
        )


def check_batch_norm(model: ModelConfig, world: int, synced: bool) -> None:
    """Raise UserError where a run would choose another BatchNorm on these devices.

    Args:
        model: Its `key_bn` and `query_bn` are decided.
        world: Devices over all machines.
        synced: Whether BatchNorm can reach over several devices.
    """
    chosen = {
        "key_bn": choose_key_bn(model.key_bn, world, model.queue_size != 0, synced),
        "query_bn": choose_query_bn(model.query_bn, world, synced),
    }
    for name, (kind, why) in chosen.items():
        if (given := getattr(model, name)) != kind:
            raise UserError(f"model.{name} is {given}: take {kind} ({why})")


def check_parts_agree(module: MoCo, data: PretrainData, config: TrainConfig, world: int) -> None:
    """Raise UserError where module, data and Trainer contradict one another.

    Args:
        module, data: To be trained, and on what.
        config: Of all three.
        world: Devices over all machines.
    """
    model, optim = config.model, config.optim
    if (optim.schedule, optim.plateau_metric) == ("plateau", "val/knn_top1"):
        raise UserError(
            "optim.plateau_metric is val/knn_top1, and a Trainer of your own reads no kNN: "
            "set it to train/loss"
        )
    if module.chunks != config.data.chunks:
        raise UserError(
            f"MoCo has chunks={module.chunks} and DataConfig chunks={config.data.chunks}: give "
            "both the same"
        )
    for name, needed in views_for(model, model.key_bn).items():
        setting = {"shuffle": "key_bn", "symmetric": "symmetric"}[name]
        if (given := getattr(data, name)) != needed:
            raise UserError(
                f"PretrainData has {name}={given}, and model.{setting} "
                f"{getattr(model, setting)} needs {name}={needed}: change one of them"
            )
    check_together(config)
    check_shares(config, world, model.key_bn, model.query_bn)


class Preparation(pl.Callback):
    """Prepare images and schedules once the Trainer knows its device and length.

    Args:
        config: Of module and data.
        run_dir: Takes the names of unreadable files.
        saver: Stores the settings with each checkpoint.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, saver: Checkpoints) -> None:
        self.config, self.run_dir, self.saver = config, run_dir, saver
        self._watch: Watch | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Decode what is to be resident, and tell the module how long it trains."""
        if stage != "fit":
            return
        check_whole_epochs(trainer.limit_train_batches, trainer.datamodule.steps_per_epoch)
        data, device = trainer.datamodule, trainer.strategy.root_device
        own = replace(
            self.config.trainer,
            max_epochs=trainer.max_epochs if trainer.max_epochs > 0 else 1_000_000,
            max_steps=trainer.max_steps,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
        )
        config = replace(self.config, trainer=own)
        check_batch_norm(config.model, trainer.world_size, device.type == "cuda")
        check_parts_agree(pl_module, data, config, trainer.world_size)
        if config.data.chunks > 1:
            check_encoder(pl_module.query_encoder, config)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        data.prepare(device, str(self.run_dir / "bad_files.txt"))
        allow_sizes(pl_module, config.data)
        set_length(pl_module, config, data)
        self.saver.before_decay = step_before_decay(config.optim, pl_module.total_steps)
        reading = data.source.reading
        ends = {"min_value": list(reading.low), "max_value": list(reading.high)}
        images = replace(data.config, **(ends if reading.reason else {}))
        stored = asdict(replace(config, data=images))
        found = sources.identify(data.source, data.config.root)
        self.saver.extras |= {"config": stored, "images": found}
        self._watch = Watch(data.bad)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what the Trainer has made of the key encoder's BatchNorm meanwhile."""
        synced = any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.key_encoder.modules())
        if synced and self.config.model.key_bn != "sync":
            raise UserError(
                "the Trainer's sync_batchnorm makes one BatchNorm of all devices, through which "
                "keys leak: leave it out, model.key_bn and model.query_bn say which is taken"
            )

    def on_train_batch_end(self, *arguments: Any) -> None:
        """End the run where too many images cannot be read."""
        if self._watch is not None:
            self._watch.on_train_batch_end(*arguments)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End the workers."""
        trainer.datamodule.close()
