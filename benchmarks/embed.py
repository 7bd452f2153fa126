"""Writing features against the bare network: what does `moco embed` add?

    python benchmarks/embed.py [--cases small photographs] [--rounds 5] [--vectors 1000000]

Both ways decode the same JPEGs and run the same network in batches of 256 in this one process, with
one thread. The bare way keeps its features in memory; `embed` also sizes the images, checks the
features, and writes and describes the Parquet file. What does not grow with the images is left out:
the time of a run over one batch, and the look at headers before the first, which ends after 3 s.

`--vectors N` also measures an index of N vectors of 512 dimensions, from the Parquet file on: time
and memory of its making, and of a search. `--cases --vectors N` measures that alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow as pa
import torch

import train
from benchmarks.feed import write_images
from benchmarks.harness import Row, arguments, clock, interleave, print_columns, report, table
from moco.checkpoints.load import load_encoder
from moco.command import embed
from moco.images.bad_files import BadFiles
from moco.images.decode import decode
from moco.reports.table import FILE, vectors_of, writing

ROOT = Path(__file__).parent.parent
BATCH, WIDTH = 256, 512
# Backbone, its words, side of the files and of what the network takes, images.
CASES = {
    "small": ("resnet10t", ["--model.width", "0.25", "--model.stem", "cifar"], 32, 32, 5120),
    "photographs": ("resnet18", [], 256, 224, 512),
}
# What is done with an index, each in a process of its own that imports what the command does.
BEFORE = """
import json, resource, sys, time
import numpy as np
from moco.reports.index import neighbours, open_index, write_index
from moco.reports.table import Features, unit
start, features = time.perf_counter(), Features(sys.argv[1])
"""
AFTER = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([time.perf_counter() - start, peak]))
"""
INDEX = {
    "making": "write_index(features)",
    "opening, and 10 neighbours of 100 images": (
        "neighbours(open_index(features), unit(features.take(np.arange(100))), 10)"
    ),
}


def make_checkpoint(folder: Path, backbone: str, words: list[str], size: int) -> Path:
    """Train a network for one step on a few pictures, so that it is a run's own file."""
    images = folder / "few"
    images.mkdir()
    write_images(images, 16, (size, size))
    train.main([
        "--data.root", str(images), "--data.image_size", str(size), "--data.batch_size", "8",
        "--model.backbone", backbone, *words, "--model.queue_size", "8", "--model.key_bn", "plain",
        "--trainer.max_steps", "1", "--run.knn_every", "0", "--run.report", "false",
        "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
        "--run.dir", str(folder / "run"),
    ])  # fmt: skip
    return folder / "run" / "checkpoints" / "last.ckpt"


def bare(checkpoint: Path, paths: list[Path], size: int) -> torch.Tensor:
    """Decode, cut the middle, normalise, and run the network."""
    loaded = load_encoder(checkpoint)
    network = loaded.backbone.eval()
    mean, std = (torch.tensor(loaded.data[name])[:, None, None] for name in ("mean", "std"))
    found = []
    with torch.inference_mode():
        for start in range(0, len(paths), BATCH):
            images = torch.stack([decode(str(path), 3) for path in paths[start : start + BATCH]])
            edge = (images.shape[-1] - size) // 2
            images = images[..., edge : edge + size, edge : edge + size].float() / 255
            images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            found.append(network(images).float())
    return torch.cat(found)


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a method that also notes how long each call takes."""

    def call(*words: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*words)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def measure(case: str, rounds: int, images: int | None) -> dict[str, Any]:
    """Let both ways take turns over a folder, and print what each does in a second."""
    backbone, words, side, size, count = CASES[case]
    count = images or count
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder, backbone, words, size)
        whole, first = folder / "images", folder / "first"
        for root in (whole, first):
            (root / "all").mkdir(parents=True)
        write_images(whole / "all", count + BATCH, (side, side))
        paths = sorted((whole / "all").iterdir())
        looked_ahead: list[float] = []
        for path in paths[:BATCH]:
            (first / "all" / path.name).symlink_to(path)

        def ours(root: Path) -> float:
            looked_ahead.clear()
            with tempfile.TemporaryDirectory(dir=folder) as output:
                seconds = clock(lambda: embed.main([
                    "--checkpoint", str(checkpoint), "--data.root", str(root), "--output", output,
                    "--data.num_workers", "0", "--accelerator", "cpu",
                ]))  # fmt: skip
            return seconds - sum(looked_ahead)

        def theirs(files: list[Path]) -> float:
            return clock(lambda: bare(checkpoint, files, size))

        with mock.patch.object(BadFiles, "look_ahead", timed(BadFiles.look_ahead, looked_ahead)):
            seconds = interleave(
                {
                    "bare": lambda: theirs(paths),
                    "bare, one batch": lambda: theirs(paths[:BATCH]),
                    "embed": lambda: ours(whole),
                    "embed, one batch": lambda: ours(first),
                },
                rounds,
                measure=lambda way: way(),
            )
    rest = {  # what the images after the first batch cost
        way: [a - b for a, b in zip(seconds[way], seconds[f"{way}, one batch"], strict=True)]
        for way in ("bare", "embed")
    }
    rows = [Row("bare", rest["bare"], count), Row("embed", rest["embed"], count, {"bare": 0.95})]
    return table(f"{case}: {backbone}, files of {side} px, network of {size} px", rows, "images/s")


def measure_index(vectors: int) -> dict[str, Any]:
    """Print time and peak memory of making an index of random vectors, and of a search in it."""
    random, rows = np.random.default_rng(0), 10_000
    about = {b"moco": json.dumps({"shape": [WIDTH]}).encode()}
    columns = {"id": pa.int64(), "path": pa.string(), "vector": pa.list_(pa.float32(), WIDTH)}
    schema = pa.schema(list(columns.items()), about)
    with tempfile.TemporaryDirectory() as folder:
        with writing(Path(folder) / FILE, schema) as file:
            for start in range(0, vectors, rows):
                ids = range(start, min(start + rows, vectors))
                numbers = random.standard_normal((len(ids), WIDTH), dtype=np.float32)
                names = [f"{number}.jpg" for number in ids]
                block = [pa.array(ids), pa.array(names), vectors_of(numbers)]
                file.write_table(pa.table(block, schema))
        found = {}
        for name, code in INDEX.items():
            words = [sys.executable, "-c", f"{BEFORE}\n{code}\n{AFTER}", folder]
            told = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
            found[name] = json.loads(told.stdout)
    lines = [["", "seconds", "peak GiB"]]
    lines += [[name, *(f"{value:.1f}" for value in row)] for name, row in found.items()]
    print(f"\nindex of {vectors:,} vectors of {WIDTH} dimensions")
    print_columns(lines)
    return {name: dict(zip(("seconds", "gib"), row, strict=True)) for name, row in found.items()}


def main() -> None:
    """Measure the cases and, where asked, the index."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--images", type=int, help="instead of each case's own number")
    parser.add_argument("--vectors", type=int, default=0, help="size of an index to be measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        case: measure(case, options.rounds, options.images) for case in options.cases
    }
    if options.vectors:
        found["index"] = measure_index(options.vectors)
    report("embed", found, options)


if __name__ == "__main__":
    main()
