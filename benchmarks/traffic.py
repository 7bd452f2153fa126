"""What a step costs on many ranks: a model from a few constants, measured here, drawn to 1,024.

    python benchmarks/traffic.py [--worlds 2 4] [--rounds N] [--plot docs/traffic.png]

A step computes, sums the gradients (a ring: each rank sends and receives 2 (G-1)/G of them),
gathers the keys of all ranks, and exchanges the uint8 cuts of streamed images, G ranks with each
other. Each collective costs a latency for each doubling of the ranks, and its bytes over the
bandwidth. Nothing is hidden behind anything else here, though DDP sums gradients while it computes
others: the model is the worst case.

Claim: with latency and bandwidth of gloo's all_reduce, and the compute of a small network, both
measured with as many ranks on this machine, the model tells the time of whole steps within half.
`--plot` draws what it says of MoCo v2 on ResNet-50: how much of one GPU's images per second is left
on G of them. The speeds of links in LINKS are what makers name, and the speed of a GPU is an
option: neither was measured here. The last line is one JSON object.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import arguments, print_columns, progress, report

FLOAT = 4  # bytes
SMALL, LARGE = 1024, 4_194_304  # values of the all_reduce that is measured
# Bytes per second of a rank inside a machine and between machines, and seconds of latency.
LINKS = {
    "one 200 Gb/s card per GPU": (300e9, 25e9, 10e-6),
    "one 100 Gb/s card per 8 GPUs": (300e9, 12.5e9 / 8, 20e-6),
}
PER_MACHINE = 8
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass
class Step:
    """What a step moves and computes.

    Attributes:
        images: Of a rank, N.
        compute: Seconds, without communication.
        parameters: Of the query encoder.
        embedding: C.
        cut: Bytes of an image's cuts.
    """

    images: int
    compute: float
    parameters: int
    embedding: int
    cut: int

    def traffic(self, world: int) -> dict[str, float]:
        """Return the bytes that a rank receives in each collective of a step."""
        share = (world - 1) / world
        return {
            "gradients": 2 * share * self.parameters * FLOAT,
            "keys": share * world * self.images * self.embedding * FLOAT,
            "cuts": share * self.images * self.cut,
        }

    def seconds(self, world: int, bandwidth: float, latency: float) -> float:
        """Return the time of a step: compute, then one collective after the other."""
        hops = {"gradients": 2, "keys": 1, "cuts": 1}
        waits = sum(hops.values()) * math.ceil(math.log2(world)) * latency
        return self.compute + waits + sum(self.traffic(world).values()) / bandwidth


def network(width: int) -> nn.Module:
    """Build a network without BatchNorm that has many parameters for its compute."""
    first, second = nn.Linear(192, width), nn.Linear(width, width)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, 128))


def median(call: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of a call that all ranks begin together."""
    taken = []
    for _ in range(rounds + 1):
        distributed.barrier()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def measure(rank: int, world: int, store: str, options: Any, answers: Any) -> None:
    """Measure compute, all_reduce and whole steps on one rank of a gloo group."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = network(options.width)
    images = torch.rand(options.images, 192)
    cuts = torch.zeros(options.images, options.cut, dtype=torch.uint8)
    keys = torch.rand(options.images, 128)
    gathered = [torch.empty_like(keys) for _ in range(world)]
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    received = torch.empty_like(cuts)
    buffers = [torch.zeros(count) for count in (SMALL, LARGE)]

    def compute() -> None:
        model(images).square().sum().backward()

    def step() -> None:
        distributed.all_to_all_single(received, cuts)
        compute()
        distributed.all_gather(gathered, keys)
        distributed.all_reduce(flat)

    alone = median(compute, options.rounds)
    small, large = (median(lambda b=b: distributed.all_reduce(b), options.rounds) for b in buffers)
    whole = median(step, options.rounds)
    if rank == 0:
        answers.put((alone, small, large, whole, len(flat)))
    distributed.destroy_process_group()


def compare(world: int, options: Any) -> dict[str, float]:
    """Measure with some ranks, and return the model's prediction beside it in milliseconds."""
    start = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers = start.SimpleQueue()
        multiprocessing.spawn(
            measure, (world, f"{folder}/store", options, answers), nprocs=world, join=True
        )
        alone, small, large, whole, parameters = answers.get()
    moved = 2 * (world - 1) / world * (LARGE - SMALL) * FLOAT
    bandwidth = moved / max(large - small, 1e-9)
    latency = small / (2 * math.ceil(math.log2(world)))
    step = Step(options.images, alone, parameters, 128, options.cut)
    predicted = step.seconds(world, bandwidth, latency)
    found = {
        "compute_ms": 1000 * alone,
        "latency_us": 1e6 * latency,
        "megabytes_per_second": bandwidth / 1e6,
        "predicted_ms": 1000 * predicted,
        "measured_ms": 1000 * whole,
        "predicted_of_measured": predicted / whole,
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def resnet50(options: Any) -> Step:
    """Return MoCo v2's step: ResNet-50 with its head, C 128, two cuts of 224 px in colour."""
    compute = options.per_gpu / options.gpu_images
    return Step(options.per_gpu, compute, 27_966_656, 128, 2 * 3 * 224 * 224)


def left(step: Step, world: int, link: tuple[float, float, float]) -> float:
    """Return the share of one GPU's images per second that each of `world` keeps."""
    inside, between, latency = link
    return step.compute / step.seconds(world, inside if world <= PER_MACHINE else between, latency)


def draw(options: Any, path: str) -> dict[str, dict[int, float]]:
    """Draw what is left of a GPU's speed against their number, and return the points."""
    import altair

    step = resnet50(options)
    points = {
        name: {world: round(left(step, world, link), 4) for world in GPUS}
        for name, link in LINKS.items()
    }
    rows = [
        {"GPUs": str(world), "share": share, "link": name}
        for name, found in points.items()
        for world, share in found.items()
    ]
    title = f"MoCo v2, ResNet-50, {options.per_gpu} images per GPU: a model, nothing overlaps"
    chart = altair.Chart(altair.Data(values=rows), title=title, width=480, height=260)
    chart = chart.mark_line(point=True).encode(
        altair.X("GPUs:O", sort=[str(world) for world in GPUS], axis=altair.Axis(labelAngle=0)),
        altair.Y("share:Q", title="share of one GPU's speed", scale=altair.Scale(domain=[0, 1])),
        altair.Color("link:N", title="between machines"),
    )
    chart.save(path, scale_factor=1.5)
    return points


def main(argv: list[str]) -> dict[str, Any]:
    """Measure gloo beside the model, and draw the model where that is asked for."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="ranks on this CPU")
    parser.add_argument("--images", type=int, default=64, help="of a rank, on this CPU")
    parser.add_argument("--width", type=int, default=1024, help="of the network on this CPU")
    parser.add_argument("--cut", type=int, default=6144, help="bytes of an image on this CPU")
    parser.add_argument("--plot", default="", metavar="PATH", help="draw the model to this file")
    parser.add_argument("--per-gpu", type=int, default=32, help="images of a GPU in the plot")
    parser.add_argument(
        "--gpu-images", type=float, default=700.0, help="images per second of one GPU in the plot"
    )
    options = parser.parse_args(argv)
    results: dict[str, Any] = {"gloo": {}}
    for world in options.worlds:
        progress(f"{world} ranks")
        results["gloo"][str(world)] = compare(world, options)
    names = list(next(iter(results["gloo"].values())))
    print("\nA step on gloo ranks of this machine, and what the model says of it")
    cells = [[world, *(f"{found[n]:g}" for n in names)] for world, found in results["gloo"].items()]
    print_columns([["ranks", *names], *cells])
    if options.plot:
        results["plot"] = draw(options, options.plot)
    return report("traffic", results, options)


if __name__ == "__main__":
    main(sys.argv[1:])
