"""Agreement: ranks settle numbers at every step, so that all of them save and stop together."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch


class Agreement:
    """A group of the ranks' CPUs, since over GPUs every step would wait for the device."""

    def __init__(self) -> None:
        self._group: Any = None  # of processes, where there are several

    def open(self, trainer: pl.Trainer) -> None:
        """Make the group; all ranks do so together."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def largest(self, *values: int) -> list[int]:
        """Return the largest of each value over all ranks."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, self._group)
        return tensor.tolist()
