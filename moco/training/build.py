"""The parts of a run: data on its device, module, callbacks and Lightning's Trainer.

Nothing is trained here; `moco.training.run` says in which order the parts are built and used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from moco import distributed
from moco.algorithm.encoder import Encoder
from moco.algorithm.optim import step_before_decay
from moco.algorithm.pretrain import MoCo
from moco.algorithm.vit import side_of_patches, take_any_size
from moco.checkpoints.start import restore_pretraining
from moco.config import DataConfig, TrainConfig
from moco.config.setting import MOST_EPOCHS
from moco.images.growth import growth
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.scaling import PLAIN
from moco.run_directory import VERSION
from moco.training.agreement import Agreement
from moco.training.captured import CapturedStep, capturable, comes_between
from moco.training.clock import Clock
from moco.training.cores import SharedCores
from moco.training.decide import Decided, views_for
from moco.training.guard import NonFiniteGuard, Watch
from moco.training.hardware import own_device
from moco.training.metrics import MetricsLogger, Progress
from moco.training.monitor import KNNMonitor
from moco.training.outlook import Outlook
from moco.training.own import NOTHING, Own
from moco.training.quality import Quality, check_select, held_out_views
from moco.training.readings import open_labelled, open_test_images
from moco.training.saving import Checkpoints, Signals
from moco.training.showing import Showing
from moco.training.tracking import loggers
from moco.training.writing import AtomicCheckpointIO

log = logging.getLogger("moco")


@dataclass
class Run:
    """What takes part in training, built and ready."""

    trainer: pl.Trainer
    module: MoCo
    data: PretrainData
    metrics: MetricsLogger
    monitor: KNNMonitor
    quality: Quality
    saver: Checkpoints
    clock: Clock


def steps_per_epoch(config: TrainConfig, batches_per_epoch: int) -> int:
    """Return the optimiser steps of an epoch."""
    return -(-batches_per_epoch // config.trainer.accumulate_grad_batches)


def total_steps(config: TrainConfig, batches_per_epoch: int) -> int:
    """Return the optimiser steps of the whole run."""
    trainer = config.trainer
    steps = trainer.max_epochs * steps_per_epoch(config, batches_per_epoch)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def build_module(
    config: TrainConfig,
    decided: Decided,
    init_from: str,
    allow_partial: bool = False,
    own: Own = NOTHING,
) -> MoCo:
    """Build encoders and queue from the run's seed, or with the weights of a checkpoint."""
    pl.seed_everything(config.run.seed, verbose=False)
    data = config.data
    model = replace(config.model, key_bn=decided.key_bn, query_bn=decided.query_bn)
    size, seed = data.image_size, config.run.seed
    module = MoCo(model, config.optim, data.channels, size, seed, data.chunks, own.backbone)
    allow_sizes(module, data)
    if init_from:
        backbone, is_own = module.query_encoder.backbone, own.backbone is not None
        state, report = restore_pretraining(
            init_from, module.state_dict(), backbone, allow_partial, is_own
        )
        module.load_state_dict(state)
        log.info("starts from %s: %s", init_from, report)
    return module


def allow_sizes(module: MoCo, data: DataConfig) -> None:
    """Let ViTs take views of other sides than image_size, or patches of them, where there are."""
    if data.image_size_start or data.image_size_end or module.model_config.patches > 1:
        for encoder in (module.query_encoder, module.key_encoder):
            take_any_size(encoder.backbone)


def build_data(
    config: TrainConfig,
    decided: Decided,
    source: ImageSource,
    run_dir: Path,
    own: Own = NOTHING,
    has_begun: bool = False,
) -> PretrainData:
    """Decode what is to be resident, note in `decided` what is, and prepare what makes views.

    Args:
        config, own, decided: Of the run, and what it came to so far.
        source: The images.
        run_dir: Takes the names of files that cannot be read.
        has_begun: Whether the run goes on, and has decided before how its files are read.
    """
    resident = {"": config.data.resident, "streamed": "off"}.get(decided.resident, decided.resident)
    source, ends = pin_values(source, decided, has_begun)
    data = PretrainData(
        replace(config.data, resident=resident, **ends),
        config.run.seed,
        **views_for(config.model, decided.key_bn),
        source=source,
        own_views=own.views,
        naming=own.naming,
    )
    report = None if config.run.plan else str(run_dir / "bad_files.txt")  # a plan leaves nothing
    data.prepare(own_device(config), report, decided.compile)
    decided.resident, decided.images = data.resident, len(data.source)
    decided.pairs = data.partners and data.partners.checksum
    return data


def pin_values(
    source: ImageSource, decided: Decided, has_begun: bool
) -> tuple[ImageSource, dict[str, Any]]:
    """Read the images by the range that a resumed run has decided; note the range of a new run.

    A run that began without a range, as an older version did with colours of 16 bits, needs none.

    Returns:
        The source, and the settings with which other images are read alike.
    """
    reading = source.reading
    if decided.max_value:
        low, high = tuple(decided.min_value), tuple(decided.max_value)
        reading = replace(reading, low=low, high=high, reason="as the run began")
    elif has_begun and reading.reason.startswith("auto"):
        reading = replace(reading, low=PLAIN.low, high=PLAIN.high, reason="")
    if not reading.reason:
        return replace(source, reading=reading), {}
    ends = {"min_value": list(reading.low), "max_value": list(reading.high)}
    decided.min_value, decided.max_value = ends["min_value"], ends["max_value"]
    decided.reasons["max_value"] = reading.reason
    return replace(source, reading=reading), ends


