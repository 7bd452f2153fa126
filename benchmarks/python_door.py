"""The same task from Python, in lightly's documented way and in ours: lines and seconds.

    pip install -r benchmarks/requirements.txt
    python benchmarks/python_door.py [--root CIFAR10/train] [--epochs N] [--rounds N]

Target: ours takes at most half the seconds, at the same encoder, batch, queue, views and precision.
The small default misses it and says little; give `--root` and more `--epochs`. Counted is from the
call to trained weights, reading the files included. The task: pretrain a small ResNet on a folder
of images. A user writes what stands in the functions `with_lightly` and `with_ours`, whose lines
are counted. lightly's is its documentation's MoCo example around the network that ours trains, with
the workers with which it is fastest here (`--workers`, tried one by one). Ours keeps its
checkpoints, metrics and guards; the page at the end, which lightly does not make, is left out. Each
turn is a process of its own, whose imports are not counted.

Without `--root`, small JPEGs are written to a temporary folder. Where lightly is not installed ours
runs alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import ROOT, Row, arguments, interleave, progress, report, table
from benchmarks.peers import write_images


def with_lightly(root: str, epochs: int, workers: int, backbone: Any) -> None:
    """Pretrain as lightly's documentation does it."""
    import copy

    import pytorch_lightning as pl
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
    from torch.utils.data import DataLoader

    class MoCo(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, width = backbone, backbone.num_features
            self.projection_head = MoCoProjectionHead(width, width, 128)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(256, 128))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            update_momentum(self.backbone, self.backbone_momentum, m=0.99)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
            query_view, key_view = batch[0]
            query = self.projection_head(self.backbone(query_view))
            with torch.no_grad():
                key = self.projection_head_momentum(self.backbone_momentum(key_view))
            return self.criterion(query, key)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)

    transform = MoCoV2Transform(input_size=32, min_scale=0.08, gaussian_blur=0.0)
    loader = DataLoader(
        LightlyDataset(root, transform=transform),
        batch_size=64,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(MoCo(), loader)


def with_ours(root: str, epochs: int, workers: int, backbone: Any) -> None:
    """Pretrain by `moco.pretrain`, which reads the files with the workers that it wants."""
    import moco

    moco.pretrain(
        root,
        backbone=backbone,
        views="cifar",
        **{"model.queue_size": 256, "model.key_momentum": 0.99, "optim.lr": 0.06},
        **{"optim.weight_decay": 5e-4, "data.batch_size": 64, "data.image_size": 32},
        **{"trainer.max_epochs": epochs, "trainer.precision": "32-true"},
        **{"trainer.accelerator": "cpu", "run.knn_every": 0, "run.held_out": 0},
        **{"run.report": False},
    )


WAYS = {"lightly": with_lightly, "ours": with_ours}


def lines_of(way: Any) -> int:
    """Count the lines of code that a user writes: no blank ones, no docstring, no signature."""
    body = inspect.getsource(way).splitlines()[2:]
    return sum(bool(line.strip()) for line in body)


def take_turn(who: str, root: str, epochs: int, workers: int) -> None:
    """Be the process of a turn: import, then train, and print the seconds of the training."""
    import torch

    import moco
    from moco.algorithm.encoder import build_backbone

    _ = moco.pretrain, moco.MoCo, moco.PretrainData
    if who == "lightly":
        import_module("lightly.transforms")
        import_module("lightly.data")
    torch.manual_seed(0)
    small = moco.ModelConfig("resnet10t", stem="cifar", width=0.25)
    backbone, _ = build_backbone(small, 3, 32)
    os.chdir(os.environ["TMPDIR"])
    start = time.perf_counter()
    WAYS[who](root, epochs, workers, backbone)
    print(f"\nseconds {time.perf_counter() - start}")


def turn(who: str, root: str, options: argparse.Namespace, workers: int, folder: str) -> float:
    """Start the process of a turn and return its seconds."""
    words = [sys.executable, __file__, "--turn", who, "--root", root]
    words += ["--epochs", str(options.epochs), "--workers", str(workers)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=options.limit,
        env=os.environ | {"TMPDIR": folder, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"{who} ended before its time:\n{done.stderr[-2000:]}")
    return float(done.stdout.split("seconds ")[-1])


def main() -> None:
    """Let both take turns, and count their lines."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--root", default="", help="folder of images")
    parser.add_argument("--images", type=int, default=512, help="written where root is empty")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="lightly tries")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a turn, at most")
    parser.add_argument("--turn", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        take_turn(options.turn, options.root, options.epochs, options.workers[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(options.root).absolute()) if options.root else f"{folder}/images"
        if not options.root:
            Path(root).mkdir()
            write_images(Path(root), options.images)
        results = {"door": compare(root, options, folder)}
    report("python_door", results, options)


def compare(root: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the table of both ways, with the lines of each."""
    workers = {"ours": 0}
    if importlib.util.find_spec("lightly"):
        tried = {w: turn("lightly", root, options, w, folder) for w in options.workers}
        progress(f"lightly's seconds by workers: {tried}")
        workers = {"lightly": min(tried, key=tried.get), **workers}
    else:
        progress("lightly is not installed, so ours runs alone")
    ways = {w: lambda w=w, n=n: turn(w, root, options, n, folder) for w, n in workers.items()}
    seconds = interleave(ways, options.rounds, warmup=0, measure=lambda way: way())
    target = {"lightly": 2.0} if "lightly" in workers else {}
    rows = [Row(w, seconds[w], 3600, target if w == "ours" else {}) for w in workers]
    found = table(f"Python, {options.epochs} epochs of {root}", rows, "runs/h")
    for who in workers:
        found[who] |= {"lines": lines_of(WAYS[who]), "seconds": sorted(seconds[who])}
        print(f"  {who}: {found[who]['lines']} lines")
    return found


if __name__ == "__main__":
    main()
