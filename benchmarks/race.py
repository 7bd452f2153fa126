"""Time to a level of kNN: our recipe for two cores against lightly's MoCo around the same network.

    pip install -r benchmarks/requirements.txt
    python benchmarks/race.py --root CIFAR10_FOLDER [--level 50] [--minutes 60]
                              [options of train.py, for all ways]

Claims, in processor time of training until kNN (k 200, T 0.1, backbone) reaches the level: lightly
with the settings of its own CIFAR-10 benchmark needs 10 times as long as the recipe
`configs/cifar10_cpu.yaml` with two epochs, and 4 times with the views, temperature, queue and key
momentum of that recipe, and SGD with its warm-up.

lightly's cosine ends after 15 epochs, and in one more row after 4. Its keys have plain BatchNorm
with our views, as in its examples, and BatchNorm of 8 groups in its benchmark's way. Of options it
takes those of `model`, `data` and `optim.lr`, `optim.warmup_epochs`, `optim.schedule_per`.

Every way trains in a process with one thread and no workers, all at the same time. Time is the
processor's, of the whole process, so that a neighbour does not count; readings of kNN are left out,
and so is all that comes before the first step (ours decodes the set first). A way that needs more
than `--minutes` is stopped there. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import ROOT, arguments, print_columns, progress, report, train_settings
from benchmarks.peers import LightlyMoCo, fit_lightly
from moco.algorithm.batch_norm import set_batch_norm
from moco.algorithm.optim import learning_rate
from moco.config import TrainConfig
from moco.evaluation.features import extract_features
from moco.evaluation.knn import knn_predict
from moco.images.labelled import open_data
from moco.images.sources import open_source
from moco.training import run

RECIPE = ["--config", str(ROOT / "configs/cifar10_cpu.yaml")]
OURS, GIVEN, DOCUMENTED = "ours", "lightly, our views", "lightly, its benchmark"
SHORT = "lightly, our views, short"
CLAIMS = {GIVEN: 4.0, DOCUMENTED: 10.0}
# lightly's CIFAR-10 benchmark, but for its length and its network: no warm-up.
BENCHMARK = [
    *("--optim.warmup_epochs", "0", "--optim.schedule_per", "epoch"),
    *("--data.crop_min", "0.08", "--model.symmetric", "mean", "--model.bn_splits", "8"),
    *("--data.batch_size", "128", "--optim.lr", "0.06"),
]
SGD = [
    *("--optim.name", "sgd", "--optim.nesterov", "false", "--optim.weight_decay", "5e-4"),
    *("--optim.lr", "0.12", "--data.image_size_start", "0", "--data.image_size_end", "0"),
]
WAYS = {OURS: [], GIVEN: SGD, SHORT: SGD, DOCUMENTED: [*SGD, *BENCHMARK]}
EPOCHS = {OURS: 2, GIVEN: 15, SHORT: 4, DOCUMENTED: 15}  # of the schedule
CPU = torch.device("cpu")


class Readings(pl.Callback):
    """Read kNN every few steps, tell processor time and accuracy, and stop at the level.

    Args:
        config: Its data are read.
        options: As parsed.
    """

    def __init__(self, config: TrainConfig, options: Any) -> None:
        self.options, self.every = options, options.every
        self.images = [
            open_data(open_source(config.data, split), config.data, CPU, None)
            for split in ("train", "test")
        ]
        self.paused, self.start = 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Read where it is time to."""
        seconds = time.process_time() - self.start - self.paused
        over = seconds > 60 * self.options.minutes
        over |= trainer.global_step == trainer.estimated_stepping_batches
        if trainer.global_step % self.every and not over:
            return
        before = time.process_time()
        top1 = self.accuracy(module.query_encoder.backbone)
        self.paused += time.process_time() - before
        found = {"step": trainer.global_step, "seconds": round(seconds, 1), "top1": top1}
        print(json.dumps(found), flush=True)
        trainer.should_stop |= over or top1 >= self.options.level

    @torch.no_grad()
    def accuracy(self, backbone: nn.Module) -> float:
        """Return kNN top-1 in percent."""
        (bank, rows), (queries, query_rows) = (
            extract_features(backbone, images.batches(CPU)) for images in self.images
        )
        labels, targets = self.images[0].labels(rows), self.images[1].labels(query_rows)
        classes, k = len(self.images[0].source.classes), min(200, len(labels))
        found = knn_predict(queries, bank, labels, classes, k)
        return round(100 * float((found == targets).float().mean()), 2)


