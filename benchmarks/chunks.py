"""Peak memory and time of a step of MoCo v3 whose batch is encoded in chunks (`data.chunks`).

    python benchmarks/chunks.py [--backbone resnet18] [--batch 128] [--size 64]

Each number of chunks is measured in a process of its own: the peak of its resident memory above
what it holds before the first step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from moco.algorithm.batch import Batch
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig

STEPS = 3


def measure(backbone: str, batch: int, size: int, chunks: int) -> tuple[float, float]:
    """Return the peak in MiB above the start, and the seconds of the fastest step."""
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=backbone, queue_size=0, symmetric="sum", head="mlp_bn", predictor="mlp",
        key_bn="plain",
    )  # fmt: skip
    module = MoCo(model, OptimConfig(), 3, size, chunks=chunks)
    optimizer = module.configure_optimizers()
    views = [torch.randn(batch, 3, size, size) for _ in range(2)]
    start, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(STEPS):
        begin = time.perf_counter()
        optimizer.zero_grad()
        module.training_step(Batch(views, views[::-1], None), 0).backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - start) / 1024, min(times)


def main() -> None:
    """Measure 1, 2, 4 and 8 chunks, and print a table."""
    parser = argparse.ArgumentParser(description="Memory and time of a batch in chunks.")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    print("| chunks | peak above the start, MiB | step, s |\n|---|---|---|")
    for chunks in (1, 2, 4, 8):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            arguments = options.backbone, options.batch, options.size, chunks
            memory, seconds = pool.apply(measure, arguments)
        print(f"| {chunks} | {memory:.0f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
