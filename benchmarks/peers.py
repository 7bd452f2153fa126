"""Whole training loops, from files to optimiser: ours against lightly, on the same CPU cores.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py [--root CIFAR10/train] [--rounds N]

Claims, in images per second on two cores: ResNet-18 with the CIFAR stem, each at its own defaults
(lightly fp32, ours bf16 where the CPU multiplies it): 2.5 times lightly; at equal precision 1.2
times; an encoder of 0.3 million parameters (that of configs/cifar10_cpu.yaml), where feeding
decides: 5 times; nowhere below 1.

Both train the same network, built by `moco.algorithm.encoder`, with the same batch, queue, views
and optimiser, in Lightning's Trainer. Ours is `moco.training.run.pretrain`, the program itself,
with its guards and readings. lightly is used as its documentation's MoCo example does it
(`LightlyDataset`, `MoCoV2Transform`, `NTXentLoss` with a memory bank, `update_momentum`), without
logging and checkpoints; it is tried with 0, 1 and 2 workers, and the fastest is taken. The
comparison leans lightly's way: its keys get plain BatchNorm, as in its example, while ours pays for
split groups.

Each contender is a process that is stopped, its workers too, while others have their turns; the
first step of a turn is not counted. Starting is not counted either (ours decodes the whole set
first): the seconds until the first step are in the record. Without `--root`, small JPEGs are
written to a temporary folder. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Row, arguments, interleave, progress, report, table
from moco.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig

Ask = Callable[[float], tuple[int, int]]
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]  # CIFAR-10's
FP32, BF16 = "32-true", "bf16-mixed"
ENCODERS = {
    "resnet18": {"backbone": "resnet18", "width": 1.0},
    "small": {"backbone": "resnet10t", "width": 0.25},
}
# Workers and threads that lightly is tried with; two threads are torch's default on two cores.
TRIALS = {"resnet18": ((0, 2), (1, 2), (2, 2)), "small": ((0, 2), (1, 2), (2, 2), (1, 1), (2, 1))}


@dataclass
class Contender:
    """One side's training.

    Attributes:
        who: "ours" or "lightly".
        encoder: A name in ENCODERS.
        precision: Of Lightning's Trainer.
        root: Folder of images.
        batch, queue: Images of a step, negative keys.
        trial: Warm-up steps and steps that tell lightly's fastest way to load.
    """

    who: str
    encoder: str
    precision: str
    root: str
    batch: int
    queue: int
    trial: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.who}, {'bf16' if self.precision == BF16 else 'fp32'}"

    def settings(self) -> TrainConfig:
        """Return the settings of the training, the same for both."""
        model = ModelConfig(
            **ENCODERS[self.encoder],
            stem="cifar",
            queue_size=self.queue,
            temperature=0.1,
            key_momentum=0.99,
        )
        data = DataConfig("folder", self.root, image_size=32, views="cifar", mean=MEAN, std=STD)
        data.batch_size = self.batch
        optim = OptimConfig(lr=0.03, weight_decay=5e-4, schedule="constant")
        trainer = TrainerConfig(10**6, accelerator="cpu", precision=self.precision)
        return TrainConfig(model, optim, data, trainer, RunConfig(knn_every=0))


# What runs in a contender's own process


class Turns(pl.Callback):
    """Wait for a turn; train so many steps, and so many that are timed; tell the seconds; wait.

    The seconds run from the start of one step to the start of another, and so hold all that a loop
    does. The first answer says that training could begin.

    Args:
        ask: Called with the seconds of the turn that ended; returns the steps of the next.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.left, self.timed, self.start = 0, 0, time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        """End a turn and begin another where it is time to."""
        if self.left == 0:
            warmup, self.timed = self.ask(time.perf_counter() - self.start)
            self.left = warmup + self.timed
        if self.left == self.timed:
            self.start = time.perf_counter()
        self.left -= 1


