"""The compiled step: views, shuffle, key update, encoders, loss and queue as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from moco.algorithm.batch import Batch
from moco.algorithm.contrast import KeyQueue

# Small kernels that do not depend on each other, such as those of BatchNorm, are launched as one.
OPTIONS = {"inductor": {"combo_kernels": True}}


def one_graph(
    training_step: Callable[[Batch, int], Tensor],
    queues: Sequence[KeyQueue],
    make_batch: Callable[[Any], Batch],
    backend: str,
) -> Callable[[Any, int], Tensor]:
    """Compile a step with its views to one graph, for one device and one batch to a step.

    All that differs between two steps is in tensors, and the state is changed in place, so that one
    graph serves the run.

    Args:
        training_step: Of the algorithm.
        queues: Their keys are copied before each step, see `KeyQueue.snapshot`.
        make_batch: Makes the views of what the loader yields, whose values are all tensors.
        backend: Of torch.compile.

    Returns:
        What takes the place of `training_step`, from what the loader yields.
    """

    def step(images: Any) -> Tensor:
        return training_step(make_batch(images), 0)

    # torch counts the graphs of a code object and refuses the ninth: each run has its own.
    own = FunctionType(step.__code__.replace(), globals(), "step", None, step.__closure__)
    options = OPTIONS.get(backend)
    graph = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)

    def compiled_step(images: Any, batch_idx: int) -> Tensor:
        for queue in queues:
            queue.taken.copy_(queue.keys)
        return graph(images)

    return compiled_step
