"""A run: from settings to a trained encoder, in a directory that holds everything about it
(`moco.run_directory`).

`pretrain` is what `train.py` calls. It decides what `auto` means, refuses what cannot work before
the first step, says on standard error what it decided, and hands the parts to Lightning's Trainer.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from moco.algorithm.pretrain import MoCo
from moco.checkpoints.load import restore_pretraining
from moco.config import RunError, TrainConfig, UserError
from moco.images import sources
from moco.images.labelled import LabelledData
from moco.images.loader import PretrainData, check_batch
from moco.images.resident import make_resident
from moco.run_directory import check_images, check_same, find_run, new_run, write_config
from moco.training.decide import (
    accelerator,
    check_queue,
    check_shares,
    choose_compile,
    choose_devices,
    choose_key_bn,
    choose_precision,
    own_device,
)
from moco.training.explain import explain
from moco.training.guard import NonFiniteGuard, Watch
from moco.training.monitor import KNNMonitor, Progress, Readings
from moco.training.ranks import RankLauncher, free_port
from moco.training.saving import AtomicCheckpointIO, Checkpoints, Signals, requeue
from moco.training.tracking import finish, loggers

log = logging.getLogger("moco")


def pretrain(
    config: TrainConfig,
    resume: str = "",
    recipe: str = "",
    init_from: str = "",
    allow_partial: bool = False,
) -> dict[str, Any]:
    """Train as `config` says and return the results.

    Args:
        config: Settings, passed by `moco.config.check`; `auto` values are decided here.
        resume: Empty, a run directory, a checkpoint, or "auto" for the latest run.
        recipe: Name for a new run's directory.
        init_from: A checkpoint in any layout whose weights a new run starts from.
        allow_partial: Accept such a checkpoint although it fits only in part.

    Returns: Final kNN, loss, images per second, steps and paths, as plain values; `stopped_by` is
        the signal, if any.

    Raises:
        UserError: Anything that the user can mend, before the first step wherever possible.
    """
    _set_up_logging()
    before = signal.signal(signal.SIGUSR1, _stop_before_training)
    try:
        return _pretrain(config, resume, recipe, init_from, allow_partial)
    finally:
        signal.signal(signal.SIGUSR1, before)


def _pretrain(
    config: TrainConfig, resume: str, recipe: str, init_from: str, allow_partial: bool
) -> dict[str, Any]:
    asked = asdict(config)
    source = sources.open_source(config.data, "train")
    check_batch(config.data, len(source))
    check_queue(config, len(source))
    devices = choose_devices(config)
    world = devices * config.trainer.num_nodes
    _set_threads(config, devices)
    config.model.key_bn, reason = choose_key_bn(config.model.key_bn, world)
    check_shares(config, world)
    found = find_run(resume, config.run.dir) if resume else None
    run_dir, checkpoint = found or (new_run(config, recipe), None)
    images = sources.identify(source, config.data.root)
    stored = read_stored(checkpoint, asked, images) if checkpoint else None
    pl.seed_everything(config.run.seed, verbose=False)
    data = PretrainData(
        config.data,
        config.run.seed,
        shuffle=config.model.key_bn in ("shuffle", "split"),
        symmetric=config.model.symmetric != "none",
        source=source,
    )
    module = MoCo(
        config.model, config.optim, config.data.channels, config.data.image_size, config.run.seed
    )
    if init_from:
        state, report = restore_pretraining(
            init_from, module.state_dict(), module.query_encoder.backbone, allow_partial
        )
        module.load_state_dict(state)
        log.info("starts from %s: %s", init_from, report)
    if stored and stored["global_step"] >= _total_steps(config, data.steps_per_epoch):
        log.info("%s is finished after %d steps: nothing to do", run_dir, stored["global_step"])
        return {
            "run_dir": str(run_dir),
            "checkpoint": str(checkpoint),
            "steps": stored["global_step"],
        }
    run = _Run(config, data, module, run_dir, devices)
    run.say_what_was_decided(reason)
    extras = {"config": asked, "images": images}
    return run.fit(checkpoint, stored["global_step"] if stored else 0, extras)


class _Run:
    """The parts of one run: data on its device, module, callbacks and Trainer."""

    def __init__(
        self, config: TrainConfig, data: PretrainData, module: MoCo, run_dir: Path, devices: int
    ) -> None:
        self.config, self.data, self.module, self.run_dir = config, data, module, run_dir
        self.devices = devices
        self.device = own_device(config)
        self.backend, self.why_compiled = choose_compile(
            config, _total_steps(config, data.steps_per_epoch)
        )
        data.prepare(self.device, str(run_dir / "bad_files.txt"), self.backend)
        if self.backend:
            module.compile_encoders(self.backend)
        module.accumulate = config.trainer.accumulate_grad_batches
        module.steps_per_epoch = -(-data.steps_per_epoch // module.accumulate)
        module.total_steps = _total_steps(config, data.steps_per_epoch)

    def fit(
        self, checkpoint: Path | None, start_step: int, extras: dict[str, Any]
    ) -> dict[str, Any]:
        """Train to the end, or to a signal."""
        config = self.config
        guard = NonFiniteGuard(config.run.skip_nonfinite, self.run_dir)
        readings = Readings(self.data, config.trainer.log_every_n_steps)
        monitor = KNNMonitor(self.labelled(), config.run, readings)
        signals = Signals()
        saver = Checkpoints(
            signals,
            self.run_dir / "checkpoints",
            config.run.checkpoint_every,
            config.run.checkpoint_minutes,
            config.run.keep_checkpoints,
            extras,
        )
        callbacks = [signals, guard, readings, monitor, saver]
        callbacks += [Watch(self.data.bad), Progress(readings)]
        trainer = self.trainer(callbacks, start_step)
        if trainer.is_global_zero:
            write_config(TrainConfig.from_dict(extras["config"]), self.run_dir)
        start = time.perf_counter()
        self._train(trainer, checkpoint)
        if saver.saved_step < trainer.global_step:
            raise RunError(
                f"the last checkpoint could not be written: make room in {self.run_dir} and go on "
                f"with --resume {self.run_dir}"
            )
        result = {
            "knn_top1": _rounded(monitor.last),
            "knn_top1_untrained": _rounded(monitor.first),
            **{name: _rounded(value) for name, value in monitor.few_shot.items()},
            "loss": _rounded(readings.latest.get("train/loss"), 4),
            "images_per_second": _rounded(readings.rate(), 1),
            "seconds": _rounded(time.perf_counter() - start, 1),
            "steps": trainer.global_step,
            "run_dir": str(self.run_dir),
            "checkpoint": str(self.run_dir / "checkpoints" / "last.ckpt"),
        }
        if saver.stop_signal:
            log.info(
                "stopped by signal %d after step %d: go on with --resume %s",
                saver.stop_signal,
                trainer.global_step,
                self.run_dir,
            )
            result["stopped_by"] = saver.stop_signal
            if saver.stop_signal == signal.SIGUSR1 and trainer.is_global_zero:
                requeue()
        return result if trainer.is_global_zero else {}

    def _train(self, trainer: pl.Trainer, checkpoint: Path | None) -> None:
        """Run Lightning's loop; what ends it before its time comes out in one line."""
        try:
            trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        except (UserError, RunError):
            raise
        except SystemExit:  # Lightning's answer to KeyboardInterrupt
            raise KeyboardInterrupt from None
        except Exception as error:
            raise explain(error, trainer, self.module, self.config.data) from error
        finally:
            self.data.close()
            finish()

    def trainer(self, callbacks: list[pl.Callback], start_step: int) -> pl.Trainer:
        """Build Lightning's Trainer without what this project does itself."""
        config = self.config.trainer
        several = self.devices * config.num_nodes > 1
        # The queue and the key encoder are equal on all ranks by construction: no buffer is
        # broadcast.
        ddp = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
        plugins: list[Any] = [AtomicCheckpointIO()]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # `Checkpoints` does it
        free_port()
        trainer = pl.Trainer(
            accelerator=accelerator(self.config),
            devices=self.devices,
            num_nodes=config.num_nodes,
            strategy=ddp if several else "auto",
            precision=choose_precision(self.config),
            max_epochs=config.max_epochs,
            max_steps=config.max_steps,
            accumulate_grad_batches=config.accumulate_grad_batches,
            deterministic=config.deterministic,
            benchmark=not config.deterministic,
            logger=loggers(self.config.run, self.run_dir, start_step),
            callbacks=callbacks,
            plugins=plugins,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        RankLauncher.replace(trainer.strategy)
        # `Checkpoints` answers signals; Lightning would wait for the device to ask all ranks.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        return trainer

    def labelled(self) -> LabelledData | None:
        """Open what kNN needs, sharing the decoded training images; None without labels."""
        if self.config.run.knn_every == 0:
            return None
        pair = sources.open_labelled(self.config.data, self.data.source)
        if pair is None:
            log.info("no labelled train and test splits: kNN is not read")
            return None
        bank, queries = pair
        queries, query_images, _ = make_resident(queries, self.config.data, self.device, None)
        if bank is self.data.source:
            return LabelledData(self.config.data, bank, queries, self.data.images, query_images)
        bank, bank_images, _ = make_resident(bank, self.config.data, self.device, None)
        return LabelledData(self.config.data, bank, queries, bank_images, query_images)

    def say_what_was_decided(self, reason: str) -> None:
        """Log what the run is, in the first lines, on rank 0."""
        config, data = self.config, self.data
        model, world = config.model, self.devices * config.trainer.num_nodes
        millions = sum(p.numel() for p in self.module.query_encoder.parameters()) / 1e6
        where = "streamed by workers" if data.images is None else f"resident ({data.resident})"
        log.info(
            "%s: %d images, %s; views %s at %d px, %d steps per epoch",
            data.source.name,
            len(data.source),
            where,
            config.data.views,
            config.data.image_size,
            self.module.steps_per_epoch,
        )
        log.info(
            "%s, %.2f M parameters; head %s, %d keys queued, temperature %g, key momentum %g",
            model.backbone,
            millions,
            model.head,
            model.queue_size,
            model.temperature,
            model.key_momentum,
        )
        log.info(
            "%d %s device(s), %s; global batch %d, per device %d; lr %g as given",
            world,
            self.device.type,
            choose_precision(config),
            config.data.batch_size,
            config.data.batch_size // world,
            config.optim.lr,
        )
        log.info("key BatchNorm: %s (%s)", model.key_bn, reason)
        compiled = "compiled" if self.backend else "not compiled"
        log.info("encoders and views: %s (%s)", compiled, self.why_compiled)
        log.info("run directory: %s", self.run_dir)


def _total_steps(config: TrainConfig, batches_per_epoch: int) -> int:
    trainer = config.trainer
    steps = trainer.max_epochs * -(-batches_per_epoch // trainer.accumulate_grad_batches)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def read_stored(checkpoint: Path, asked: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint's step and check that it belongs to these settings and images.

    Raises:
        UserError: Not one of our checkpoints, or of another recipe or data set.
    """
    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--resume {checkpoint} cannot be read ({reason}): name another checkpoint of the run"
        ) from None
    if not isinstance(stored, dict) or not {"config", "global_step", "loops"} <= stored.keys():
        raise UserError(
            f"--resume {checkpoint} is not a checkpoint of train.py: start from it with --init_from"
        )
    check_same(TrainConfig.from_dict(asked), stored["config"], checkpoint)
    check_images(images, stored.get("images"), checkpoint)
    return {"global_step": stored["global_step"]}


def _stop_before_training(number: int, frame: Any) -> None:
    """Answer SLURM's warning while the images are still read: there is nothing to save."""
    requeue()
    os._exit(128 + number)


def _set_threads(config: TrainConfig, devices: int) -> None:
    """Share the cores between the processes; two processes with all cores each would crawl."""
    if accelerator(config) == "cpu" and devices > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices))


def _set_up_logging() -> None:
    """Say our own lines plainly on standard error, on rank 0; keep libraries to warnings that
    matter.
    """
    rank = int(
        os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))
    )
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