class LightlyMoCo(pl.LightningModule):
    """MoCo from lightly's parts, around the network that ours trains."""

    def __init__(self, config: TrainConfig) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.utils import deactivate_requires_grad

        from moco.algorithm.encoder import build_encoder

        super().__init__()
        self.config = config
        self.query_encoder = build_encoder(config.model, 3, config.data.image_size)
        self.key_encoder = copy.deepcopy(self.query_encoder)
        deactivate_requires_grad(self.key_encoder)
        bank = (config.model.queue_size, config.model.embedding_dim)
        self.criterion = NTXentLoss(config.model.temperature, memory_bank_size=bank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Contrast the queries with their keys and the memory bank."""
        from lightly.models.utils import update_momentum

        query_view, key_view = batch[0]
        update_momentum(self.query_encoder, self.key_encoder, self.config.model.key_momentum)
        query = self.query_encoder(query_view)
        with torch.no_grad():
            key = self.key_encoder(key_view)
        return self.criterion(query, key)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the SGD that ours uses, as torch makes it by default."""
        optim = self.config.optim
        return torch.optim.SGD(
            self.query_encoder.parameters(),
            optim.lr,
            momentum=optim.sgd_momentum,
            weight_decay=optim.weight_decay,
        )


def lightly_loader(config: TrainConfig, workers: int) -> DataLoader:
    """Load with lightly's data set and its MoCo v2 views, at the recipe's parameters."""
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    from moco.images.draws import view_recipes

    recipe, _ = view_recipes(config.data)
    brightness, contrast, saturation, hue = recipe.strengths
    transform = MoCoV2Transform(
        input_size=config.data.image_size,
        cj_prob=recipe.jitter,
        cj_bright=brightness,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        min_scale=recipe.crop_min,
        random_gray_scale=recipe.grey,
        gaussian_blur=recipe.blur,
        hf_prob=recipe.flip,
        normalize={"mean": config.data.mean, "std": config.data.std},
    )
    return DataLoader(
        LightlyDataset(config.data.root, transform),
        config.data.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def fit_lightly(
    module: LightlyMoCo, workers: int, threads: int, callback: pl.Callback, **length: int
) -> None:
    """Train in a Trainer that does nothing else, for so many `max_steps` or `max_epochs`."""
    torch.set_num_threads(threads)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=module.config.trainer.precision,
        callbacks=[callback],
        **length,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, lightly_loader(module.config, workers))


def train_lightly(contender: Contender, ask: Ask, tell: Callable[[dict[str, Any]], None]) -> None:
    """Find lightly's fastest way to load, then train with it until the end."""
    module = LightlyMoCo(contender.settings())
    warmup, timed = contender.trial
    rates, start = {}, time.perf_counter()
    for workers, threads in TRIALS[contender.encoder]:
        seconds: list[float] = []

        def note(taken: float, seconds: list[float] = seconds) -> tuple[int, int]:
            seconds.append(taken)
            return warmup, timed

        # One step more, at whose start the last turn ends.
        fit_lightly(module, workers, threads, Turns(note), max_steps=warmup + timed + 1)
        rates[workers, threads] = contender.batch * timed / seconds[1]
    best = max(rates, key=rates.get)
    tried = {f"{w} workers, {t} threads": round(rate, 1) for (w, t), rate in rates.items()}
    tell(
        {
            "tried": tried,
            "best": f"{best[0]} workers, {best[1]} threads",
            "trial_seconds": time.perf_counter() - start,
        }
    )
    fit_lightly(module, *best, Turns(ask), max_epochs=-1)


def train_ours(contender: Contender, ask: Ask, tell: Callable[[dict[str, Any]], None]) -> None:
    """Train with the program itself until the end."""
    from moco.checks import check
    from moco.training import run

    config = contender.settings()
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = str(Path(folder) / "run")
        check(config)
        run.pretrain(config, callbacks=[Turns(ask)])


def train(contender: Contender) -> None:
    """Be a contender: turns come in on standard input, seconds go out on standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    def ask(seconds: float) -> tuple[int, int]:
        tell({"seconds": seconds})
        words = sys.stdin.readline().split()
        if not words:
            os._exit(0)  # nobody wants more
        return int(words[0]), int(words[1])

    (train_ours if contender.who == "ours" else train_lightly)(contender, ask, tell)


# What lets them take turns


class Process:
    """A contender at work: stopped, workers and all, but in its turns.

    Attributes:
        ready: Seconds from the start to the first step, lightly's trials left out.
        facts: What the contender tells about itself.
    """

    def __init__(self, contender: Contender, folder: Path, limit: float) -> None:
        self.contender = contender
        self.log = folder / f"{contender.who}-{contender.encoder}-{contender.precision}.log"
        start = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--contender", json.dumps(asdict(contender))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                process_group=0,
                env=os.environ | {"TMPDIR": str(folder)},  # what it leaves goes with the folder
            )
        self.timer = threading.Timer(limit, self.end)
        self.timer.daemon = True
        self.timer.start()
        self.facts: dict[str, Any] = {}
        while "seconds" not in (answer := self._answer()):
            self.facts |= answer
        self.ready = time.perf_counter() - start - self.facts.pop("trial_seconds", 0)
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.end()
            tail = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.contender.name} ended before its time:\n{tail}")
        return json.loads(line)

    def turn(self, warmup: int, steps: int) -> float:
        """Train so many steps, the first uncounted, and return the seconds of the others."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{warmup} {steps}\n")
        seconds = self._answer()["seconds"]
        os.killpg(self.process.pid, signal.SIGSTOP)
        return seconds

    def end(self) -> None:
        """End the contender and its workers."""
        self.timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of 32 px, in ten folders."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    for number in range(count):
        target = folder / f"class_{number % 10}"
        target.mkdir(exist_ok=True)
        image = Image.fromarray(small[number]).resize((32, 32), Image.BICUBIC)
        image.save(target / f"{number:05d}.jpg")


