"""All that is claimed for a GPU, in one command, as one table.

    make bench-gpu [ARGS="--cifar CIFAR10_FOLDER --only resnet18,resnet50"]
    python benchmarks/gpu.py [--cifar CIFAR10_FOLDER] [--jpegs FOLDER] [--only PARTS] [--quick]

Parts, each a process of its own, in this order (about 25 minutes with all of them):

    tests      what must hold before a speed means anything: losses with and without compiling equal
               within 1e-5 over 20 steps, compiled views, no synchronisation between readings
    resnet18   CIFAR ResNet-18, batch 512: claimed 60,000 images/s in the loop (benchmarks/loop.py)
    resnet50   ResNet-50, 224 px, batch 256: claimed 5,000 images/s
    fed        the same fed from JPEGs by workers: claimed 95 % of the resident rate
    plain      the first two without compiling
    demo       200 epochs of configs/cifar10.yaml with kNN every 10: claimed under 4 minutes and
               82.6 % (published, on the original images); needs --cifar
    symmetric  the same with the symmetric loss: 85.3 % (published); needs --cifar

A part that fails is told and the others go on. The last line is one JSON object; the record is
benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import ROOT, print_columns, progress, report

PARTS = ("tests", "resnet18", "resnet50", "fed", "plain", "demo", "symmetric")
TARGETS = {"resnet18": 60_000, "resnet50": 5_000}  # images per second on one H200
EPOCHS, MINUTES = 200, 4


def call(words: list[str], limit: float) -> dict[str, Any]:
    """Run one part and return what it printed last, or why there is nothing.

    Args:
        words: Arguments of Python.
        limit: Seconds after which it is ended.
    """
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not over after {limit:.0f} s"}
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {lines[-1][:200]}"}
    found = json.loads(lines[-1]) if lines[-1].startswith("{") else {"said": lines[-1]}
    return found | {"wall_seconds": round(time.perf_counter() - start, 1)}


def loop(options: argparse.Namespace, case: str, *more: str) -> dict[str, Any]:
    """Run benchmarks/loop.py on one case."""
    words = ["benchmarks/loop.py", "--case", case, *more]
    words += ["--rounds", "2", "--block-steps", "5"] if options.quick else []
    return call([*words, *options.train], 600)


def fed(options: argparse.Namespace) -> dict[str, Any]:
    """Feed ResNet-50 from JPEGs, synthetic ones unless a folder is given."""
    if options.jpegs:
        return loop(options, "resnet50", "--feed", options.jpegs)
    from benchmarks.feed import write_images

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 16 if options.quick else 500)
        return loop(options, "resnet50", "--feed", folder)


def demo(options: argparse.Namespace, symmetric: str) -> dict[str, Any]:
    """Train the official demo's recipe on a CIFAR-10 folder, or the original files."""
    with tempfile.TemporaryDirectory() as folder:
        kind = "folder" if (Path(options.cifar) / "train").is_dir() else "cifar10"
        words = ["train.py", "--config", "configs/cifar10.yaml", "--data.dataset", kind]
        words += ["--data.root", options.cifar, "--run.dir", str(Path(folder) / "run")]
        words += ["--model.symmetric", symmetric, "--run.knn_every", "10"]
        words += ["--run.report", "false"]
        words += ["--trainer.max_epochs", str(2 if options.quick else EPOCHS)]
        return call([*words, *options.train], 1500)


def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part by its name."""
    if part == "tests":
        return call(["-m", "pytest", "tests/test_fast_step.py", "-q", "--show-capture=no"], 900)
    if part in TARGETS:
        return loop(options, part)
    if part == "fed":
        return fed(options)
    if part == "plain":
        return {case: loop(options, case, "--model.compile", "off") for case in TARGETS}
    if not options.cifar:
        return {"failed": "needs --cifar"}
    return demo(options, "none" if part == "demo" else "sum")


def lines_of(results: dict[str, Any]) -> list[list[str]]:
    """Make the table's lines."""
    lines = [["", "images/s", "target", "of bare encoders", "of H200's bound", "peak GiB", "kNN"]]
    known = {**results, **{f"{k}, plain": v for k, v in results.get("plain", {}).items()}}
    known.pop("plain", None)
    resident = rate(known.get("resnet50", {}))
    for name, found in known.items():
        if "failed" in found:
            lines.append([name, found["failed"], *[""] * 5])
            continue
        if "loop" not in found:
            seconds = found.get("seconds", found.get("wall_seconds"))
            cells = [f"{found.get('images_per_second', '')}", f"{seconds} s", "", "", ""]
            lines.append([name, *cells, str(found.get("knn_top1", found.get("said", "")))])
            continue
        target = TARGETS.get(name, 0.95 * resident if name == "fed" and resident else 0)
        verdict = f"{target:,.0f} {'reached' if rate(found) >= target else 'missed'}"
        whole = found["loop"]["whole loop"]
        share = found.get("share_of_h200_bound_fused", 0)
        lines.append(
            [
                name,
                f"{rate(found):,.0f}",
                verdict if target else "",
                f"{100 * whole['against']['bare encoders']['ratio']:.0f} %",
                f"{100 * share:.0f} %" if share else "",
                str(found.get("peak_memory_gib", "")),
                "",
            ]
        )
    return lines


def rate(found: dict[str, Any]) -> float:
    """Return the images per second of a result of loop.py, 0 without one."""
    return found.get("loop", {}).get("whole loop", {}).get("median", 0.0)


def default_parts(options: argparse.Namespace) -> list[str]:
    """Return all parts that can be run."""
    return [part for part in PARTS if options.cifar or part not in ("demo", "symmetric")]


def main(argv: list[str]) -> int:
    """Run the parts and print the table; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", default="", help="CIFAR-10: a folder with train/ and test/")
    parser.add_argument("--jpegs", default="", help="photographs to feed from")
    parser.add_argument("--only", default="", help=f"comma-separated, of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: does it run?")
    parser.add_argument("--without-gpu", action="store_true", help="to try the script itself")
    parser.add_argument("--json", default="", metavar="PATH", help="where the record goes")
    options, options.train = parser.parse_known_args(argv)
    parts = options.only.split(",") if options.only else default_parts(options)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: take some of {','.join(PARTS)}")
    if not (torch.cuda.is_available() or options.without_gpu):
        print("error: no GPU here: benchmarks/loop.py measures a CPU", file=sys.stderr)
        return 2
    results: dict[str, Any] = {}
    for part in parts:
        progress(f"-- {part}")
        results[part] = run_part(part, options)
        print()
        print_columns(lines_of(results))
        report("gpu", results, options)  # after each part: what is cut off keeps what it had
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
