"""Replay: the batch of any step again.

Nothing random has state, so the files and the views of a step follow from its number. Its losses
are those of the run where a checkpoint from before the step is there: the steps between are taken
again.
Shapes: N images, C embedding, K queue, R queries of an image, S side of a view, T side of a tile.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.algorithm.batch import Batch
from moco.algorithm.contrast import info_nce
from moco.algorithm.pretrain import MoCo
from moco.config import TrainConfig, UserError
from moco.distributed import local_rows, restore
from moco.images import aside, sources
from moco.images.formats import shown
from moco.images.loader import PretrainData
from moco.images.steps import Indices, StepLoader
from moco.pixels import normalisation
from moco.reports.facts import Facts, read_facts
from moco.reports.pairs import name_of
from moco.reports.pictures import draw_rows, tiles
from moco.run_directory import is_whole, same_images
from moco.training.announce import set_up_logging
from moco.training.build import build_data, build_module, build_trainer, set_length
from moco.training.clock import LENGTH, longest
from moco.training.decide import Decided
from moco.training.stored import load_stored

log = logging.getLogger("moco")
_DRAWN = 32  # images of the highest losses
# Decisions that change the last digits of numbers.
_COMPUTED = ("accelerator", "devices", "num_nodes", "precision", "compile")


class _Done(Exception):
    """The step is there; nothing more is to be trained."""


class _Catch(pl.Callback):
    """Note the batches of one optimiser step with their losses, and stop before it is taken."""

    def __init__(self, data: PretrainData, step: int) -> None:
        self.step, self.caught = step, []
        self._make, data.on_after_batch_transfer = data.on_after_batch_transfer, self._noted

    def _noted(self, indices: Indices, dataloader_idx: int) -> Batch:
        """Make the views of a batch, and note which images they are of."""
        self._last = indices
        return self._make(indices, dataloader_idx)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Compute what the step would; what that changes in the module is put back."""
        module.wants_metrics = False
        if trainer.global_step + 1 < self.step:
            return
        before = {name: value.clone() for name, value in module.state_dict().items()}
        module.on_train_batch_start(batch, batch_idx)  # seeds dropout as the step would
        if batch_idx % module.accumulate == 0:
            module.update_key_encoder()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            losses = losses_of_images(module, batch)
        self.caught.append((self._last, batch, losses))
        if batch_idx + 1 == module.window_end(batch_idx):
            raise _Done
        module.load_state_dict(before)


@torch.no_grad()
def losses_of_images(module: MoCo, batch: Batch) -> Tensor:
    """Return the loss of each image, N; their mean is the loss of the batch.

    It is `MoCo.training_step` without its mean over the images, and without what it changes.
    """
    queries = [module.encode_queries(view) for view in batch.query_views]  # N C, of patches R*N C
    keys = [module.encode_keys(view, batch.key_order) for view in batch.key_views]  # N C
    negatives = [queue.snapshot() for queue in module.queues] or keys
    count, found = len(batch.query_views[0]), []
    own_rows = None if module.queues else 0
    temperature = module.model_config.temperature
    for query, key, others in zip(queries, keys, cycle(negatives), strict=False):
        own = local_rows(key, count)
        _, logits = info_nce(query, own, others, temperature, own_rows)
        losses = logits.logsumexp(1) - logits[:, 0]  # R*N
        found.append(losses.view(count, -1).mean(1))
    return torch.stack(found).sum(0) * module.loss_scale


def replay(run_dir: Path, step: int, output: str = "", root: str = "") -> dict[str, Any]:
    """Make the batch of a step again, draw it, and compute the loss of each of its images.

    Args:
        run_dir: Of the run.
        step: As metrics.csv counts them: the first is 1.
        output: PNG to write; empty: replay_STEP.png in the directory.
        root: Where the images are now; empty: where the run found them.

    Returns: The step's loss and its images, those of the highest loss first. `exact` says whether
        the losses are the run's own; else they are those of the weights after `checkpoint_step`.

    Raises:
        UserError: No checkpoint, other images, or a step that the run does not have.
    """
    set_up_logging()
    facts = read_facts(run_dir)
    checkpoint, stored = _nearest(facts, step)
    config, decided = TrainConfig.from_dict(stored["config"]), _alone(stored)
    if decided.is_open and not facts.decided.get("is_open"):  # the clock has fixed it since then
        told = facts.decided["settings"]
        config = config.changed({name: told[name] for name in LENGTH if name in told})
        decided.is_open = False
    if root:
        config = config.changed({"data.root": root})
    module, data = _build(config, decided, stored, step)
    before = stored["global_step"]
    try:
        if before < step:
            log.info("from %s, %d steps on", checkpoint, step - 1 - before)
            caught = _caught_in_training(config, decided, module, data, checkpoint, step)
        else:
            log.info("no checkpoint from before step %d: its batch meets the weights of %s", step,
                     checkpoint)  # fmt: skip
            caught = _caught_at(module, data, stored, step)
    finally:
        data.close()
    path = Path(output or run_dir / f"replay_{step:09d}.png")
    images = _images(data, caught)
    _draw(path, data, caught, images)
    same = all(stored["decided"][name] == getattr(decided, name) for name in _COMPUTED)
    loss = torch.stack([losses.mean() for *_, losses in caught])[-1].item()
    logged = dict(facts.curve("train/loss")).get(step)
    if logged is not None and math.isfinite(loss):
        same &= math.isclose(loss, logged, rel_tol=2e-5, abs_tol=2e-5)
    return {
        "step": step,
        "checkpoint": str(checkpoint),
        "checkpoint_step": before,
        "exact": before < step and same,
        "loss": _finite(loss),
        "logged_loss": logged,
        "picture": str(path),
        "images": images,
    }


