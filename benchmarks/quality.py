"""Which measure without labels follows accuracy?  A study over runs of different quality.

    python benchmarks/quality.py --root CIFAR10_FOLDER [--epochs 15] [--seeds 1] [--rows FILE]

Trains the network of `configs/cifar10_cpu.yaml` with SGD and whole views, and with other rates,
temperatures, crops, colours, key momenta and queues, one of them collapsed, measures each network
on test images, trains a linear classifier on it, and prints the rank correlation of each measure
with its accuracy (Spearman's, with a bootstrap interval over the runs). Measures are read on the
backbone's features and on the head's output.
`cluster_learnability` (arXiv:2206.01251) is here alone: how often the nearest of half of the images
lies in the same of 100 k-means clusters. The last line is one JSON object. A run takes minutes:
with `--rows FILE` each is written there when it is measured, and not repeated at the next start.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval_linear
import train
from benchmarks.harness import arguments, print_columns, progress, report
from benchmarks.race import RECIPE, SGD
from moco.checkpoints.load import load_encoder
from moco.config import DataConfig
from moco.evaluation.measures import MEASURES
from moco.evaluation.quality import view_features
from moco.images.loader import PretrainData
from moco.images.sources import open_source

WITH_SGD = [*RECIPE, *SGD, "--data.crop_min", "0.08"]
RUNS = {
    "recipe": [],
    "rate 0.01": ["--optim.lr", "0.01"],
    "rate 0.03": ["--optim.lr", "0.03"],
    "rate 0.3": ["--optim.lr", "0.3"],
    "temperature 0.03": ["--model.temperature", "0.03"],
    "temperature 1": ["--model.temperature", "1"],
    "crops from 0.8": ["--data.crop_min", "0.8"],
    "crops from 0.05": ["--data.crop_min", "0.05"],
    "no colours": ["--data.jitter", "0", "--data.grey", "0"],
    "keys stand still": ["--model.key_momentum", "1"],
    "queue of one batch": ["--model.queue_size", "256"],
    "collapsed": ["--optim.weight_decay", "0.5", "--optim.lr", "0.5"],
    "temperature 0.5": ["--model.temperature", "0.5"],
    "head linear": ["--model.head", "linear"],
}
CLUSTERS = 100


def cluster_learnability(features: Tensor) -> float:
    """Return for how many of half the images the nearest of the other half is in their cluster."""
    import faiss

    unit = normalize(features[:, 0], dim=1).numpy()
    clusters = min(CLUSTERS, len(unit) // 10)
    means = faiss.Kmeans(unit.shape[1], clusters, niter=20, seed=0, min_points_per_centroid=1)
    means.train(unit)
    of = means.index.search(unit, 1)[1][:, 0]
    half = len(unit) // 2
    nearest = faiss.knn(unit[half:], unit[:half], 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    return 100 * float((of[nearest] == of[half:]).mean())


def judge(checkpoint: str, views: PretrainData, epochs: int) -> dict[str, float]:
    """Measure a checkpoint's backbone and head on views of test images."""
    loaded = load_encoder(checkpoint)
    networks = {"": loaded.backbone, "head ": nn.Sequential(loaded.backbone, loaded.head)}
    found = {}
    for where, network in networks.items():
        features = view_features(network.eval(), views, epochs)
        found |= {f"{where}{name}": measure(features) for name, (measure, _) in MEASURES.items()}
        found[f"{where}cluster_learnability"] = cluster_learnability(features)
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the place of each value, the mean place where values are equal."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation of the places of two rows of values; 0 where one is constant."""
    a, b = ranks(x), ranks(y)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def interval(x: np.ndarray, y: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Return where 95 % of the correlations of resampled runs lie."""
    random = np.random.default_rng(0)
    picks = random.integers(0, len(x), (draws, len(x)))
    low, high = np.quantile([spearman(x[p], y[p]) for p in picks], [0.025, 0.975])
    return float(low), float(high)


def study(options: Any, folder: Path) -> dict[str, Any]:
    """Train, measure and correlate."""
    recipe = yaml.safe_load(Path(RECIPE[1]).read_text(encoding="utf-8"))["data"]
    config = DataConfig(root=options.root, batch_size=options.batch, num_workers=0, **recipe)
    source = open_source(replace(config, channels=3), "test")
    source = source.rows(torch.randperm(len(source), generator=torch.Generator().manual_seed(0)))
    source = source.rows(torch.arange(min(len(source), options.images)))
    views = PretrainData(config, 0, False, False, source)
    views.prepare(torch.device("cpu"))
    kept = Path(options.rows) if options.rows else folder / "rows.json"
    rows: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in range(options.seeds):
        for name, words in list(RUNS.items())[: options.runs]:
            if f"{name}, seed {seed}" in rows:
                continue
            where = folder / f"{name} {seed}".replace(" ", "_")
            words = [*WITH_SGD, *options.words, *words, "--run.dir", str(where)]
            words += ["--data.root", options.root]
            words += ["--trainer.max_epochs", str(options.epochs), "--run.knn_first", "false"]
            words += ["--run.knn_every", "1000", "--run.seed", str(seed)]
            progress(f"{name}, seed {seed}")
            try:
                result = train.main(words)
                judged = ["--checkpoint", result["checkpoint"], "--baselines", "false"]
                top1 = eval_linear.main(judged)["top1"]
            except Exception as error:  # a run that diverges has no accuracy
                progress(f"{name} is left out: {error}")
                continue
            found = judge(result["checkpoint"], views, options.views // 2)
            rows[f"{name}, seed {seed}"] = {"linear": top1, "knn": result["knn_top1"], **found}
            kept.write_text(json.dumps(rows, indent=1))
    names = [name for name in next(iter(rows.values())) if name != "linear"]
    values = {n: np.array([row[n] for row in rows.values()]) for n in ("linear", *names)}
    correlation = {}
    for name in names:
        sign = -1 if name.endswith(("alignment", "uniformity")) else 1
        found = sign * values[name], values["linear"]
        correlation[name] = {"spearman": spearman(*found), "interval": interval(*found)}
    return {"runs": rows, "correlation": correlation}


def show(found: dict[str, Any]) -> None:
    """Print the runs and the correlations."""
    runs, correlation = found["runs"], found["correlation"]
    names = list(next(iter(runs.values())))
    print_columns([["run", *names], *([run, *(f"{row[n]:.3g}" for n in names)]
                                      for run, row in runs.items())])  # fmt: skip
    lines = [["measure", "Spearman", "95 %"]]
    for name, row in sorted(correlation.items(), key=lambda item: -item[1]["spearman"]):
        low, high = row["interval"]
        lines.append([name, f"{row['spearman']:.2f}", f"{low:.2f} to {high:.2f}"])
    print_columns(lines)


def main(argv: list[str]) -> dict[str, Any]:
    """Run the study on a labelled folder with train/ and test/."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--root", required=True, help="labelled folder with train/ and test/")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--views", type=int, default=4, help="of each test image")
    parser.add_argument("--images", type=int, default=2000, help="test images that are measured")
    parser.add_argument("--batch", type=int, default=250, help="of the measured images")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", help="JSON file of the runs that are measured")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="only the first so many")
    parser.add_argument("--words", nargs="*", default=[], help="settings of all runs: NAME=VALUE")
    options = parser.parse_args(argv)
    options.words = [f"--{word}" for word in options.words]
    with tempfile.TemporaryDirectory() as folder:
        found = study(options, Path(folder))
    show(found)
    return report("quality", found, options)


if __name__ == "__main__":
    main(sys.argv[1:])
