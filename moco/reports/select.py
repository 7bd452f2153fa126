"""Which images to label first: typical ones, and no two alike (TypiClust, arXiv:2202.02794).

k-means divides the unit vectors into as many clusters as there are images to choose, 500 at most
and five images in each on average. Round by round every cluster gives the most typical image that
is left in it, the largest cluster first.
This room needs no torch. Shapes: M images, D feature, m images of a cluster, K clusters.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sklearn.cluster import kmeans_plusplus

from moco.config import UserError
from moco.judge_config import SelectConfig
from moco.log import log_to_stderr
from moco.reports.index import open_features, some
from moco.reports.table import Features, unit
from moco.whole_files import output_file

log = logging.getLogger("moco")
MOST_CLUSTERS, _FEWEST = 500, 5  # clusters, and images in each; as in the paper, section 4
_NEIGHBOURS = 20  # as there
_BANK = 20_000  # images of a large cluster among which neighbours are looked for
_BUDGET = 2**30  # bytes of vectors that are held at a time
_POINTS, _FIRST = 256, 32  # images of a cluster from which its centre is found, and begins


def select(config: SelectConfig) -> dict[str, Any]:
    """Write the paths of the chosen images, in the order in which to label them.

    Returns:
        Plain values: the file, and how many were chosen from how many clusters.

    Raises:
        UserError: There are no such features, or fewer images than `count`.
    """
    log_to_stderr()
    features = open_features(config.index)
    chosen, cluster, typicality = typical_and_diverse(features, config.count, config.seed)
    paths = features.column("path")
    target = Path(config.output or features.folder / "selected.csv")
    with (
        output_file(target) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("path", "id", "cluster", "typicality"))
        for number in chosen.tolist():
            row = (number, int(cluster[number]), f"{typicality[number]:.6g}")
            writer.writerow((paths[number], *row))
    log.info("%d of %d images are listed in %s", len(chosen), len(features), target)
    return {
        "command": "select",
        "selected": str(target),
        "count": len(chosen),
        "images": len(features),
        "clusters": len(np.unique(cluster)),
        "first": [paths[number] for number in chosen[:10].tolist()],
    }


def typical_and_diverse(
    features: Features, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose images to label.

    Args:
        count: How many to choose; a longer list does not begin with a shorter one.

    Returns:
        `count` numbers in their order, the cluster of each of M images, and its typicality: one
        over the mean distance to its nearest neighbours in the cluster; large where that is 0.
    """
    if count > len(features):
        raise UserError(f"--count {count} is above the {len(features)} images: lower it")
    clusters = max(1, min(count, MOST_CLUSTERS, len(features) // _FEWEST))
    cluster = _divide(features, clusters, seed)
    typicality = np.zeros(len(features))
    for members, vectors in _groups(features, cluster):
        typicality[members] = _typicality(vectors, seed)
    sizes = np.bincount(cluster, minlength=clusters)
    order = np.lexsort((-typicality, cluster))  # by cluster, the most typical first
    starts = np.cumsum(sizes) - sizes
    turn = np.empty(len(features), np.int64)
    turn[order] = np.arange(len(features)) - starts[cluster[order]]
    return np.lexsort((-sizes[cluster], turn))[:count], cluster, typicality


def _divide(features: Features, clusters: int, seed: int) -> np.ndarray:
    """Return the cluster of each image, by k-means on the unit vectors of a sample."""
    sample = unit(features.take(some(len(features), _POINTS * clusters, seed)))
    few = sample[some(len(sample), _FIRST * clusters, seed)]
    centres, _ = kmeans_plusplus(few, clusters, random_state=seed)
    points = {"min_points_per_centroid": 1, "max_points_per_centroid": _POINTS}
    means = faiss.Kmeans(features.dim, clusters, niter=20, seed=seed, **points)
    means.train(sample, init_centroids=centres)
    found = [means.index.search(unit(block), 1)[1][:, 0] for _, block in features.blocks()]
    return np.concatenate(found)


def _groups(features: Features, cluster: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the members of each cluster, m, and their vectors, m x D, within the budget.

    Of a cluster above the budget its members come in several parts.
    """
    most = max(1, _BUDGET // (4 * features.dim))
    order = np.argsort(cluster, kind="stable")
    ends = np.flatnonzero(np.diff(cluster[order])) + 1
    pieces = [p for c in np.split(order, ends) for p in np.split(c, range(most, len(c), most))]
    while pieces:
        taken, size = 0, 0
        while taken < len(pieces) and (not taken or size + len(pieces[taken]) <= most):
            size += len(pieces[taken])
            taken += 1
        together = np.sort(np.concatenate(pieces[:taken]))
        vectors = unit(features.take(together))
        for members in pieces[:taken]:
            yield members, vectors[np.searchsorted(together, members)]
        del pieces[:taken]


def _typicality(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Return one over the mean distance of each of m vectors to its nearest others."""
    if len(vectors) == 1:
        return np.ones(1)
    chosen = some(len(vectors), _BANK, seed)
    k = min(_NEIGHBOURS, len(chosen) - 1)
    squares, _ = faiss.knn(vectors, vectors[chosen], k + 1)
    near = squares[:, :-1].copy()
    near[chosen] = squares[chosen, 1:]  # the first of these is the image itself
    return 1 / (np.sqrt(np.maximum(near, 0)).mean(1) + 1e-6)
