"""The outlook: how long a run will take, in its log after the first minute."""

from __future__ import annotations

import datetime
import logging
from typing import Any

import pytorch_lightning as pl

from moco.images.loader import PretrainData
from moco.training.metrics import MetricsLogger

log = logging.getLogger("moco")
FIRST_ESTIMATE = 60.0  # seconds of training


class Outlook(pl.Callback):
    """After its first minute, tell how long a run will take."""

    def __init__(self, data: PretrainData, metrics: MetricsLogger) -> None:
        self.data, self.metrics = data, metrics
        self.start, self.said = (0.0, 0.0), False

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Speak once; the first batch, which builds and warms up, does not count."""
        now, waited = self.metrics.seconds, self.data.wait_seconds
        if not self.start[0]:
            self.start = now, waited
        took, waited = now - self.start[0], waited - self.start[1]
        left, steps = self.metrics.seconds_left, module.total_steps - trainer.global_step
        if self.said or took < FIRST_ESTIMATE or left is None or not steps:
            return
        self.said = True
        log.info(
            "%s an epoch, %s left, until %s; %.0f%% of the time waiting for images",
            duration(left / steps * module.steps_per_epoch),
            duration(left),
            clock_time(left),
            100 * waited / took,
        )


def duration(seconds: float) -> str:
    """Return a time in the unit that people would say."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def clock_time(seconds: float) -> str:
    """Return when so many seconds will have passed: the time, and another day's date."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=min(seconds, 3e9))
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M}"
