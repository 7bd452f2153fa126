"""Shards: the start of a run on a billion images, and reading beside files and webdataset.

    python benchmarks/streams.py [--shards 100000] [--per-shard 10000] [--root FOLDER_OF_IMAGES]
                                 [--images 200] [--rounds N]

Claims: with an index of 1e9 images in 1e5 shards, which is made up and holds no members, a rank has
its first batch of rows within 10 s and with less than 500 MB more than torch takes; each further
batch takes it less than 5 ms. From local tars images are read and decoded at least as fast as from
a folder of files, and faster than by the library webdataset with the same decoder (where it is
installed); the share of decoding alone, from bytes in memory, is printed too. All files are in the
page cache. Without `--root`, synthetic JPEGs as of `benchmarks/feed.py` are written to a temporary
folder. The last line is one JSON object.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.feed import write_images
from benchmarks.harness import Row, arguments, interleave, progress, report, table
from moco.config import DataConfig
from moco.images import sources
from moco.images.decode import decode
from moco.images.formats import Member
from moco.images.packing import pack
from moco.images.shard_index import Index, Members
from moco.images.stores import Facts
from moco.images.streams import Order

DECODE, FILES, SHARDS, WEBDATASET = "decode alone", "folder of files", "local tars", "webdataset"
LIMITS = {"start_seconds": 10.0, "start_megabytes": 500.0, "batch_ms": 5.0}


def memory() -> float:
    """Return the resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def billion(options: Any, folder: Path) -> dict[str, Any]:
    """Start on a made-up index of many shards, and make batches of rows."""
    index, empty = Index(folder / "index.sqlite"), Members([], [], [], [])
    names = [f"s3://bucket/train-{number:06d}.tar" for number in range(options.shards)]
    index.add([(name, Facts(2**30, name), empty) for name in names])
    before, start = memory(), time.perf_counter()
    known = index.known()
    assert all(name in known for name in names)
    spread = torch.arange(options.shards) % 101 - 50  # shards of many sizes
    order = Order(options.per_shard + spread, 0, 64, 1024, options.batch)
    order.batch(0, 0)
    found = {"start_seconds": time.perf_counter() - start, "start_megabytes": memory() - before}
    taken = []
    for number in range(1, options.batches + 1):
        start = time.perf_counter()
        order.batch(0, number)
        taken.append(1000 * (time.perf_counter() - start))
    found |= {"batch_ms": statistics.median(taken), "slowest_batch_ms": max(taken)}
    print(f"\n{order.total:,} images in {options.shards:,} shards, batches of {options.batch}")
    for name, value in found.items():
        limit = LIMITS.get(name)
        verdict = "" if limit is None else f"  (claimed: below {limit:g})"
        print(f"  {name:18}{value:10.3f}{verdict}")
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def ways(files: Any, shards: Any, root: Path, count: int) -> dict[str, Callable[[], Any]]:
    """Build the ways to read and decode the next `count` images, each in its turn."""
    order = Order(torch.from_numpy(shards.paths.counts), 0, 64, 1024, count)
    per_epoch = len(shards) // count
    held = [path.read_bytes() for path in map(Path, files.paths)]
    turns = {name: itertools.count() for name in (FILES, SHARDS)}

    def over_files() -> None:
        draw = torch.Generator().manual_seed(next(turns[FILES]))
        for row in torch.randperm(len(files), generator=draw)[:count].tolist():
            files.read(row)

    def over_shards() -> None:
        for row in order.batch(*divmod(next(turns[SHARDS]), per_epoch)).tolist():
            shards.read(row)

    found = {
        DECODE: lambda: [decode(held_image(held, n), 3) for n in range(count)],
        FILES: over_files,
        SHARDS: over_shards,
    }
    if find_spec("webdataset"):
        import webdataset

        tars = sorted(map(str, root.glob("train-*.tar")))
        endless = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).repeat()
        samples = iter(endless.shuffle(1024).to_tuple("jpg;jpeg"))
        found[WEBDATASET] = lambda: [
            decode(Member("x.jpg", lambda _, content=content: content), 3)
            for (content,) in itertools.islice(samples, count)
        ]
    return found


def held_image(held: list[bytes], number: int) -> Member:
    """Return an image whose bytes are in memory."""
    return Member("x.jpg", lambda _: held[number % len(held)])


def reading(options: Any, folder: Path, root: Path) -> dict[str, Any]:
    """Let the ways to read images take turns."""
    pack(str(root), str(folder / "set"), options.shard_mib)
    files = sources.open_source(DataConfig(root=str(root)), "train")
    shards = sources.open_source(DataConfig(dataset="shards", root=str(folder / "set")), "train")
    seconds = interleave(ways(files, shards, folder / "set", options.images), options.rounds)
    work = options.images
    bound = Row(DECODE, seconds[DECODE], work).median
    against: dict[str, float | None] = {FILES: 1.0}
    rows = [Row(DECODE, seconds[DECODE], work), Row(FILES, seconds[FILES], work, bound=bound)]
    if WEBDATASET in seconds:
        rows.append(Row(WEBDATASET, seconds[WEBDATASET], work, bound=bound))
        against[WEBDATASET] = 1.0
    rows.append(Row(SHARDS, seconds[SHARDS], work, against, bound))
    return table(f"{len(files)} images read and decoded, one core", rows, "images/s")


def main(argv: list[str]) -> dict[str, Any]:
    """Measure both on the user's images, or on synthetic ones."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--root", default="", help="folder of JPEGs; empty: synthetic ones")
    parser.add_argument("--images", type=int, default=192, help="of one turn")
    parser.add_argument("--shard-mib", type=float, default=8.0, help="of the tars that are read")
    parser.add_argument("--shards", type=int, default=100_000, help="of the made-up index")
    parser.add_argument("--per-shard", type=int, default=10_000, help="images of each of these")
    parser.add_argument("--batch", type=int, default=4096, help="images of their batches")
    parser.add_argument("--batches", type=int, default=500, help="that are timed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MOCO_CACHE"] = str(folder / "cache")
        results: dict[str, Any] = {"billion": billion(options, folder)}
        root = Path(options.root or folder / "images")
        if not options.root:
            progress("writing synthetic images")
            root.mkdir()
            write_images(root, 2 * options.images)
        results["reading"] = reading(options, folder, root)
        return report("streams", results, options)


if __name__ == "__main__":
    main(sys.argv[1:])
