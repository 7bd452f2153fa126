"""Sights: what an encoder makes of a sample of images: neighbours, clusters, twins and a map.

Shapes: M images of the sample, D feature, k neighbours, T side of a tile.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moco.config import DataConfig, UserError
from moco.evaluation.features import check_finite
from moco.evaluation.search import nearest
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData
from moco.pixels import normalisation
from moco.random import permutation
from moco.reports import layout
from moco.reports.pictures import tiles

log = logging.getLogger("moco")
SECONDS, LEAST = 25.0, 256  # features are taken for so long, and of so many images in any case
NEIGHBOURS = 20
TWIN_COSINE, TWIN_PIXELS = 0.95, 12.0  # of near-duplicates; mean difference of their tiles, of 255
_PCA = 50  # dimensions that are mapped


@dataclass
class Sample:
    """Images that were looked at, in a random order.

    Attributes:
        source: The set that they are from.
        rows: M, their places in it.
        features: M x D unit vectors.
        tiles: M x 3 x T x T uint8.
        similarity, neighbours: M x k cosines, best first, and places in the sample; an image is not
            its own neighbour.
    """

    source: ImageSource
    rows: Tensor
    features: Tensor
    tiles: Tensor
    similarity: Tensor
    neighbours: Tensor

    @property
    def labels(self) -> list[str] | None:
        """Name the class of each image; None where the set has no labels."""
        if self.source.labels is None:
            return None
        classes = self.source.classes
        return [classes[label] for label in self.source.labels[self.rows].tolist()]

    @property
    def is_one_point(self) -> bool:
        """Tell whether all images have the same feature, but for rounding."""
        return bool((self.features - self.features[:1]).abs().max() < 1e-4)


def look(
    network: nn.Module, source: ImageSource, data: DataConfig, count: int, seed: int
) -> Sample:
    """Take features and small pictures of a random sample, in this process alone.

    A network that is slow on this machine sees fewer images than `count`.

    Args:
        network: The backbone in eval mode, on the device that is to be used.
        count: Images at most.

    Raises:
        UserError: No image can be read, or a feature is not finite.
    """
    device = next(network.parameters()).device
    chosen = permutation(seed, "report", 0, len(source))[:count]
    # Among a few images any share may be unreadable.
    images = LabelledData(source.rows(chosen), replace(data, max_bad_fraction=1.0))
    mean, std = (torch.tensor(values, device=device) for values in normalisation(data))
    features, rows, small, end = [], [], [], time.monotonic() + SECONDS
    with torch.inference_mode():
        for batch, places in images.cut(torch.arange(len(images)).split(64), device):
            features.append(network(batch).float().cpu())
            rows.append(chosen[places.cpu()])
            small.append(tiles(batch, mean, std))
            if time.monotonic() > end and sum(map(len, rows)) >= LEAST:
                break
    if not features:
        raise UserError("none of the images can be read")
    found = torch.cat(features)
    check_finite(found, "the encoder's features")
    found = normalize(found)
    similarity, neighbours = _neighbours(found, min(NEIGHBOURS, len(found) - 1))
    return Sample(source, torch.cat(rows), found, torch.cat(small), similarity, neighbours)


def _neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosines M x k and places of the nearest others."""
    if k < 1:
        return torch.empty(len(features), 0), torch.empty(len(features), 0, dtype=torch.int64)
    similarity, index = nearest(features, features, k + 1)
    own = index == torch.arange(len(features))[:, None]
    own[:, -1] |= ~own.any(1)  # many equal images: itself may not be among the nearest
    keep = ~own
    return similarity[keep].view(-1, k), index[keep].view(-1, k)


def typical(sample: Sample, count: int) -> tuple[list[int], list[int]]:
    """Return the places of the most typical images and of the oddest.

    Typical is what is close to its neighbours, by their mean cosine (TypiClust, arXiv:2202.02794).
    Of a typical image the neighbours are passed over, which look like it.
    """
    density = sample.similarity.mean(1)
    order = density.argsort(descending=True).tolist()
    found, taken = [], set()
    for place in order:
        if place not in taken and len(found) < count:
            found.append(place)
            taken |= {place, *sample.neighbours[place].tolist()}
    return found, order[::-1][:count]


def clusters(sample: Sample, seed: int) -> list[list[int]]:
    """Find clusters by spherical k-means, as many as there are classes, from 2 to 20.

    Each is the places of its images, the most central first.
    """
    import faiss  # late: faiss and torch each load an OpenMP runtime

    classes = len(sample.source.classes)
    count = min(max(classes, 2) if classes else 12, 20, len(sample.rows) // 4)
    if count < 2 or sample.is_one_point:
        return []
    features = np.ascontiguousarray(sample.features.numpy())
    options = {"niter": 25, "seed": seed % 2**31, "spherical": True, "min_points_per_centroid": 1}
    means = faiss.Kmeans(features.shape[1], count, **options)
    means.train(features)
    closeness = sample.features @ torch.from_numpy(means.centroids).T
    best, number = closeness.max(1)
    found = []
    for each in range(count):
        places = (number == each).nonzero()[:, 0]
        if len(places):
            found.append(places[best[places].argsort(descending=True)].tolist())
    return sorted(found, key=len, reverse=True)


def twins(sample: Sample) -> list[tuple[int, int, float]]:
    """Return pairs of near-duplicates, the most alike first: two places and their cosine.

    The features are near one another, and so are the pixels: an encoder may take different images
    for the same.
    """
    near = (sample.similarity >= TWIN_COSINE).nonzero().tolist()
    pairs = {}
    for place, k in near:
        other = int(sample.neighbours[place, k])
        pairs[min(place, other), max(place, other)] = float(sample.similarity[place, k])
    found = []
    for (one, other), cosine in pairs.items():
        difference = sample.tiles[one].float() - sample.tiles[other].float()
        if difference.abs().mean() < TWIN_PIXELS:
            found.append((one, other, cosine))
    return sorted(found, key=lambda pair: -pair[2])


def make_map(sample: Sample, seed: int) -> np.ndarray | None:
    """Place the images on a plane, M x 2 from 0 to 1, by t-SNE (van der Maaten, Hinton, 2008).

    Returns:
        None where there are too few images or all have one feature.

    Raises:
        UserError: More than 10,000 images, and openTSNE is not installed.
    """
    from sklearn.decomposition import PCA

    count = len(sample.rows)
    if count < 5 or sample.is_one_point:
        return None
    features = sample.features.numpy()
    width = min(_PCA, *features.shape)
    features = PCA(width, random_state=0).fit_transform(features)
    remedy = f"take --images {layout.MANY}"
    places = layout.tsne(features, seed % 2**31, remedy, steps=500)
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-12)
