"""Count what one training step launches outside compiled graphs, without a GPU.

    python benchmarks/launches.py [--config RECIPE] [any option of train.py]

Claim: at most 40 launches outside graphs and at most 2 graphs, of configs/cifar10.yaml.

The program's own loop runs some steps on the CPU, on one random image and as if it were compiled:
in the place of torch.compile stands a function that runs what it is given and tells when it is
inside. Counted is every aten operation that computes, by the part of the step that asked for it,
once in a step without a reading and once in one with a reading. What is inside a graph counts as
nothing: forward and backward of a graph are launched from one place each.

Not counted are views, empty tensors, and values that the host reads. A `_foreach` or fused
operation is one, though a GPU may need a few kernels for it (one for about a hundred tensors). CUDA
graphs do not exist here: where a GPU replays the step, most of these launches are part of it.
The number of operations does not depend on the batch, so that it may be small.
The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.optimization.automatic import Closure
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import arguments, print_columns, report, train_settings
from moco import distributed
from moco.algorithm import pretrain
from moco.algorithm.contrast import KeyQueue
from moco.algorithm.pretrain import MoCo
from moco.checks import check
from moco.config import UserError
from moco.images import loader, sources, views
from moco.training import hardware, run
from moco.training.guard import NonFiniteGuard
from moco.training.metrics import MetricsLogger

MOST_LAUNCHES, MOST_GRAPHS = 40, 2
BATCH, IMAGES = 16, 50_000
PLAIN, READING, LAST = 2, 3, 4  # the steps that are counted, and one more
REST = "Lightning and hooks"
# The parts of a step: their names, and where they are asked for.
PARTS = [
    ("key order", distributed, "key_order"),
    ("views", views.ViewMaker, "__call__"),
    ("views", loader.PretrainData, "on_after_batch_transfer"),
    ("EMA", MoCo, "update_key_encoder"),
    ("normalise", MoCo, "encode_queries"),
    ("normalise", MoCo, "encode_keys"),
    ("loss", pretrain, "info_nce"),
    ("loss", MoCo, "training_step"),
    ("enqueue", KeyQueue, "snapshot"),
    ("enqueue", KeyQueue, "enqueue"),
    ("readings", MoCo, "take_note"),
    ("readings", MetricsLogger, "on_train_batch_end"),
    ("loss's backward", MoCo, "backward"),
    ("guard", NonFiniteGuard, "on_before_optimizer_step"),
    ("guard", NonFiniteGuard, "on_train_batch_end"),
    ("optimiser", torch.optim.SGD, "step"),
    (REST, Closure, "closure"),
]
FREE = (
    "empty",
    "detach",
    "local_scalar_dense",
    "_unsafe_view",
    "lift_fresh",
    "is_pinned",
    "resize",
)


class Launches(TorchDispatchMode):
    """Count the operations that compute, by the part that asks for them.

    Attributes:
        outside: Of the step that is counted, by part.
        inside: Operations in graphs.
        graphs: What tells the graphs apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.depth = [REST], 0
        self.outside: Counter[str] = Counter()
        self.inside = 0
        self.graphs: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        views = any(r.alias_info and not r.alias_info.is_write for r in returns)
        name = func._schema.name.partition("::")[2]
        if not views and not name.strip("_").startswith(FREE):
            if self.depth:
                self.inside += 1
            else:
                self.outside[self.parts[-1]] += 1
        return func(*args, **(kwargs or {}))

    def part(self, name: str, function: Callable) -> Callable:
        """Return the function, with what it launches counted under a name."""

        @functools.wraps(function)
        def named(*args: Any, **options: Any) -> Any:
            self.parts.append(name)
            depth = self.depth
            try:
                return function(*args, **options)
            finally:
                self.parts.pop()
                self.depth = depth  # a backward pass has ended, if it was one

        return named

    def compile(self, function: Callable, **_: Any) -> Callable:
        """Stand in for torch.compile: run the function as a graph."""

        @functools.wraps(function)
        def graph(*args: Any, **options: Any) -> Any:
            before, number = self.depth, self.inside
            self.depth += 1
            try:
                with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
                    result = function(*args, **options)
            finally:
                self.depth = before
            if self.inside > number and not before:
                plain = [a for a in args if isinstance(a, int | bool)]
                self.graphs.add((id(function), *plain))
            for value in torch.utils._pytree.tree_leaves(result):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    value.register_hook(self._go_inside)  # what comes after it is the graph's
            return result

        return graph

    def _go_inside(self, gradient: torch.Tensor) -> None:
        self.depth = 1


