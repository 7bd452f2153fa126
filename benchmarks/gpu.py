"""All that is claimed for a GPU, in one command, as one table.

    make bench-gpu [ARGS="--cifar CIFAR10_FOLDER --only resnet18,resnet50"]
    python benchmarks/gpu.py [--cifar CIFAR10_FOLDER] [--jpegs FOLDER] [--only PARTS] [--quick]

Parts, each ended after 8 minutes, in this order; the table and the record are written after each:

    tests       what must hold before a speed means anything: losses with and without compiling and
                capturing equal within 1e-5 over 20 steps, compiled views, no synchronisation
    resnet18    CIFAR ResNet-18, batch 512, plain, compiled and captured: claimed 60,000 images/s in
                the loop (benchmarks/loop.py)
    epochs      20 epochs of configs/cifar10.yaml with kNN every 10; needs --cifar
    resnet50    ResNet-50, 224 px, batch 256: claimed 5,000 images/s
    views       two views of 224 px alone, compiled and not (benchmarks/views.py)
    demo        200 epochs as in `epochs`: claimed under 4 minutes and 82.6 % (published, on the
                original images, at the head); needs --cifar
    imagenette  ResNet-18, 128 px, batch 256, images as large as Imagenette's
    fed         ResNet-50 fed from JPEGs by workers: claimed 95 % of the resident rate
    symmetric   the demo with the symmetric loss: 85.3 % (published); needs --cifar

A part that fails is told and the others go on. Without a GPU it says what it would run. The last
line is one JSON object; the record is benchmarks/results/gpu.json.
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

NEED_CIFAR = ("epochs", "demo", "symmetric")
TARGETS = {"resnet18": 60_000, "resnet50": 5_000}  # images per second on one H200
LIMIT_S = 480.0  # of a part
TESTS = ["tests/training/test_fast_step.py", "tests/training/test_one_graph.py"]
WAYS = {"plain": ["--model.compile", "off"], "compiled": ["--uncaptured"], "captured": []}


class Part:
    """One part: what it runs, one command after another, within its time.

    Args:
        options: Of this script.
        is_told: Only say what would be run.
    """

    def __init__(self, options: argparse.Namespace, is_told: bool = False) -> None:
        self.options, self.is_told = options, is_told
        self.end = time.monotonic() + LIMIT_S

    def call(self, words: list[str]) -> dict[str, Any]:
        """Run one command of Python and return what it printed last, or why there is nothing."""
        if self.is_told:
            return {"said": " ".join(["python", *words])}
        start = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
                timeout=max(self.end - start, 1),
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"the part was not over after {LIMIT_S:.0f} s"}
        lines = done.stdout.strip().splitlines() or [""]
        if done.returncode:
            return {"failed": f"exit code {done.returncode}: {lines[-1][:200]}"}
        found = json.loads(lines[-1]) if lines[-1].startswith("{") else {"said": lines[-1]}
        return found | {"wall_seconds": round(time.monotonic() - start, 1)}

    def loop(self, case: str, *more: str) -> dict[str, Any]:
        """Run benchmarks/loop.py on one case."""
        rounds = ["--rounds", "2", "--block-steps", "5"] if self.options.quick else []
        return self.call(
            ["benchmarks/loop.py", "--case", case, *more, *rounds, *self.options.train]
        )

    def tests(self) -> dict[str, Any]:
        """Run the tests that need a GPU, and those of what it computes."""
        return self.call(["-m", "pytest", *TESTS, "-q", "--show-capture=no"])

    def resnet18(self) -> dict[str, Any]:
        """Measure the CIFAR step plain, compiled and captured."""
        return {name: self.loop("resnet18", *words) for name, words in WAYS.items()}

    def resnet50(self) -> dict[str, Any]:
        """Measure the step of ResNet-50."""
        return self.loop("resnet50")

    def imagenette(self) -> dict[str, Any]:
        """Measure the step of images of 128 px."""
        return self.loop("imagenette")

    def views(self) -> dict[str, Any]:
        """Measure views of 224 px alone."""
        images = ["--size", "224", "--images", "1024", "--recipes", "v2"]
        return self.call(["benchmarks/views.py", "--ours", *images])

    def fed(self) -> dict[str, Any]:
        """Feed ResNet-50 from JPEGs, synthetic ones unless a folder is given."""
        if self.options.jpegs or self.is_told:
            return self.loop("resnet50", "--feed", self.options.jpegs or "JPEGS")
        from benchmarks.feed import write_images

        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), 16 if self.options.quick else 500)
            return self.loop("resnet50", "--feed", folder)

    def epochs(self) -> dict[str, Any]:
        """Train 20 epochs of the demo's recipe."""
        return self._train(20, "none")

    def demo(self) -> dict[str, Any]:
        """Train the official demo's recipe."""
        return self._train(200, "none")

    def symmetric(self) -> dict[str, Any]:
        """Train it with the symmetric loss."""
        return self._train(200, "sum")

    def _train(self, epochs: int, symmetric: str) -> dict[str, Any]:
        """Train on a CIFAR-10 folder, or the original files."""
        with tempfile.TemporaryDirectory() as folder:
            kind = "folder" if (Path(self.options.cifar) / "train").is_dir() else "cifar10"
            words = ["train.py", "--config", "configs/cifar10.yaml", "--data.dataset", kind]
            words += ["--data.root", self.options.cifar or "CIFAR10_FOLDER"]
            words += ["--run.dir", str(Path(folder) / "run"), "--run.knn_every", "10"]
            words += ["--model.symmetric", symmetric, "--run.report", "false"]
            words += ["--trainer.max_epochs", str(2 if self.options.quick else epochs)]
            return self.call([*words, *self.options.train])


PARTS = ("tests", "resnet18", "epochs", "resnet50", "views", "demo", "imagenette", "fed")
PARTS += ("symmetric",)


def lines_of(results: dict[str, Any]) -> list[list[str]]:
    """Make the table's lines."""
    lines = [["", "images/s", "target", "of bare encoders", "of H200's bound", "peak GiB", "kNN"]]
    known = single(results)
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
        target = TARGETS.get(
            name.partition(",")[0], 0.95 * resident if name == "fed" and resident else 0
        )
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


def single(results: dict[str, Any]) -> dict[str, Any]:
    """Give every way of a part a line of its own."""
    lines = {}
    for part, found in results.items():
        ways = {f"{part}, {way}": found[way] for way in WAYS if way in found}
        lines |= ways or {part: found}
    return lines


def rate(found: dict[str, Any]) -> float:
    """Return the images per second of a result of loop.py, 0 without one."""
    return found.get("loop", {}).get("whole loop", {}).get("median", 0.0)


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
    parts = options.only.split(",") if options.only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: take some of {','.join(PARTS)}")
    if not (torch.cuda.is_available() or options.without_gpu):
        for name, told in single({p: getattr(Part(options, True), p)() for p in parts}).items():
            print(f"{name:20}  would run: {told['said']}")
        print("error: no GPU here, all parts skipped: benchmarks/loop.py measures a CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    results: dict[str, Any] = {}
    for part in parts:
        progress(f"-- {part}")
        if part in NEED_CIFAR and not options.cifar:
            results[part] = {"failed": "skipped: it needs --cifar"}
        else:
            results[part] = getattr(Part(options), part)()
        print()
        print_columns(lines_of(results))
        report("gpu", results, options)  # after each part: what is cut off keeps what it had
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
