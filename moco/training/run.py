"""A run, from settings to a trained encoder: the order of things, and the page to start with.

`pretrain` is what `train.py` calls. It refuses what cannot work before the first step, decides what
`auto` means (`moco.training.decide`), builds the parts (`build`), says what was decided
(`announce`), and trains. All that it leaves is in one directory (`moco.run_directory`).
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from moco.config import RunError, TrainConfig, UserError, unknown_settings
from moco.images import sources
from moco.images.loader import check_batch
from moco.run_directory import (
    check_images,
    check_same,
    find_run,
    new_run,
    stored_groups,
    write_config,
)
from moco.training.announce import results, say_what_was_decided, set_up_logging
from moco.training.build import (
    Run,
    assemble,
    build_data,
    build_module,
    set_length,
    total_steps,
)
from moco.training.decide import (
    accelerator,
    check_queue,
    check_shares,
    choose_compile,
    choose_devices,
    choose_key_bn,
)
from moco.training.explain import explain
from moco.training.saving import requeue
from moco.training.tracking import finish

log = logging.getLogger("moco")


def pretrain(
    config: TrainConfig,
    resume: str = "",
    recipe: str = "",
    init_from: str = "",
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, Any]:
    """Train as `config` says and return the results.

    Args:
        config: Settings, passed by `moco.config.check`; `auto` values are decided here.
        resume: Empty, a run directory, a checkpoint, or "auto" for the latest run.
        recipe: Name for a new run's directory.
        init_from: A checkpoint in any layout whose weights a new run starts from.
        callbacks: Of Lightning, called after the run's own.

    Returns: Final kNN, loss, images per second, steps and paths, as plain values; `stopped_by` is
        the signal, if any.

    Raises:
        UserError: Anything that the user can mend, before the first step wherever possible.
    """
    set_up_logging()
    before = signal.signal(signal.SIGUSR1, _stop_before_training)
    try:
        return _pretrain(config, resume, recipe, init_from, callbacks)
    finally:
        signal.signal(signal.SIGUSR1, before)


def _pretrain(
    config: TrainConfig,
    resume: str,
    recipe: str,
    init_from: str,
    callbacks: Sequence[pl.Callback],
) -> dict[str, Any]:
    asked = asdict(config)
    source = sources.open_source(config.data, "train")
    check_batch(config.data, len(source))
    check_queue(config, len(source))
    devices = choose_devices(config)
    world = devices * config.trainer.num_nodes
    _share_cores(config, devices)
    config.model.key_bn, why_key_bn = choose_key_bn(config.model.key_bn, world)
    check_shares(config, world)
    found = find_run(resume, config.run.dir) if resume else None
    run_dir, checkpoint = found or (new_run(config, recipe), None)
    images = sources.identify(source, config.data.root)
    stored = read_stored(checkpoint, asked, images) if checkpoint else None
    start_step = stored["global_step"] if stored else 0
    steps = total_steps(config, len(source) // config.data.batch_size)
    if start_step >= steps:
        log.info("%s is finished after %d steps: nothing to do", run_dir, start_step)
        return {"run_dir": str(run_dir), "checkpoint": str(checkpoint), "steps": start_step}
    module = build_module(config, init_from)
    backend, why_compiled = choose_compile(config, steps)
    data = build_data(config, source, run_dir, backend)
    if backend:
        module.compile_encoders(backend)
    set_length(module, config, data)
    compiled = f"{'compiled' if backend else 'not compiled'} ({why_compiled})"
    reasons = {"key_bn": why_key_bn, "compile": compiled}
    say_what_was_decided(config, module, data, run_dir, world, reasons)
    extras = {"config": asked, "images": images}
    run = assemble(config, module, data, devices, run_dir, start_step, extras, callbacks)
    if run.trainer.is_global_zero:
        write_config(TrainConfig.from_dict(asked), run_dir)
    return _fit(run, run_dir, checkpoint)


def _fit(run: Run, run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train to the end, or to a signal."""
    trainer, saver = run.trainer, run.saver
    start = time.perf_counter()
    _train(run, checkpoint)
    if saver.saved_step < trainer.global_step:
        raise RunError(
            f"the last checkpoint could not be written: make room in {run_dir} and go on "
            f"with --resume {run_dir}"
        )
    result = results(run, run_dir, time.perf_counter() - start)
    if saver.stop_signal:
        log.info(
            "stopped by signal %d after step %d: go on with --resume %s",
            saver.stop_signal,
            trainer.global_step,
            run_dir,
        )
        result["stopped_by"] = saver.stop_signal
        if saver.stop_signal == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
    return result if trainer.is_global_zero else {}


def _train(run: Run, checkpoint: Path | None) -> None:
    """Run Lightning's loop; turn what ends it before its time into one line."""
    trainer, module, data = run.trainer, run.module, run.data
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (UserError, RunError):
        raise
    except SystemExit:  # Lightning's answer to KeyboardInterrupt
        raise KeyboardInterrupt from None
    except Exception as error:
        raise explain(error, trainer, module, data.config) from error
    finally:
        data.close()
        finish()


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
    run_dir = checkpoint.parent.parent
    gone = {*unknown_settings(stored["config"]), *unknown_settings(stored_groups(run_dir))}
    if gone:
        log.info(
            "%s: stored settings that are gone are left out: %s", run_dir, ", ".join(sorted(gone))
        )
    return {"global_step": stored["global_step"]}


def _stop_before_training(number: int, frame: Any) -> None:
    """Answer SLURM's warning while the images are still read: there is nothing to save."""
    requeue()
    os._exit(128 + number)


def _share_cores(config: TrainConfig, devices: int) -> None:
    """Share the cores between the processes; two processes with all cores each would crawl."""
    if accelerator(config) == "cpu" and devices > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices))