class CountTwoSteps(pl.Callback):
    """Count a step without a reading and one with a reading; keep what was found."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches
        self.found: dict[str, dict[str, int]] = {}
        self.graphs = self.inside = 0
        self._counting = contextlib.ExitStack()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """End and begin what is counted; the views of the next batch are made after this."""
        self._counting.close()
        step, launches = trainer.global_step, self.launches
        if step in (PLAIN, READING):
            name = "a step" if step == PLAIN else "with a reading"
            self.found[name] = dict(launches.outside)
            self.graphs, self.inside = len(launches.graphs), launches.inside
        launches.outside.clear()
        launches.inside = 0
        if step + 1 in (PLAIN, READING):
            self._counting.enter_context(launches)


@contextlib.contextmanager
def patched(launches: Launches) -> Iterator[None]:
    """Have every part counted under its name, no compiler called, and random image trained on."""

    def random_source(data: Any, split: str) -> sources.ImageSource:
        shape = (data.channels, data.image_size, data.image_size)
        image = torch.randint(0, 256, shape, dtype=torch.uint8)
        images = image.expand(IMAGES, *shape)  # the same one in every place takes no memory
        return sources.ImageSource("random", images, [], None, [], data.channels)

    with contextlib.ExitStack() as stack:
        for name, owner, attribute in PARTS:
            function = launches.part(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        stack.enter_context(mock.patch.object(torch, "compile", launches.compile))
        chosen = lambda *_: ("inductor", "as on a GPU")  # noqa: E731
        stack.enter_context(mock.patch.object(hardware, "choose_compile", chosen))
        stack.enter_context(mock.patch.object(run.sources, "open_source", random_source))
        yield


def count(words: list[str]) -> CountTwoSteps:
    """Train some steps with train.py's options and count two of them."""
    always = {
        "data.root": "nothing is read here", "data.batch_size": BATCH, "run.knn_every": 0,
        "run.checkpoint_every": 10**6, "run.checkpoint_minutes": 0, "trainer.max_steps": LAST,
        "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.precision": "bf16-mixed",
        "trainer.log_every_n_steps": READING,
    }  # fmt: skip
    given = [word for name, value in always.items() for word in (f"--{name}", str(value))]
    launches = Launches()
    counted = CountTwoSteps(launches)
    with tempfile.TemporaryDirectory() as folder:
        config = train_settings([*words, *given])
        config.run.dir = str(Path(folder) / "run")
        check(config)
        with patched(launches):
            run.pretrain(config, callbacks=[counted])
    return counted


def main(argv: list[str]) -> dict[str, Any]:
    """Count, and print the table."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--config", default="configs/cifar10.yaml", help="recipe (cifar10)")
    options, rest = parser.parse_known_args(argv)
    counted = count(["--config", options.config, *rest])
    parts = list(dict.fromkeys([name for name, *_ in PARTS]))
    lines = [["launches outside graphs", *counted.found]]
    for part in parts:
        lines.append([part, *(str(found.get(part, 0)) for found in counted.found.values())])
    totals = [sum(found.values()) for found in counted.found.values()]
    lines.append(["in all", *map(str, totals)])
    print(f"\n{options.config} as on one GPU, torch {torch.__version__}")
    print_columns(lines)
    reached = totals[0] <= MOST_LAUNCHES and counted.graphs <= MOST_GRAPHS
    print(
        f"  graphs: {counted.graphs}, with {counted.inside} operations; claimed: {MOST_LAUNCHES} "
        f"launches, {MOST_GRAPHS} graphs: {'reached' if reached else 'missed'}"
    )
    results = {"launches": counted.found, "graphs": counted.graphs, "inside": counted.inside}
    report("launches", results, options)
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
