"""What is compiled: the step with its views, shuffle, key update, encoders, loss and queue as one
graph, or encoders and views alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor, nn

from moco.algorithm.batch import Batch
from moco.algorithm.contrast import KeyQueue

# Small kernels that do not depend on each other, such as those of BatchNorm, are launched as one.
OPTIONS = {"inductor": {"combo_kernels": True}}
# A process may train many times, with a graph for each network and each size of views. torch keeps
# eight for a piece of code, and computes uncompiled from then on or, of whole graphs, raises.
_MOST_GRAPHS = 4096


def compile_network(network: nn.Module, backend: str) -> None:
    """Compile a network in place; its state dict keeps its keys."""
    _allow_graphs()
    network.compile(backend=backend, dynamic=False, options=OPTIONS.get(backend))


def whole_graph(function: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    """Compile a function to one graph for each shape of its tensors.

    Args:
        function: In tensors alone.
        backend, options: Of torch.compile.
    """
    _allow_graphs()
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, **options)


def _allow_graphs() -> None:
    config = torch.compiler.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    most = max(config.accumulated_recompile_limit, _MOST_GRAPHS)  # of all functions together
    config.accumulated_recompile_limit = most


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
        queues: Their keys are copied before each step, see `KeyQueue.snapshot`.
        make_batch: Makes the views of what the loader yields, whose values are all tensors.
        backend: Of torch.compile.

    Returns:
        What takes the place of `training_step`, from what the loader yields.
    """

    def step(images: Any) -> Tensor:
        return training_step(make_batch(images), 0)

    graph = whole_graph(step, backend, options=OPTIONS.get(backend))

    def compiled_step(images: Any, batch_idx: int) -> Tensor:
        for queue in queues:
            queue.taken.copy_(queue.keys)
        return graph(images)

    return compiled_step
