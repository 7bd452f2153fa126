"""The clock: when the rate of a run that has minutes in the place of epochs begins to fall.

With `optim.schedule stable` the length of a run need not be known before its rate falls. So the
clock decides it while the run trains: once the time that is left is what the decay will take, the
step stands from which the rate falls, and with it the last one. Both are stored, and from then on
the run is one of so many steps, whatever becomes of the machine.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from moco import distributed
from moco.algorithm.optim import decay_start
from moco.config import OptimConfig, TrainConfig, UserError
from moco.training.agreement import Agreement
from moco.training.decide import Decided
from moco.training.metrics import MetricsLogger
from moco.training.saving import Checkpoints

log = logging.getLogger("moco")
LENGTH = ("trainer.max_epochs", "trainer.max_steps")  # settings that it fixes
MOST_MARKS = 256  # of the time that steps took


class Clock(pl.Callback):
    """Fix the last step of a run from its minutes and its speed; it stands before `Checkpoints`.

    The decay is predicted to take as long as the last so many steps took, but for the run's first
    one, which compiles and waits for the first images. Rank 0 decides.

    Args:
        config: Settings of the run.
        decided: What they came to; it takes the run's length.
        metrics: It knows how long training took, without the pauses for kNN and checkpoints.
        saver: It keeps the checkpoint of the step from which the rate falls.
        agreement: Of the ranks.

    Attributes:
        keep: Called where the length is fixed, to write it down.
    """

    def __init__(
        self,
        config: TrainConfig,
        decided: Decided,
        metrics: MetricsLogger,
        saver: Checkpoints,
        agreement: Agreement,
    ) -> None:
        self.config, self.decided, self.metrics = config, decided, metrics
        self.saver, self.agreement = saver, agreement
        self.keep: Callable[[], None] = lambda: None
        self._before = 0.0
        self._marks: list[tuple[int, float]] = []  # (step, seconds of training until its end)

    @property
    def seconds(self) -> float:
        """Return how long the run has trained, with what it did before a resume."""
        return self._before + self.metrics.seconds

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Say that a resumed run still has its end to find."""
        if not self.decided.is_open:
            return
        if step := trainer.global_step:
            log.info(
                "after step %d the run has %.1f of its %g minutes left; the step from which its "
                "rate falls is still to be fixed, and may be another than before",
                step,
                self.config.run.minutes - self.seconds / 60,
                self.config.run.minutes,
            )
            self._expect(step, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock at the end of an optimiser step; stop after the last one."""
        if batch_idx + 1 != module.window_end(batch_idx):
            return
        step = trainer.global_step
        if self.decided.is_open:
            self._mark(step)
            due = distributed.rank() == 0 and self._is_due(step)
            (total,) = self.agreement.largest(longest(self.config.optim, step) if due else 0)
            self._fix(step, total, module) if total else self._expect(step, module)
        elif step >= module.total_steps:
            trainer.should_stop = True  # the Trainer itself does not know where the run ends

    def _mark(self, step: int) -> None:
        """Note when a step ended, of more and more steps only every second."""
        first, every = step, 1
        if len(self._marks) > 1:
            first, every = self._marks[0][0], self._marks[1][0] - self._marks[0][0]
        if (step - first) % every == 0:
            self._marks.append((step, self.seconds))
        if len(self._marks) > MOST_MARKS:
            self._marks = self._marks[::2]

    def _pace(self, step: int) -> float:
        """Return the seconds of a step, over as many of the last ones as the decay will have.

        Until a second step has ended, the first one is all that is known.
        """
        first = max(2 * step - longest(self.config.optim, step), 0)
        place = bisect_right(self._marks, (first, math.inf)) - 1
        mark, before = self._marks[max(place, 0)]
        return (self.seconds - before) / (step - mark) if mark < step else self.seconds / step

    def _is_due(self, step: int) -> bool:
        """Tell whether the run would be late if its rate fell from the next step on.

        One that cannot be told from what the compiler took is not.
        """
        rest = longest(self.config.optim, step + 1) - step
        late = self.seconds + rest * self._pace(step) > 60 * self.config.run.minutes
        return late and step > self._marks[0][0]

    def _expect(self, step: int, module: Any) -> None:
        """Tell the module about how long the run is; its rate is constant until that is fixed."""
        left = 60 * self.config.run.minutes - self.seconds
        steps = step + int(left / max(self._pace(step), 1e-9))
        module.total_steps = max(steps, longest(self.config.optim, step + 1))

    def _fix(self, step: int, total: int, module: Any) -> None:
        """Make the run one of `total` steps, whose rate falls from here on."""
        minutes = self.config.run.minutes
        log.info(
            "the rate falls from step %d to the end after step %d: the run has trained for %.1f of "
            "%g minutes",
            step,
            total,
            self.seconds / 60,
            minutes,
        )
        length = dict(zip(LENGTH, (-(-total // module.steps_per_epoch), total), strict=True))
        self.decided.is_open, module.total_steps = False, total
        self.decided.settings |= length
        why = f"{minutes:g} minutes, fixed after step {step}, from which the rate falls"
        self.decided.reasons |= dict.fromkeys(length, why)
        self.saver.store_length(step, self.config.changed(length), self.decided)
        try:
            self.keep()
        except UserError as error:  # every checkpoint from this step on holds the length too
            log.warning("%s", error)

    def state_dict(self) -> dict[str, Any]:
        """Return the time for the checkpoint."""
        return {"seconds": self.seconds, "marks": [list(mark) for mark in self._marks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the time from a checkpoint."""
        self._before = state["seconds"]
        self._marks = [(step, seconds) for step, seconds in state["marks"]]


def longest(config: OptimConfig, step: int) -> int:
    """Return the most steps of a run whose rate falls from `step` on, see `decay_start`."""
    total = max(step + 1, int(step / (1 - config.decay_share)) - 2)
    while decay_start(config, total + 1) <= step:
        total += 1
    return total