def compile_parts(
    config: TrainConfig,
    decided: Decided,
    module: MoCo,
    data: PretrainData,
    callbacks: Sequence[pl.Callback] = (),
) -> list[pl.Callback]:
    """Compile the step to one graph where it can be one, else its encoders, if at all.

    Args:
        config, decided: Of the run.
        module, data: Its step and its views.
        callbacks: Of the user's, one of which may come between backward pass and optimiser.

    Returns:
        The callback that captures the step, where that can be done too.
    """
    data.in_graph = bool(decided.compile) and not why_in_parts(config, decided)
    if data.in_graph:
        module.compile_step(decided.compile, data.make_batch)
    elif decided.compile:
        module.compile_encoders(decided.compile)
    captured = data.in_graph and capturable(config, decided)
    return [CapturedStep()] if captured and not any(map(comes_between, callbacks)) else []


def why_in_parts(config: TrainConfig, decided: Decided) -> str:
    """Say why the compiled parts of a step cannot be one graph; empty where they can."""
    if decided.world > 1:
        return "the devices exchange keys and gradients within a step"
    if config.trainer.accumulate_grad_batches > 1:
        return "trainer.accumulate_grad_batches is above 1"
    if config.data.chunks > 1:
        return "data.chunks is above 1"
    if config.data.views == "own" or config.data.pairs:
        return "the views or the pairs are the user's own"
    if decided.accelerator == "cuda" and decided.resident == "memory":
        return "the images are in main memory"
    return ""


def set_length(module: MoCo, config: TrainConfig, data: PretrainData) -> None:
    """Tell module and data how long the run is: schedules and the size of views follow from it."""
    module.accumulate = data.accumulate = config.trainer.accumulate_grad_batches
    module.steps_per_epoch = steps_per_epoch(config, data.steps_per_epoch)
    module.total_steps = total_steps(config, data.steps_per_epoch)
    data.growth = growth(config.data, module.total_steps, size_unit(module.query_encoder))


def size_unit(encoder: Encoder) -> int:
    """Return the pixels that all sizes of the views are multiples of."""
    return encoder.patches * side_of_patches(encoder.backbone)


def assemble(
    config: TrainConfig,
    decided: Decided,
    module: MoCo,
    data: PretrainData,
    images: dict[str, int],
    run_dir: Path,
    start_step: int,
    callbacks: Sequence[pl.Callback],
    own: Own = NOTHING,
    held: ImageSource | None = None,
) -> Run:
    """Build the callbacks and the Trainer around module and data.

    Args:
        images: What tells the images from others; stored in every checkpoint.
        start_step: Of a resumed run, else 0.
        callbacks: Called after the run's own.
        own: Its loggers get the metrics too.
        held: Images that were set aside.
    """
    usual = compile_parts(config, decided, module, data, callbacks)
    set_length(module, config, data)
    kept = {"config": asdict(config), "decided": asdict(decided), "images": images}
    kept |= {"version": VERSION}
    at_epochs = any(getattr(each, "monitor", None) for each in callbacks)  # as EarlyStopping has
    metrics = MetricsLogger(data, config.trainer.log_every_n_steps, at_epochs)
    signals, agreement = Signals(), Agreement()
    with distributed.together():  # the ranks meet in `held_out_views`
        labelled = open_labelled(config, data)
        held = held or (labelled and labelled[1].source) or open_test_images(config, data)
    monitor = KNNMonitor(labelled, config.run, metrics, signals)
    views = held_out_views(config, data, held)
    check_select(config, monitor.data is not None, views is not None)
    quality = Quality(views, config, metrics, monitor.about)
    decay = step_before_decay(config.optim, module.total_steps)
    saver = Checkpoints(
        signals, metrics, quality, run_dir / "checkpoints", config.run, decay, kept, agreement
    )
    clock = Clock(config, decided, metrics, saver, agreement)
    usual += [signals, NonFiniteGuard(run_dir), metrics, clock, monitor, quality, saver]
    usual += [Watch(data.bad), Progress(metrics), Outlook(data, metrics), SharedCores()]
    usual += [Showing(config, data, metrics, start_step)]
    found = [*loggers(config.run, run_dir, start_step), *own.loggers]
    trainer = build_trainer(config, decided, logger=found, callbacks=[*usual, *callbacks])
    return Run(trainer, module, data, metrics, monitor, quality, saver, clock)


def build_trainer(config: TrainConfig, decided: Decided, **options: Any) -> pl.Trainer:
    """Build Lightning's Trainer without what this project does itself."""
    settings = config.trainer
    # The queue and the key encoder are equal on all ranks by construction: no buffer is broadcast.
    ddp = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Lightning would look for SLURM itself, and take what was asked for as what was started.
    started = TorchElasticEnvironment() if decided.world > 1 else LightningEnvironment()
    trainer = pl.Trainer(
        accelerator=decided.accelerator,
        devices=decided.devices,
        num_nodes=decided.num_nodes,
        strategy=ddp if decided.world > 1 else "auto",
        precision=decided.precision,
        max_epochs=MOST_EPOCHS if decided.is_open else settings.max_epochs,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        deterministic=settings.deterministic,
        benchmark=not settings.deterministic,
        plugins=[AtomicCheckpointIO(), started],
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in options["callbacks"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )
    # With several ranks Lightning asks rank 0 at each step whether SIGTERM came, and waits for the
    # device to answer (docs/faults.md, "How numbers are watched"). `Checkpoints` asks instead.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer
