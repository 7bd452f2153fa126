"""bf16 with channels-last against fp32 as PyTorch lays it out, for one training step on a CPU.

    python benchmarks/precision.py [--batch 64] [--threads 2] [--rounds N]

Claim: at least 1.8 times as many images per second for a ResNet-18 with the CIFAR stem, where the
CPU multiplies bf16 natively (AVX512-BF16); elsewhere the script says so and measures nothing. One
turn is one step of `moco.MoCo`: query forward and backward, key encoder's update and forward, loss
over the queue, SGD. All ways are this same step; views are made beforehand. The middle way, fp32
in channels-last, shows which part the memory layout has. The bound is the rate at which large
matrix products, timed in the same turns, would do the step's multiplications. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Row, arguments, interleave, progress, report, table
from moco.algorithm.batch import Batch
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig

TARGET = 1.8
PLAIN, LAYOUT, BF16 = "fp32, contiguous", "fp32, channels-last", "bf16, channels-last"
TYPES = (torch.float32, torch.bfloat16)
SIDE = 2048  # of the square matrices


def step(
    model: ModelConfig, batch: int, size: int, channels_last: bool, bf16: bool
) -> Callable[[], None]:
    """Build one way to take a training step, with weights and views of its own."""
    torch.manual_seed(0)
    module = MoCo(model, OptimConfig(), 3, size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=layout)
    module.wants_metrics = False  # as in 49 steps of 50
    optimizer = module.configure_optimizers()
    query, key = torch.randn(2, batch, 3, size, size)
    order = torch.randperm(batch)

    def take() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module.training_step(Batch([query], [key], order), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return take


def operations(take: Callable[[], None]) -> int:
    """Count the floating-point operations of one step's convolutions and products."""
    with FlopCounterMode(display=False) as counter:
        take()
    return counter.get_total_flops()


def measure(
    model: ModelConfig, options: argparse.Namespace
) -> tuple[list[Row], dict[str, float], float]:
    """Let the ways and the products take turns; return rows, bounds and operations an image."""
    ways: dict[Any, Callable[[], Any]] = {
        PLAIN: step(model, options.batch, options.size, channels_last=False, bf16=False),
        LAYOUT: step(model, options.batch, options.size, channels_last=True, bf16=False),
        BF16: step(model, options.batch, options.size, channels_last=True, bf16=True),
    }
    products = {dtype: torch.randn(2, SIDE, SIDE).to(dtype) for dtype in TYPES}
    for dtype, (a, b) in products.items():
        ways[dtype] = lambda a=a, b=b: a @ b
    per_image = operations(ways[PLAIN]) / options.batch
    seconds = interleave(ways, options.rounds)
    fp32, bf16 = (Row("", seconds[d], 2 * SIDE**3 / per_image).median for d in TYPES)
    rows = [
        Row(PLAIN, seconds[PLAIN], options.batch, bound=fp32),
        Row(LAYOUT, seconds[LAYOUT], options.batch, {PLAIN: None}, fp32),
        Row(BF16, seconds[BF16], options.batch, {PLAIN: TARGET}, bf16),
    ]
    return rows, {"fp32": round(fp32, 1), "bf16": round(bf16, 1)}, per_image


def main(argv: list[str]) -> dict[str, Any]:
    """Let the ways take turns."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--backbone", default="resnet18", help="any ResNet, with the CIFAR stem")
    parser.add_argument("--width", type=float, default=1.0, help="channel multiplier")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of a view in pixels")
    parser.add_argument("--queue", type=int, default=4096, help="negative keys")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not torch.cpu._is_avx512_bf16_supported():
        progress("this CPU has no bf16 instructions: nothing to compare")
        return report("precision", {"skipped": "no bf16 instructions"}, options)
    model = ModelConfig(
        options.backbone,
        stem="cifar",
        width=options.width,
        queue_size=options.queue,
        key_bn="split",
        bn_splits=8,
    )
    rows, bounds, per_image = measure(model, options)
    title = (
        f"Training step, {options.backbone} with the CIFAR stem, {options.size} px, "
        f"batch {options.batch}, {options.threads} threads"
    )
    found = table(title, rows, "images/s")
    print(f"  bounds: {bounds}; {per_image / 1e9:.2f} GFLOP an image")
    return report("precision", {"step": found, "bounds": bounds}, options)


if __name__ == "__main__":
    main(sys.argv[1:])