class Scheduled(LightlyMoCo):
    """lightly's MoCo with warm-up and cosine; symmetric where the settings say so.

    Symmetric, it is its CIFAR-10 benchmark's: keys shuffled, BatchNorm split in both encoders, the
    mean of two losses whose keys both enter the memory bank.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.model.symmetric == "mean":
            for encoder in (self.query_encoder, self.key_encoder):
                set_batch_norm(encoder, "split", config.model.bn_splits)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Contrast the queries of one view or of both."""
        if self.config.model.symmetric == "none":
            return super().training_step(batch, batch_idx)
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        update_momentum(self.query_encoder, self.key_encoder, self.config.model.key_momentum)
        losses = []
        for query_view, key_view in (batch[0], batch[0][::-1]):
            query = self.query_encoder(query_view)
            with torch.no_grad():
                shuffled, order = batch_shuffle(key_view)
                key = batch_unshuffle(self.key_encoder(shuffled), order)
            losses.append(self.criterion(query, key))
        return 0.5 * (losses[0] + losses[1])

    def configure_optimizers(self) -> Any:
        """Build SGD, and its rate by step or by epoch."""
        optim, total = self.config.optim, int(self.trainer.estimated_stepping_batches)

        def share(step: int) -> float:
            return learning_rate(optim, step, total // self.trainer.max_epochs, total) / optim.lr

        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(way: str, options: Any) -> None:
    """Be one of the ways: train and print readings."""
    torch.set_num_threads(1)
    words = [*RECIPE, *WAYS[way], "--data.root", options.root, "--trainer.accelerator", "cpu"]
    words += ["--trainer.precision", options.precision, "--run.knn_every", "0"]
    words += ["--trainer.max_epochs", str(EPOCHS[way]), *options.words]
    config = train_settings([*words, "--run.report", "false"])
    readings = Readings(config, options)
    if way == OURS:
        with tempfile.TemporaryDirectory() as folder:
            config.run.dir = str(Path(folder) / "run")
            run.pretrain(config, callbacks=[readings])
        return
    torch.manual_seed(config.run.seed)
    config.data.root = str(Path(options.root) / "train")
    fit_lightly(Scheduled(config), 0, 1, readings, max_epochs=config.trainer.max_epochs)


def race(options: Any) -> dict[str, list[dict[str, float]]]:
    """Run all ways at the same time; return their readings."""
    processes = {}
    for way in options.ways:
        words = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes[way] = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    found = {}
    for way, process in processes.items():
        lines = process.communicate()[0].splitlines()
        if process.returncode:
            raise RuntimeError(f"{way} ended with {process.returncode}")
        found[way] = [json.loads(line) for line in lines if line.startswith('{"step"')]
        progress(f"{way}: {found[way][-1]}")
    return found


def _verdict(ratio: float | None, reached: bool, target: float) -> str:
    """Say whether a claim holds; of what was stopped the ratio is a lower bound."""
    if ratio is not None and ratio >= target:
        return "reached"
    return "missed" if reached and ratio is not None else "not told"


def show(found: dict[str, list[dict[str, float]]], level: float) -> dict[str, Any]:
    """Print when each way reached the level."""
    results: dict[str, Any] = {}
    ours = found[OURS][-1] if OURS in found else None
    lines = [["", f"seconds to {level:g} %", "steps", "kNN", "x ours", "target"]]
    for way, readings in found.items():
        last = readings[-1]
        reached = last["top1"] >= level
        ratio = None
        if ours and ours["top1"] >= level:
            ratio = round(last["seconds"] / ours["seconds"], 2)
        results[way] = {**last, "reached": reached, "ratio": ratio, "readings": readings}
        sign = "" if reached else "> "
        target = CLAIMS.get(way)
        verdict = "" if target is None else f"{target:g} {_verdict(ratio, reached, target)}"
        cells = [f"{sign}{last['seconds']:.0f}", str(last["step"]), f"{last['top1']:.1f}"]
        lines.append([way, *cells, "" if ratio is None else f"{sign}{ratio:.2f}", verdict])
    print_columns(lines)
    return results


def main(argv: list[str]) -> dict[str, Any] | None:
    """Run the race, or be one of its ways."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--root", required=True, help="labelled folder with train/ and test/")
    parser.add_argument("--level", type=float, default=50.0, help="kNN top-1 in percent")
    parser.add_argument("--minutes", type=float, default=60.0, help="of a way, at most")
    parser.add_argument("--every", type=int, default=98, help="steps between readings")
    parser.add_argument("--precision", default="bf16-mixed", help="of all ways")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--way", choices=list(WAYS), help="be this one")
    options, options.words = parser.parse_known_args(argv)
    if options.way:
        train(options.way, options)
        return None
    return report("race", show(race(options), options.level), options)


if __name__ == "__main__":
    main(sys.argv[1:])