def _nearest(facts: Facts, step: int) -> tuple[Path, dict[str, Any]]:
    """Choose the newest whole checkpoint from before a step, or else the first one after it."""
    found = []
    for path in sorted((facts.path / "checkpoints").glob("*.ckpt")):
        if is_whole(path):
            found.append((load_stored(path)["global_step"], path))
    if not found:
        raise UserError(f"{facts.path / 'checkpoints'} holds no whole checkpoint: name another run")
    earlier = [each for each in found if each[0] < step]
    path = (max(earlier) if earlier else min(found))[1]
    return path, load_stored(path)


def _alone(stored: dict[str, Any]) -> Decided:
    """Return what the run has decided, for one process on this machine.

    Raises:
        UserError: The checkpoint does not say it.
    """
    decided = Decided.from_dict(stored.get("decided"))
    if decided is None:
        raise UserError("the checkpoint is of an older version, which kept no decisions")
    device = "cuda" if decided.accelerator == "cuda" and torch.cuda.is_available() else "cpu"
    found = replace(decided, accelerator=device, devices=1, num_nodes=1, compile="")
    if device == "cpu" and found.precision == "16-mixed":  # which no CPU computes in
        found.precision = "32-true"
    return found


def _build(
    config: TrainConfig, decided: Decided, stored: dict[str, Any], step: int
) -> tuple[MoCo, PretrainData]:
    """Build the module, and the images as the run has numbered them."""
    source = sources.open_source(config.data, "train")
    images = sources.identify(source, config.data.root)
    if not same_images(images, stored.get("images") or {}):
        raise UserError(
            f"data.root {config.data.root!r} holds other images than those of the run "
            f"({images['count']}, then {stored['images'].get('count')}): give --root"
        )
    source, _ = aside.part(source, config.data, config.run, decided.held_out)
    if decided.resident == "device" and decided.accelerator != "cuda":
        decided.resident = "memory"
    config = config.changed({"run.plan": True})  # nothing is left beside the run's own files
    data = build_data(config, decided, source, Path(), has_begun=True)
    module = build_module(config, decided, "")
    set_length(module, config, data)
    if decided.is_open:  # the rate is still constant, however long the run will be
        module.total_steps = max(module.total_steps, longest(config.optim, step + 1))
    if step > module.total_steps:
        raise UserError(f"step is {step} but the run has {module.total_steps} steps: lower it")
    return module, data


def _caught_in_training(
    config: TrainConfig,
    decided: Decided,
    module: MoCo,
    data: PretrainData,
    checkpoint: Path,
    step: int,
) -> list[tuple[Indices, Batch, Tensor]]:
    """Go on from a checkpoint, in memory alone, to the batches of a step."""
    catch = _Catch(data, step)
    trainer = build_trainer(config, decided, logger=False, callbacks=[catch])
    with contextlib.suppress(_Done):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return catch.caught


def _caught_at(
    module: MoCo, data: PretrainData, stored: dict[str, Any], step: int
) -> list[tuple[Indices, Batch, Tensor]]:
    """Meet the batches of a step with the weights of a later checkpoint."""
    module.load_state_dict(stored["state_dict"])
    module.to(data.device)
    epoch, place = divmod(step - 1, module.steps_per_epoch)
    first = epoch * data.steps_per_epoch + place * module.accumulate
    loader = StepLoader(data, position=lambda: first)
    data.loader = loader
    count = min(module.accumulate, data.steps_per_epoch - place * module.accumulate)
    found = []
    for indices, _ in zip(iter(loader), range(count), strict=False):
        indices = data.transfer_batch_to_device(indices, data.device, 0)
        batch = data.on_after_batch_transfer(indices, 0)
        found.append((indices, batch, losses_of_images(module, batch)))
    return found


def _images(
    data: PretrainData, caught: list[tuple[Indices, Batch, Tensor]]
) -> list[dict[str, Any]]:
    """List the images of the step, those of the highest loss first."""
    found = []
    for indices, _, losses in caught:
        for row, loss in zip(indices.index.tolist(), losses.tolist(), strict=True):
            paths = data.source.paths
            name = shown(paths[row]) if paths else name_of(data.source, row)
            found.append({"image": row, "file": name, "loss": _finite(loss)})
    return sorted(found, key=lambda each: -math.inf if each["loss"] is None else -each["loss"])


def _draw(
    path: Path,
    data: PretrainData,
    caught: list[tuple[Indices, Batch, Tensor]],
    images: list[dict[str, Any]],
) -> None:
    """Draw the view pairs of the images with the highest losses."""
    mean, std = (torch.tensor(values, device=data.device) for values in normalisation(data.config))
    views: dict[int, list[Tensor]] = {}
    for indices, batch, _ in caught:
        keys = restore(batch.key_views[0], batch.key_order)
        pair = tiles(batch.query_views[0], mean, std), tiles(keys, mean, std)
        for row, query, key in zip(indices.index.tolist(), *pair, strict=True):
            views[row] = [query, key]
    rows = [(f"{each['loss']}  {each['file']}", views[each["image"]]) for each in images[:_DRAWN]]
    draw_rows(path, rows, ["query", "key"])


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
