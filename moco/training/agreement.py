"""Agreement: ranks settle numbers at every step, so that all of them save and stop together."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch


class Agreement:
    """A group of the ranks' CPUs, since over GPUs every step would wait for the device."""

    def __init__(self) -> None:
        self._group: Any = None  # of processes, where there are several
        self._asked: tuple[Any, torch.Tensor] | None = None  # of the step before, and on its way

    def open(self, trainer: pl.Trainer) -> None:
        """Make the group; all ranks do so together."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def largest(self, *values: int) -> list[int]:
        """Return the largest of each value over all ranks, for which all wait."""
        if self._group is None:
            return list(values)
        work, tensor = self._ask(values)
        work.wait()
        return tensor.tolist()

    def largest_before(self, *values: int) -> list[int]:
        """Return the largest of each value that the ranks gave at the step before, 0 at the first.

        None waits for it. One process alone gets its own values at once.
        """
        if self._group is None:
            return list(values)
        before, self._asked = self._asked, self._ask(values)
        if before is None:
            return [0] * len(values)
        before[0].wait()
        return before[1].tolist()

    def close(self) -> None:
        """Take the last answer, so that no rank is left waiting."""
        if self._asked:
            self._asked[0].wait()
        self._asked = None

    def _ask(self, values: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
        tensor, most = torch.tensor(values), torch.distributed.ReduceOp.MAX
        return torch.distributed.all_reduce(tensor, most, self._group, async_op=True), tensor
