"""The index of features: their nearest neighbours by cosine, found by faiss.

Up to `EXACT` images every vector is compared. Beyond, k-means divides them into cells, and the
cells nearest to a query are looked into, so that a neighbour in another cell can be missed. The
file is plain faiss: inner products of unit vectors, numbered as the rows of the Parquet file.
This room needs no torch. Shapes: M images, n rows of a block, D feature, k neighbours, P pairs.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from moco.config import RunError, UserError
from moco.reports.table import INDEX, Features, unit
from moco.whole_files import output_file

log = logging.getLogger("moco")
EXACT = 100_000  # images up to which all are compared
LOOKED_INTO, LOOKED_NEAR = 32, 8  # cells of a query, and of each image where all are asked for
PARTNERS = 20  # of an image among its near-duplicates
_SAMPLE = 40  # vectors of a cell from which its centre is found
_SLACK = 1e-5  # rounding of a cosine


class Pairs(NamedTuple):
    """Near-duplicates, the most alike first: P numbers of each side, first < second; P cosines.

    `crowded` counts the images with `PARTNERS` partners, which may have more that are not listed.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    crowded: int


def build_index(features: Features) -> Any:
    """Build the index of a file of features in memory, from one block of vectors after another."""
    if len(features) > EXACT:
        return _build_cells(features)
    index = faiss.IndexFlatIP(features.dim)
    for _, block in features.blocks():
        index.add(unit(block))
    return index


def _build_cells(features: Features) -> Any:
    """Build an index of cells; each is given its size first, since growing would take twice it."""
    count = len(features)
    cells = 4 * math.isqrt(count)
    kind = f"IVF{cells},Flat"
    index = faiss.index_factory(features.dim, kind, faiss.METRIC_INNER_PRODUCT)
    log.info("index: %d vectors in %d cells", count, cells)
    index.train(unit(features.take(some(count, _SAMPLE * cells, 0))))
    index.nprobe = LOOKED_INTO
    cell = [index.quantizer.search(unit(block), 1)[1][:, 0] for _, block in features.blocks()]
    for number, size in enumerate(np.bincount(np.concatenate(cell), minlength=cells).tolist()):
        index.invlists.resize(number, size)
        index.invlists.resize(number, 0)
    for (_, block), own in zip(features.blocks(), cell, strict=True):
        rows = unit(block)
        index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(own))
    return index


def write_index(features: Features) -> Path:
    """Write the index of a file of features beside it unless it is there; return its path."""
    path = features.folder / INDEX
    if path.is_file():
        return path
    index = build_index(features)
    with output_file(path) as temporary:
        temporary.touch()  # of a place that takes no file faiss does not say why
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # faiss raises nothing else where a disk is full
            raise OSError(str(error)) from None
    return path


def open_index(features: Features) -> Any:
    """Open the index beside a file of features, without reading it whole, or build one.

    Raises:
        RunError: It is of other features, or damaged.
    """
    path = features.folder / INDEX
    if not path.is_file():
        log.info("%s is not there: an index is built for this once (embed --index keeps one)", path)
        return build_index(features)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-100:]
        raise RunError(f"{path} is damaged ({reason}): remove it, and embed again") from None
    if (index.ntotal, index.d) != (len(features), features.dim):
        raise RunError(f"{path} is of other features than the file beside it: remove it")
    return index


def neighbours(index: Any, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k images most alike to each of n vectors: n x k cosines, best first, and numbers.

    A number is -1 where fewer than k were found.
    """
    return index.search(unit(vectors), min(k, index.ntotal))


def others(index: Any, start: int, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k other images most alike to each of n that are in the index, from `start` on.

    Returns:
        As of `neighbours`, with k columns, or one fewer than there are images.
    """
    k = min(k, index.ntotal - 1)
    near = faiss.SearchParametersIVF(nprobe=LOOKED_NEAR) if hasattr(index, "nprobe") else None
    similarity, found = index.search(unit(block), k + 1, params=near)
    own = np.arange(start, start + len(block))[:, None]
    itself = found == own
    itself[~itself.any(1), -1] = True  # among many equal ones it may be missing: drop the last
    keep = ~itself
    return similarity[keep].reshape(len(block), k), found[keep].reshape(len(block), k)


def near_duplicates(features: Features, index: Any, above: float) -> Pairs:
    """List the pairs of images whose cosine is `above` or higher, each pair once.

    Of each image its `PARTNERS` most alike are looked at: where more images are equal, each of them
    is in the list, but not each of their pairs.
    """
    keys, cosines, count, crowded = [], [], len(features), 0
    for start, block in features.blocks():
        similarity, found = others(index, start, block, PARTNERS)
        row, place = np.nonzero((similarity >= above - _SLACK) & (found >= 0))
        crowded += int((np.bincount(row) == PARTNERS).sum()) * (count > PARTNERS + 1)
        one, other = row + start, found[row, place]
        keys.append(np.minimum(one, other) * count + np.maximum(one, other))
        cosines.append(np.minimum(similarity[row, place], 1))
    key, places = np.unique(np.concatenate(keys), return_index=True)
    similarity = np.concatenate(cosines)[places]
    order = np.argsort(-similarity, kind="stable")
    return Pairs(key[order] // count, key[order] % count, similarity[order], crowded)


def open_features(folder: str) -> Features:
    """Open the features of a directory, one vector for each image.

    Raises:
        UserError: There are none, or they are maps.
    """
    features = Features(folder)
    if len(features.shape) > 1:
        raise UserError(
            f"--index {folder} holds maps of the shape {list(features.shape)}, not one vector for "
            "each image: embed with --features backbone"
        )
    return features


def some(count: int, most: int, seed: int) -> np.ndarray:
    """Choose up to `most` of `count` rows at random, in rising order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
