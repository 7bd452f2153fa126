"""A run, from settings to a trained encoder: the order of things, and the page to start with.

`pretrain` is what `train.py` calls. It refuses what cannot work before the first step, decides what
`auto` means (`moco.training.decide`), builds the parts (`build`), says what was decided
(`announce`), and trains. All that it leaves is in one directory (`moco.run_directory`).
"""

from __future__ import annotations

import contextlib
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

from moco import distributed, slurm
from moco.algorithm.pretrain import MoCo
from moco.config import RunError, TrainConfig, UserError, unknown_settings
from moco.images import sources
from moco.images.loader import PretrainData, check_batch
from moco.run_directory import (
    VERSION,
    check_images,
    check_same,
    find_run,
    new_run,
    sole_run,
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
from moco.training.decide import Decided, decide
from moco.training.explain import explain
from moco.training.hardware import own_device
from moco.training.shares import check_queue
from moco.training.tracking import finish
from moco.training.trial import check_encoder

log = logging.getLogger("moco")


def pretrain(
    config: TrainConfig,
    resume: str = "",
    recipe: str = "",
    init_from: str = "",
    allow_partial: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, Any]:
    """Train as `config` says and return the results.

    Args:
        config: Settings, passed by `moco.checks.check`; `auto` values are decided here.
        resume: Empty, a run directory, a checkpoint, or "auto" for the latest run.
        recipe: Name for a new run's directory.
        init_from: A checkpoint in any layout whose weights a new run starts from.
        allow_partial: Accept such a checkpoint although it fits only in part.
        callbacks: Of Lightning, called after the run's own.

    Returns: Last kNN and loss with the steps that they were read at, images per second, steps and
        paths, as plain values; null is what was not read. `stopped_by` is the signal, if any.

    Raises:
        UserError: Anything that the user can mend, before the first step wherever possible.
    """
    set_up_logging()
    distributed.connect(own_device(config))
    result = _pretrain(config, resume, recipe, init_from, allow_partial, callbacks)
    distributed.disconnect()
    return result


def _pretrain(
    config: TrainConfig,
    resume: str,
    recipe: str,
    init_from: str,
    allow_partial: bool,
    callbacks: Sequence[pl.Callback],
) -> dict[str, Any]:
    with contextlib.ExitStack() as held:  # what rank 0 holds until the run has ended
        log.info("opening the images of %s", config.data.root or config.data.dataset)
        with distributed.together():
            source = sources.open_source(config.data, "train")
        config, run_dir, checkpoint, is_new = distributed.from_first(
            lambda: _begin(config, len(source), resume, recipe, held)
        )
        images = sources.identify(source, config.data.root)
        distributed.check_alike(images, f"the files of data.root {config.data.root!r}")
        start_step, before = 0, ()
        with distributed.together():
            if checkpoint:
                start_step, *before = read_stored(checkpoint, config, images, run_dir)
        steps = total_steps(config, len(source) // config.data.batch_size)
        if start_step >= steps:
            log.info("%s is finished after %d steps: nothing to do", checkpoint, start_step)
            place = None if is_new else str(run_dir)
            return {"run_dir": place, "checkpoint": str(checkpoint), "steps": start_step}
        with distributed.together():
            decided = _decide(config, steps, *before)
            module = build_module(config, decided, init_from, allow_partial)
            if not checkpoint:
                check_encoder(module.query_encoder, config)
            data = build_data(config, decided, source, run_dir)
        if distributed.world_size() > 1:  # alone, a million paths are summed for nothing
            read = sources.identify(data.source, config.data.root)
            distributed.check_alike(read, f"the readable files of data.root {config.data.root!r}")
        with distributed.together():
            place = run_dir, start_step, images
            run = _assemble(config, decided, module, data, *place, callbacks)
            run.monitor.is_loaded = bool(init_from)
            if run.trainer.is_global_zero:
                if is_new:
                    held.enter_context(sole_run(run_dir, is_new))
                write_config(config, asdict(decided), run_dir)
        return _fit(run, run_dir, checkpoint)


def _begin(
    config: TrainConfig, count: int, resume: str, recipe: str, held: contextlib.ExitStack
) -> tuple[TrainConfig, Path, Path | None, bool]:
    """Choose run directory and checkpoint to go on from, and tell whether the directory is new.

    It runs on rank 0 alone, which tells the others. A run that goes on is kept to itself from here
    on: until then the process before, which still saves, may have taken further steps.
    """
    check_batch(config.data, count)
    check_queue(config, count)
    run_dir, checkpoint = (find_run(resume, config.run.dir) if resume else None) or (None, None)
    if run_dir:
        held.enter_context(sole_run(run_dir, is_new=False))
        if not Path(resume).is_file():
            _, checkpoint = find_run(str(run_dir), "")
        return config, run_dir, checkpoint, False
    run_dir = new_run(config, recipe)
    if checkpoint:
        log.info("%s lies in no run directory: the run goes on in %s", checkpoint, run_dir)
    return config, run_dir, checkpoint, True


def _decide(config: TrainConfig, steps: int, *before: Any) -> Decided:
    """Decide what is left to `auto`, for the processes that run.

    Raises:
        UserError: The settings ask for others, or cannot work here.
    """
    decided = decide(config, steps, *before)
    if decided.world != distributed.world_size():
        raise UserError(
            f"the settings ask for {decided.world} devices and {distributed.world_size()} process "
            "runs: start train.py, which starts one per device, or take trainer.devices 1"
        )
    _share_cores(decided)
    return decided


def _assemble(
    config: TrainConfig,
    decided: Decided,
    module: MoCo,
    data: PretrainData,
    run_dir: Path,
    start_step: int,
    images: dict[str, int],
    callbacks: Sequence[pl.Callback],
) -> Run:
    """Say what was decided, and build what trains."""
    if decided.compile:
        module.compile_encoders(decided.compile)
    set_length(module, config, data)
    say_what_was_decided(config, decided, module, data, run_dir)
    stored = {"config": asdict(config), "decided": asdict(decided), "images": images}
    extras = {"version": VERSION, **stored}
    return assemble(config, decided, module, data, run_dir, start_step, extras, callbacks)


def _fit(run: Run, run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train to the end, or to a signal."""
    trainer, saver = run.trainer, run.saver
    start = time.perf_counter()
    _train(run, run_dir, checkpoint)
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
            slurm.requeue()
    return result if trainer.is_global_zero else {}


def _train(run: Run, run_dir: Path, checkpoint: Path | None) -> None:
    """Run Lightning's loop; turn what ends it before its time into one line."""
    trainer, module, data = run.trainer, run.module, run.data
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (UserError, RunError):
        raise
    except SystemExit:  # Lightning's answer to KeyboardInterrupt
        step = run.saver.saved_step
        hint = [f"go on after step {step} with --resume {run_dir}"] if step else []
        raise KeyboardInterrupt(*hint) from None
    except Exception as error:
        raise explain(error, trainer, module, data.config) from error
    finally:
        data.close()
        finish()


def load_stored(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, its tensors by need.

    Raises:
        UserError: It cannot be read, or is none of ours.
    """
    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--resume {checkpoint} cannot be read ({reason}): name another checkpoint of the run"
        ) from None
    parts = {"config": dict, "global_step": int, "loops": dict}
    if not isinstance(stored, dict) or not all(
        isinstance(stored.get(name), kind) for name, kind in parts.items()
    ):
        raise UserError(
            f"--resume {checkpoint} is not a checkpoint of train.py: start from it with --init_from"
        )
    return stored


def read_stored(
    checkpoint: Path, config: TrainConfig, images: dict[str, Any], run_dir: Path
) -> tuple[int, Decided | None, TrainConfig]:
    """Check that a checkpoint belongs to these settings and images.

    Returns: Its step, what the run has decided (None in a run of an older version), and the
        settings that it was asked for.

    Raises:
        UserError: Not one of our checkpoints, or of another recipe or data set.
    """
    stored = load_stored(checkpoint)
    check_same(config, stored["config"], checkpoint)
    check_images(images, stored.get("images"), checkpoint)
    asked = stored_groups(run_dir)
    if run_dir.exists() and not asked:
        log.warning(
            "%s is missing or damaged: the settings in %s are taken",
            run_dir / "config.yaml",
            checkpoint,
        )
    gone = {*unknown_settings(stored["config"]), *unknown_settings(asked)}
    if gone:
        names = ", ".join(sorted(gone))
        log.info("%s: stored settings that are gone are left out: %s", run_dir, names)
    if (version := stored.get("version", 1)) != VERSION:
        log.info(
            "--resume %s: the run was begun by version %s of moco, whose random numbers were "
            "others: it goes on, but not exactly",
            checkpoint,
            version,
        )
    decided = Decided.from_dict(stored.get("decided"))
    if decided is None:
        log.info("%s keeps no decisions, of an older version: `auto` is decided anew", run_dir)
    return stored["global_step"], decided, TrainConfig.from_dict(stored["config"])


def _share_cores(decided: Decided) -> None:
    """Share the cores between the processes; two processes with all cores each would crawl."""
    shared = decided.accelerator == "cpu" and decided.devices > 1
    if shared and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // decided.devices))
