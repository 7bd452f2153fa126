"""Listing: every image of a folder or a data set, with its path, split and label as text.

Unlike the sources of training this leaves no image out: a folder is listed whole, whatever splits
and classes lie in it. Shapes: M images.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from moco.config import DataConfig, UserError
from moco.images.datasets import ARRAYS
from moco.images.folders import expanded, list_images
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.labels import by_folder, read_list
from moco.images.sources import SHARDED, open_labelled, open_source
from moco.images.splits import split_folders
from moco.images.tables import read_table
from moco.images.values import settle


@dataclass
class Listing:
    """All images of a set.

    Attributes:
        names: M, paths below the data root, or names of images that are no files.
        splits, labels: M each; all None where there are none.
    """

    source: ImageSource
    names: list[str]
    splits: list[str | None]
    labels: list[str | None]


def list_images_of(data: DataConfig) -> Listing:
    """List all images of a set; `data.channels` is a number.

    Raises:
        UserError: As of `moco.images.sources.open_source`.
    """
    if data.dataset == "own":
        raise UserError(
            "these images came from Python: give them again, as moco.embed does, or a folder of "
            "images with data.root"
        )
    if data.dataset in SHARDED:
        raise UserError(
            f"data.dataset is {data.dataset}, and embed reads files: name a folder with "
            "--data.dataset folder --data.root PATH"
        )
    return _list_arrays(data) if data.dataset in ARRAYS else _list_files(data)


def list_own(source: ImageSource) -> Listing:
    """List images that Python gives; without a path they are called by their number."""
    names = [os.path.abspath(path) for path in source.paths]
    names = names or [f"own/{row:06d}" for row in range(len(source))]
    return Listing(source, names, [None] * len(names), [None] * len(names))


def _list_files(data: DataConfig) -> Listing:
    """List the files below the data root, or those of `data.files`."""
    root = expanded(data.root)
    train, test = split_folders(data)
    paths = read_list(data.files, root) if data.files else list_images(data, root)
    is_split = test is not None and train != root and test != train
    tops = {"train": train} | ({"test": test} if is_split else {})
    found = {split: by_folder(paths, top) for split, top in tops.items()}
    labels = [next(filter(None, each), None) for each in zip(*found.values(), strict=True)]
    splits = [_split_of(path, tops) if is_split else None for path in paths]
    if data.labels:
        table = read_table(data.labels)
        labels = table.labels(paths)
        if table.has_splits:
            unnamed = splits if is_split else ["train"] * len(paths)
            splits = [
                (table.split(path) or "train") if table.name(path) else split
                for path, split in zip(paths, unnamed, strict=True)
            ]
    source = ImageSource(
        f"folder {shown(root)}", None, paths, None, [], data.channels, settle(paths, data)
    )
    start = os.path.join(root, "")
    return Listing(source, [path.removeprefix(start) for path in paths], splits, labels)


def _split_of(path: str, tops: dict[str, str]) -> str | None:
    return next((s for s, top in tops.items() if path.startswith(os.path.join(top, ""))), None)


def _list_arrays(data: DataConfig) -> Listing:
    """Put the splits of a set that is held as arrays behind one another."""
    parts = {split: open_source(data, split) for split in ("train", "test")}
    if data.dataset == "stl10":  # whose train split is the unlabelled one here
        labelled = open_labelled(data)
        parts = {"unlabeled": parts["train"], **dict(zip(("train", "test"), labelled, strict=True))}
    names, splits, labels = [], [], []
    for split, part in parts.items():
        names += [f"{data.dataset}/{split}/{row:06d}" for row in range(len(part))]
        splits += [split] * len(part)
        numbers = [] if part.labels is None else part.labels.tolist()
        labels += [part.classes[n] for n in numbers] or [None] * len(part)
    images = torch.cat([part.images for part in parts.values()])
    source = ImageSource(data.dataset, images, [], None, [], images.shape[1])
    return Listing(source, names, splits, labels)
