"""Labels of chosen images against labels of random ones: is `moco select` worth asking?

    python -m moco embed --checkpoint CKPT --data.root CIFAR10/train --output train
    python -m moco embed --checkpoint CKPT --data.root CIFAR10/test --output test
    python benchmarks/selection.py --index train --test test

For each number of labels both ways choose that many images, `--draws` times with other seeds. Two
classifiers learn from their labels on unit features: the nearest class mean, and logistic
regression. What is quoted is top-1 on the test images, mean and standard error over the draws; a
class without a label is never right.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import arguments, print_columns, progress, report
from moco.reports.index import open_features
from moco.reports.select import typical_and_diverse
from moco.reports.table import Features, unit

CLASSIFIERS = {
    "nearest class mean": NearestCentroid,
    "logistic regression": lambda: LogisticRegression(C=10, max_iter=300),
}


def labelled(folder: str) -> tuple[Features, np.ndarray, np.ndarray]:
    """Open features: the file, its unit vectors, M x D, and its labels, M."""
    features = open_features(folder)
    labels = features.column("label")
    if None in labels:
        sys.exit(f"{folder} has images without a label")
    return features, unit(features.take(np.arange(len(features)))), np.array(labels)


def score(
    rows: np.ndarray, bank: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """Return top-1 in percent of each classifier that learns from some rows of the bank."""
    vectors, labels = (part[rows] for part in bank)
    if len(np.unique(labels)) == 1:
        return dict.fromkeys(CLASSIFIERS, 100 * float((test[1] == labels[0]).mean()))
    return {
        name: 100 * float(make().fit(vectors, labels).score(*test))
        for name, make in CLASSIFIERS.items()
    }


def summary(scores: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and standard error over the draws, by classifier."""
    found = {}
    for name in CLASSIFIERS:
        values = np.array([each[name] for each in scores])
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = {"mean": round(values.mean(), 2), "error": round(float(error), 2)}
    return found


def main() -> None:
    """Compare the two ways for each number of labels."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--index", required=True, help="features to choose from")
    parser.add_argument("--test", required=True, help="features to test on")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 20, 50, 100, 500])
    parser.add_argument("--draws", type=int, default=20, help="seeds of each way")
    options: argparse.Namespace = parser.parse_args()
    features, vectors, labels = labelled(options.index)
    bank, test = (vectors, labels), labelled(options.test)[1:]
    results: dict[str, Any] = {}
    lines = [["labels", "classifier", "chosen", "random", "classes chosen", "random"]]
    for count in options.counts:
        progress(f"{count} labels")
        ways: dict[str, list[np.ndarray]] = {"chosen": [], "random": []}
        for seed in range(options.draws):
            ways["chosen"].append(typical_and_diverse(features, count, seed)[0])
            rng = np.random.default_rng(seed)
            ways["random"].append(rng.choice(len(features), count, replace=False))
        found = {way: summary([score(r, bank, test) for r in rows]) for way, rows in ways.items()}
        seen = {
            way: float(np.mean([len(np.unique(labels[r])) for r in rows]))
            for way, rows in ways.items()
        }
        results[str(count)] = {"top1": found, "classes": seen}
        for name in CLASSIFIERS:
            pair = [found[way][name] for way in ways]
            texts = [f"{each['mean']:.1f} ± {each['error']:.1f}" for each in pair]
            lines.append([str(count), name, *texts, *(f"{n:.1f}" for n in seen.values())])
    print_columns(lines)
    report("selection", results, options)


if __name__ == "__main__":
    main()
