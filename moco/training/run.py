"""A run, from settings to a trained encoder: the order of things, and the page to start with.

`pretrain` is what `train.py` calls. It refuses what cannot work before the first step, decides what
`auto` means (`moco.training.decide`), builds the parts (`build`), says what was decided
(`announce`), and trains. All that it leaves is in one directory (`moco.run_directory`).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from moco import distributed, rendezvous, slurm
from moco.algorithm.pretrain import MoCo
from moco.checks import check
from moco.config import RunError, TrainConfig
from moco.images import aside, sources
from moco.images.formats import escaped
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.reports.facts import note_result, note_start
from moco.run_directory import find_run, new_run, sole_run, write_config, write_names
from moco.training.announce import (
    results,
    say_verdict,
    say_what_was_decided,
    set_up_logging,
    write_page,
)
from moco.training.autoconfigure import Settings, choose_length
from moco.training.build import Run, assemble, build_data, build_module
from moco.training.decide import Decided, check_held
from moco.training.explain import fit
from moco.training.followed import check_followed
from moco.training.hardware import free_memory, name_device, own_device
from moco.training.own import NOTHING, Own
from moco.training.rehearsal import Pace, rehearse, tell_plan
from moco.training.saving import end_together
from moco.training.settling import decide_how, expected_steps, settle
from moco.training.stored import (
    Stored,
    before_decay,
    extend,
    last_readable,
    read_stored,
    say_finished,
)
from moco.training.tracking import finish
from moco.training.trial import check_encoder

log = logging.getLogger("moco")


@dataclass(frozen=True)
class Request:
    """What a run is asked for besides its settings.

    Attributes:
        resume: Empty, a run directory, a checkpoint, or "auto": the run with the newest one.
        recipe: Name for a new run's directory.
        init_from: A checkpoint in any layout whose weights a new run starts from.
        allow_partial: Accept such a checkpoint although it fits only in part.
        callbacks: Of Lightning, called after the run's own.
        extend_by: Epochs that a resumed run gets besides those that it has.
        accept_jump: Accept that its rate jumps for that.
        command: Words of the command line, for the page at the end.
        own: What Python gives in the place of settings.
    """

    resume: str = ""
    recipe: str = ""
    init_from: str = ""
    allow_partial: bool = False
    callbacks: Sequence[pl.Callback] = ()
    extend_by: int = 0
    accept_jump: bool = False
    command: Sequence[str] = ()
    own: Own = NOTHING


class Place(NamedTuple):
    """Where a run lies, whether it begins there, and the checkpoint from which it goes on."""

    run_dir: Path
    is_new: bool
    checkpoint: Path | None


def pretrain(config: TrainConfig, **asked: Any) -> dict[str, Any]:
    """Train as `config` says and return the results.

    Args:
        config: Settings, passed by `moco.checks.check`; `auto` values are decided here.
        asked: Fields of `Request`.

    Returns: Last kNN and loss with the steps that they were read at, the comparison with what needs
        no training, images per second, steps and paths, as plain values; null is what was not read.
        `stopped_by` is the signal, if any.

    Raises:
        UserError: Anything that the user can mend, before the first step wherever possible.
    """
    set_up_logging()
    rendezvous.connect(own_device(config))
    result = _pretrain(config, Request(**asked))
    if distributed.rank():  # which ends as the run does: torchrun takes an end with 0 for success
        result = {name: result[name] for name in ("stopped_by",) if name in result}
    if "stopped_by" in result:
        end_together()
    rendezvous.disconnect()
    is_finished = "loss" in result and "stopped_by" not in result
    return result | (write_page(config, Path(result["run_dir"])) if is_finished else {})


def _pretrain(config: TrainConfig, request: Request) -> dict[str, Any]:
    """As `pretrain`; the processes are connected."""
    own = request.own
    with contextlib.ExitStack() as held:  # what rank 0 holds until the run has ended
        source, images = _open(config, own)
        # All ranks have the settings of rank 0.
        config, place = distributed.from_first(lambda: (config, _begin(config, request, held)))
        with distributed.together():
            asked, stored = config, None
            if place.checkpoint:
                config, stored = read_stored(place.checkpoint, config, images, place.run_dir)
                if source.images is None and config.data.channels != "auto":
                    source = replace(source, channels=config.data.channels)  # as it was decided
            source, held_out = _set_aside(config, source, stored)
            settings = settle(config, source, stored, own, init_from=request.init_from)
            count = stored.count(len(source)) if stored else len(source)
            if stored and request.extend_by:
                extend(settings, stored, count, request.extend_by, request.accept_jump)
        start_step = stored.step if stored else 0
        is_open = bool(stored and stored.decided and stored.decided.is_open)
        expected = expected_steps(settings.config, count)
        if stored and start_step >= expected and not is_open:
            say_finished(settings, str(place.checkpoint), start_step)
            where = None if place.is_new else str(place.run_dir)
            return {"run_dir": where, "checkpoint": str(place.checkpoint), "steps": start_step}
        with distributed.together():
            is_free = place.is_new and request.resume != "auto" and not config.run.plan
            if is_free and distributed.rank() == 0:
                held.enter_context(sole_run(place.run_dir, place.is_new))
        decided, module, data, pace = _build(settings, stored, source, place.run_dir, request)
        decided.held_out = len(held_out or ())
        with distributed.together():
            if config.run.plan:
                return tell_plan(settings.config, decided, module, data, pace, start_step)
            parts = settings.config, decided, module, data
            run = assemble(
                *parts, images, place.run_dir, start_step, request.callbacks, own, held_out
            )
            has_labels, has_views = run.monitor.data is not None, run.quality.views is not None
            check_followed(request.callbacks, settings.config.run, has_labels, has_views)
            say_what_was_decided(*parts, place.run_dir)
            run.monitor.is_loaded = bool(request.init_from) or own.backbone is not None
            if run.trainer.is_global_zero:
                run.clock.keep = lambda: write_config(asked, asdict(decided), place.run_dir)
                run.clock.keep()
                if held_out:
                    names = map(held_out.called, range(len(held_out)))
                    write_names(place.run_dir, map(escaped, names))
                device = name_device(decided.accelerator)
                note_start(place.run_dir, start_step, request.recipe, request.command, device)
        for part in run.monitor.data or ():
            part.bad.look_ahead()
        return _fit(run, place)


def _open(config: TrainConfig, own: Own) -> tuple[ImageSource, dict[str, int]]:
    """Open the images, the same ones on all ranks; return them and what tells them from others."""
    if own.source is None:
        log.info("opening the images of %s", config.data.root or config.data.dataset)
    with distributed.together():
        source = own.source or sources.open_source(config.data, "train")
    images = sources.identify(source, config.data.root)
    distributed.check_alike(images, f"the files of data.root {config.data.root!r}")
    return source, images


def _set_aside(
    config: TrainConfig, source: ImageSource, stored: Stored | None
) -> tuple[ImageSource, ImageSource | None]:
    """Return the images to train on, and those that are set aside to measure on, or None."""
    before = stored.decided.held_out if stored and stored.decided else None
    kept, held_out = aside.part(source, config.data, config.run, before)
    if held_out:
        log.info(
            "run.held_out: %d of %d images are not trained on, to measure quality on them "
            "(0 trains on all)", len(held_out), len(source),
        )  # fmt: skip
    return kept, held_out


def _build(
    settings: Settings, stored: Stored | None, source: ImageSource, run_dir: Path, request: Request
) -> tuple[Decided, MoCo, PretrainData, Pace | None]:
    """Decide how to compute, read the images, and build the module; rehearse where it is needed."""
    weights = request.init_from, request.allow_partial, request.own
    with distributed.together():
        decided = decide_how(settings, expected_steps(settings.config, len(source)), stored)
        module = build_module(settings.config, decided, *weights)
        if not stored:
            check_encoder(module.query_encoder, settings.config)
        before = stored.decided if stored else None
        data = build_data(settings.config, decided, source, run_dir, request.own, bool(before))
        if before:
            check_held(decided, before)
    if distributed.world_size() > 1:  # alone, a million paths are summed for nothing
        root = data.config.root
        read = sources.identify(data.source, root)
        distributed.check_alike(read, f"the readable files of data.root {root!r}")
    data.bad.look_ahead()
    pace = None
    if settings.config.run.plan or settings.config.undecided():
        pace = rehearse(settings.config, decided, module, data)
        del module
        free_memory()  # for the next
        with distributed.together():
            if settings.config.undecided():
                decided.is_open = settings.config.ends_by_clock
                choose_length(settings, data.steps_per_epoch, pace.seconds)
                check(settings.config)
            module = build_module(settings.config, decided, *weights)
    decided.settings, decided.reasons = settings.chosen, decided.reasons | settings.reasons
    return decided, module, data, pace


def _begin(config: TrainConfig, request: Request, held: contextlib.ExitStack) -> Place:
    """Choose the run directory, and the checkpoint to go on from.

    It runs on rank 0 alone, which tells the others. A run that goes on, or may go on, is kept to
    itself from here on: until then the process before, which still saves, may have taken further
    steps, or the first ones.
    """
    resume = request.resume
    is_sought = resume == "auto" and not config.run.plan
    if is_sought:
        held.enter_context(sole_run(Path(config.run.dir), is_new=False))
    run_dir, checkpoint = (find_run(resume, config.run.dir) if resume else None) or (None, None)
    if run_dir:
        if not is_sought:
            held.enter_context(sole_run(run_dir, is_new=False))
        if resume == "auto" or not Path(resume).is_file():
            checkpoint = last_readable(run_dir)
            checkpoint = before_decay(run_dir, checkpoint) if request.extend_by > 0 else checkpoint
        return Place(run_dir, False, checkpoint)
    run_dir = new_run(config, request.recipe)
    if checkpoint:
        log.info("%s lies in no run directory: the run goes on in %s", checkpoint, run_dir)
    return Place(run_dir, True, checkpoint)


def _fit(run: Run, place: Place) -> dict[str, Any]:
    """Train to the end, or to a signal."""
    trainer, saver, run_dir = run.trainer, run.saver, place.run_dir
    start = time.perf_counter()
    try:
        fit(trainer, run.module, run.data, ckpt_path=place.checkpoint, weights_only=True)
    except KeyboardInterrupt:
        step = saver.saved_step
        hint = [f"go on after step {step} with --resume {run_dir}"] if step else []
        raise KeyboardInterrupt(*hint) from None
    finally:
        finish()
    if saver.saved_step < trainer.global_step:
        what = "the last checkpoint could not" if saver.saved_step else "no checkpoint could"
        how = f"go on with --resume {run_dir}" if saver.saved_step else "start again"
        raise RunError(f"{what} be written: make room in {run_dir} and {how}")
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
    elif trainer.global_step < run.module.total_steps:
        log.info(
            "stopped by a callback after step %d of %d: go on with --resume %s",
            trainer.global_step,
            run.module.total_steps,
            run_dir,
        )
    else:
        say_verdict(run)
    if trainer.is_global_zero:
        note_result(run_dir, result)
    return result