@contextlib.contextmanager
def contest(
    encoder: str, precisions: list[str], root: str, options: argparse.Namespace
) -> Iterator[dict[str, Process]]:
    """Start the contenders one after another; end them in any case."""
    small = encoder == "small"
    batch = options.small_batch if small else options.batch
    trial = (2, options.small_steps) if small else (1, options.steps)
    processes: dict[str, Process] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for precision in precisions:
                for who in ("lightly", "ours"):
                    contender = Contender(
                        who, encoder, precision, root, batch, options.queue, trial
                    )
                    process = Process(contender, Path(folder), options.limit)
                    processes[contender.name] = process
                    progress(f"{contender.name}: ready in {process.ready:.0f} s {process.facts}")
            yield processes
        finally:
            for process in processes.values():
                process.end()


def measure(
    encoder: str, precisions: list[str], root: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Let all contenders with one encoder take turns."""
    small = encoder == "small"
    warmup, steps = (1, options.small_steps) if small else (1, options.steps)
    with contest(encoder, precisions, root, options) as processes:
        ways = {
            name: lambda process=process: process.turn(warmup, steps)
            for name, process in processes.items()
        }
        seconds = interleave(ways, options.rounds, warmup=0, measure=lambda way: way())
    work = steps * next(iter(processes.values())).contender.batch
    rows = [
        Row(name, seconds[name], work, claims(encoder, name, list(processes)))
        for name in sorted(processes, key=lambda name: name.split(", ")[0])  # lightly first
    ]
    title = (
        f"{encoder}, 32 px, batch {work // steps}, queue {options.queue}, "
        f"{torch.get_num_threads()} cores, from files to optimiser"
    )
    found = table(title, rows, "images/s")
    for name, process in processes.items():
        found[name] |= {"ready_seconds": round(process.ready, 1), **process.facts}
        if process.facts:
            print(f"  {name}: fastest with {process.facts['best']}")
    return found


def claims(encoder: str, name: str, names: list[str]) -> dict[str, float | None]:
    """Return what a contender is compared with, and the ratios that are claimed."""
    who, precision = name.split(", ")
    defaults = {"lightly": "fp32", "ours": "bf16" if "ours, bf16" in names else "fp32"}
    if who == "lightly":
        return {} if precision == "fp32" else {"lightly, fp32": None}
    found = {}
    for other in (n for n in names if n.startswith("lightly")):
        same = other.endswith(precision)
        at_defaults = precision == defaults["ours"] and other.endswith(defaults["lightly"])
        if encoder == "small":
            found[other] = 5.0 if at_defaults else 1.0 if same else None
        else:
            found[other] = 1.2 if same else 2.5 if at_defaults else None
    return found


def main(argv: list[str]) -> dict[str, Any] | None:
    """Let ours and lightly take turns, or be one of them."""
    parser = arguments(__doc__, rounds=4)
    parser.add_argument("--root", default="", help="folder of 32 px images; empty: made up")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--precisions", nargs="+", choices=[FP32, BF16], help="default: both")
    parser.add_argument("--images", type=int, default=16384, help="how many are made up")
    parser.add_argument("--batch", type=int, default=64, help="with ResNet-18")
    parser.add_argument("--small_batch", type=int, default=256, help="with the small encoder")
    parser.add_argument("--queue", type=int, default=4096, help="negative keys")
    parser.add_argument("--steps", type=int, default=2, help="timed in a turn, ResNet-18")
    parser.add_argument("--small_steps", type=int, default=3, help="timed in a turn, small")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a contender lives")
    parser.add_argument("--contender", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.contender:
        train(Contender(**json.loads(options.contender)))
        return None
    if not importlib.util.find_spec("lightly"):
        progress("lightly is missing: pip install -r benchmarks/requirements.txt")
        return report("peers", {"skipped": "lightly is not installed"}, options)
    native = torch.cpu._is_avx512_bf16_supported()
    precisions = options.precisions or [FP32, *([BF16] if native else [])]
    with tempfile.TemporaryDirectory() as folder:
        if not options.root:
            progress("writing images")
            write_images(Path(folder), options.images)
        root = options.root or folder
        found = {name: measure(name, precisions, root, options) for name in options.encoders}
    return report("peers", found, options)


if __name__ == "__main__":
    main(sys.argv[1:])
