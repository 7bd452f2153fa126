"""The whole training loop against nothing but its encoders' work.

    python benchmarks/loop.py [--case resnet18|small|resnet50|imagenette] [--rounds N]
                              [--profile [TRACE]] [--uncaptured] [--feed JPEG_FOLDER]
                              [any option of train.py]

Claim: the loop of the program itself (`moco.training.run.pretrain` through Lightning: order, views,
queue, loss, EMA, optimiser, guards) reaches at least 95 % of the images per second of the bare
work, which is the query encoder's forward and backward and the key encoder's forward on views that
lie ready. Same networks, batch, precision and BatchNorm; both take turns, block by block, in one
process.

Images are random and resident; with `--feed` they are read from a folder of JPEGs by workers. On a
GPU the share of the memory bound of an H200 (published arithmetic, see BOUNDS), and the peak memory
are printed too. The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import ROOT, Row, arguments, progress, report, table, train_settings, wait
from benchmarks.profiles import add_profile, profiled
from moco.algorithm.compiled import OPTIONS
from moco.checks import check
from moco.config import DataConfig, TrainConfig, UserError
from moco.images import sources
from moco.images.image_source import ImageSource
from moco.training import build, run
from moco.training.hardware import choose_compile, choose_precision
from moco.training.own import Own

TARGET = 0.95
BARE, LOOP = "bare encoders", "whole loop"
# Images per second that an H200's memory (4.3 TB/s) allows a kernel by kernel step, norm, ReLU and
# add fused or not, in bf16: 659 / 488 MB an image for ResNet-50 at 224 px, 36.0 / 26.8 MB for
# ResNet-18 at 32 px. Arithmetic, not a measurement.
BOUNDS = {"resnet18": {"fused": 101_800, "unfused": 83_700},
          "resnet50": {"fused": 7_770, "unfused": 5_940}}  # fmt: skip
CIFAR = [
    *("--model.stem", "cifar", "--model.queue_size", "4096", "--model.key_momentum", "0.99"),
    *("--model.temperature", "0.1", "--data.views", "cifar", "--data.image_size", "32"),
]
# Options, and the batch on a CPU and on a GPU.
CASES = {
    "resnet18": (["--config", str(ROOT / "configs/cifar10.yaml")], 64, 512),  # as it is shipped
    "small": (["--model.backbone", "resnet10t", "--model.width", "0.25", *CIFAR], 64, 512),
    "resnet50": (["--model.queue_size", "4096", "--data.image_size", "224"], 16, 256),
    "imagenette": (
        ["--model.backbone", "resnet18", "--model.queue_size", "1024", "--data.image_size", "128"],
        32,
        256,
    ),
}


class TakeTurns(pl.Callback):
    """Stop the loop after each block, do as many bare steps, and go on; time both.

    Args:
        rounds: Blocks that are timed; one before them warms up.
        steps: Of one block.
        fed: Workers would fill their queues during bare blocks, and the loop would live on them:
            then all bare blocks come first, and two more blocks of the loop use the queues up.
        profile: Path for `profiled`, which gets one step of the loop after the last block.
    """

    def __init__(self, rounds: int, steps: int, profile: str | None, fed: bool = False) -> None:
        self.rounds, self.steps, self.profile, self.fed = rounds, steps, profile, fed
        self.warmup = 3 if fed else 1
        self.seconds: dict[str, list[float]] = {BARE: [], LOOP: []}
        self.done, self.peak = 0, 0
        self._stack = contextlib.ExitStack()
        self._views: tuple[Any, Any] | None = None
        self._start = 0.0

    @property
    def total(self) -> int:
        """Steps of the loop altogether."""
        profiled = 0 if self.profile is None else 2  # the last step writes a checkpoint
        return (self.rounds + self.warmup) * self.steps + 1 + profiled

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Compile the bare encoders where the loop has them inside its one graph."""
        self._encoders = module.query_encoder, module.key_encoder
        if trainer.datamodule.in_graph:
            options = OPTIONS["inductor"]
            self._encoders = [
                torch.compile(e, dynamic=False, options=options) for e in self._encoders
            ]

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, *_: Any) -> None:
        """Keep the first batch's views for the bare work."""
        if self._views is None:
            made = trainer.datamodule.make_batch(batch) if trainer.datamodule.in_graph else batch
            self._views = made.query_views, made.key_views

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """End a block of the loop; do the bare block; begin the next."""
        step = trainer.global_step - 1  # the first one is not counted: it compiles
        self._stack.close()
        if step % self.steps or step > (self.rounds + self.warmup) * self.steps:
            return
        device = module.device
        if step:
            self._count(LOOP, self.done >= self.warmup)
            self.done += 1
            progress(f"block {self.done} of {self.rounds + self.warmup}")
        if device.type == "cuda" and step:  # the first block has steps before the capture
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device))
        blocks = self.rounds + 1 if self.fed and not step else 0 if self.fed else 1
        for block in range(blocks if self.done <= self.rounds else 0):
            self._begin()
            for _ in range(self.steps):
                self.bare(trainer, module)
            self._count(BARE, block > 0 or self.done > 0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._begin()
        if self.done >= self.rounds + self.warmup and self.profile is not None:
            self._stack.enter_context(profiled(self.profile))

    def bare(self, trainer: pl.Trainer, module: Any) -> None:
        """Do what no loop can do without."""
        query_encoder, key_encoder = self._encoders
        trained = [p for p in module.query_encoder.parameters() if p.requires_grad]
        for query_view, key_view in zip(*self._views, strict=True):
            with trainer.precision_plugin.forward_context():
                query = query_encoder(query_view)
                with torch.no_grad():
                    key_encoder(key_view)
            # A captured step keeps its gradients in their places: these ones go elsewhere.
            torch.autograd.grad(query.float().square().sum(), trained)

    def _begin(self) -> None:
        wait()
        self._start = time.perf_counter()

    def _count(self, name: str, counts: bool) -> None:
        wait()
        if counts:
            self.seconds[name].append(time.perf_counter() - self._start)


def random_source(data: DataConfig) -> ImageSource:
    """Make random images, 50,000 of 32 px or 4,096 of 256 px."""
    small = data.image_size <= 32
    count, side = (50_000, 32) if small else (max(4_096, data.batch_size), 256)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return ImageSource("random", images, [], None, [], 3)


def repeated(source: ImageSource, least: int) -> ImageSource:
    """List files several times, so that an epoch lasts longer than the benchmark."""
    paths = source.paths * -(-least // len(source.paths))
    return ImageSource(source.name, None, paths, None, [], source.channels)


def settings(options: Any, rest: list[str]) -> TrainConfig:
    """Read train.py's options over those of the case."""
    arguments, on_cpu, on_gpu = CASES[options.case]
    batch = on_gpu if torch.cuda.is_available() else on_cpu
    always = [
        *(
            "--data.batch_size",
            str(batch),
            "--run.knn_every",
            "0",
            "--trainer.max_epochs",
            "100000",
        ),
        *("--run.checkpoint_every", "1000000", "--run.checkpoint_minutes", "0"),
        *("--run.report", "false", "--run.held_out", "0"),
        *("--optim.schedule", "constant"),
    ]
    always += ["--data.resident", "off"] if options.feed else []
    config = train_settings([*arguments, *always, *rest])
    if torch.cuda.is_available() and config.model.compile == "auto":
        config.model.compile = "on"  # as a long run has it
    return config


def main(argv: list[str]) -> dict[str, Any]:
    """Train, taking turns with the bare work, and print the table."""
    parser = arguments(__doc__, rounds=8)
    parser.add_argument("--case", choices=CASES, default="resnet18", help="encoder (resnet18)")
    parser.add_argument("--block-steps", type=int, default=0, help="of a turn (3; on a GPU 50)")
    parser.add_argument("--uncaptured", action="store_true", help="on a GPU: compile, no more")
    parser.add_argument("--feed", default="", metavar="FOLDER", help="read JPEGs from here")
    add_profile(parser)
    options, rest = parser.parse_known_args(argv)
    config = settings(options, rest)
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    steps = options.block_steps or (50 if on_gpu else 3)
    turns = TakeTurns(options.rounds, steps, options.profile, bool(options.feed))
    config.trainer.max_steps = turns.total
    if options.feed:
        files = sources.open_source(replace(config.data, root=options.feed), "train")
        source = repeated(files, turns.total * config.data.batch_size)
    else:
        source = random_source(config.data)
    config.data.dataset = "own"
    if options.uncaptured:
        build.capturable = lambda *_: False
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = str(Path(folder) / "run")
        check(config)
        run.pretrain(config, own=Own(source=source), callbacks=[turns])
    results = show(options, config, turns)
    report(f"loop-{options.case}{'-fed' if options.feed else ''}", results, options)
    return results


def show(options: Any, config: TrainConfig, turns: TakeTurns) -> dict[str, Any]:
    """Print the table and return its figures."""
    images = turns.steps * config.data.batch_size
    gpu = torch.cuda.get_device_name() if turns.peak else ""
    bounds = BOUNDS.get(options.case, {}) if gpu else {}
    sides = 2 if config.model.symmetric != "none" else 1
    bound = bounds["fused"] / sides if bounds else None
    rows = [
        Row(BARE, turns.seconds[BARE], images, bound=bound),
        Row(LOOP, turns.seconds[LOOP], images, {BARE: TARGET}, bound),
    ]
    title = f"{options.case}, {config.data.image_size} px, batch {config.data.batch_size}"
    title += f", {choose_precision(config)[0]}, compile {choose_compile(config, 0)[0] or 'off'}"
    results: dict[str, Any] = {"title": title, "loop": table(title, rows, "images/s")}
    if gpu:
        results |= {"gpu": gpu, "peak_memory_gib": round(turns.peak / 2**30, 2)}
        print(f"  {gpu}: peak memory {results['peak_memory_gib']} GiB")
    for name, value in bounds.items():
        results[f"share_of_h200_bound_{name}"] = round(rows[1].median / value * sides, 3)
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
