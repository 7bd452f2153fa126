"""Followed metrics: those that Lightning's EarlyStopping and ModelCheckpoint ask a run for."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from moco.config import RunConfig, UserError
from moco.config.setting import nearest_name
from moco.evaluation.measures import MEASURES
from moco.training.tracking import COLUMNS

_OF_LIGHTNING = (EarlyStopping, ModelCheckpoint)  # which log nothing themselves


def check_followed(
    callbacks: Sequence[pl.Callback], config: RunConfig, has_labels: bool, has_views: bool
) -> None:
    """Raise UserError where a callback follows a metric that the run never has.

    Beside a callback of any other class nothing is refused, since that one may log the metric, nor
    is an EarlyStopping that says strict=False, which goes on without its metric.

    Args:
        callbacks: Of the user's.
        config: Says how often kNN and the measures without labels are read.
        has_labels: Whether there is something to read kNN of.
        has_views: Whether there are held-out images, of which the measures are.
    """
    if any(type(each) not in _OF_LIGHTNING for each in callbacks):
        return
    quality = {f"val/{name}" for name in MEASURES}
    never = set() if has_labels and config.knn_every else {"val/knn_top1"}
    never |= set() if has_views and config.knn_every else quality
    there = [name for name in COLUMNS if "/" in name and name not in never]
    for each in callbacks:
        name = getattr(each, "monitor", None)
        known = [*there, *(("epoch", "step") if isinstance(each, ModelCheckpoint) else ())]
        if name is None or name in known or not getattr(each, "strict", True):
            continue
        who = f"the callback {type(each).__name__} follows {name!r}"
        if name in never:
            missing = "labels" if name == "val/knn_top1" else "held-out images"
            why = f"there are no {missing}" if config.knn_every else "run.knn_every is 0"
            raise UserError(
                f"{who}, which is never read here, since {why}: mend that, or follow one of "
                f"{', '.join(there)}"
            )
        near = nearest_name(str(name), there, "/")
        hint = f"did you mean {near!r}? There" if near else "there"
        raise UserError(f"{who}, which no run has: {hint} are {', '.join(there)}")
