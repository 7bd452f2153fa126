"""Data sets that are held as arrays: scikit-learn's digits, CIFAR and STL-10 of torchvision.

Nothing is unpickled but CIFAR's own files, after their checksums.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images.folders import expanded
from moco.images.formats import escaped, shown
from moco.pixels import to_uint8

ARRAYS = ("digits", "cifar10", "cifar100", "stl10")


class Arrays(NamedTuple):
    """One split of a set: N C H W uint8, N labels or None, and the names of the classes."""

    images: Tensor
    labels: Any
    classes: list[str]


def refuse_own(data: DataConfig) -> None:
    """Raise UserError where the images come from Python, so that no setting says where they lie."""
    if data.dataset == "own":
        raise UserError(
            "data.dataset is own, so the images come from Python: give them to moco.pretrain, with "
            "resume= to go on with a run, or to moco.knn and moco.linear; or set data.dataset"
        )


def read_arrays(data: DataConfig, split: str) -> Arrays:
    """Read one split of a set in ARRAYS; stl10 has train, test and unlabeled, the others no third.

    Raises:
        UserError: The set is missing or corrupt, or has other channels.
    """
    if data.dataset == "digits":
        return _read_digits(data, split)
    if data.channels != 3:
        raise UserError(f"data.channels is {data.channels}: {data.dataset} is RGB, set it to 3")
    from torchvision import datasets

    if data.dataset == "stl10":
        found = _open_torchvision(datasets.STL10, data, split=split)
        labels = None if split == "unlabeled" else found.labels
        classes = getattr(found, "classes", range(1, 11))  # the file of names may be missing
        names = [] if labels is None else [str(name) for name in classes]
        return Arrays(torch.from_numpy(found.data).contiguous(), labels, names)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.dataset]
    found = _open_torchvision(kind, data, train=split == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    return Arrays(images.contiguous(), found.targets, found.classes)


def _read_digits(data: DataConfig, split: str) -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if data.channels not in (1, 3):
        raise UserError(f"data.channels is {data.channels}: digits are grey, set it to 1 or 3")
    digits = load_digits()
    rows = train_test_split(
        np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0
    )[split == "test"]
    images = torch.from_numpy(to_uint8(digits.images[rows], (0.0,), (16.0,)))[:, None]  # N 1 8 8
    return Arrays(
        images.repeat(1, data.channels, 1, 1), digits.target[rows], [str(i) for i in range(10)]
    )


def _open_torchvision(kind: Any, data: DataConfig, **split: Any) -> Any:
    """Open a set of torchvision, which checks the MD5 of every file before it reads one."""
    root = expanded(data.root)
    try:
        return kind(root, download=data.download, **split)
    except (OSError, RuntimeError) as error:
        if data.download:
            raise UserError(
                f"data.root {data.root!r}: {data.dataset} cannot be fetched "
                f"({escaped(str(error))}): mend that, or extract {kind.filename} there yourself"
            ) from error
        first = os.path.join(root, kind.base_folder, kind.train_list[0][0])
        raise UserError(
            f"data.root {data.root!r} lacks {data.dataset}, or a checksum differs (looked for "
            f"{shown(first)} and so on): give the directory that holds {kind.base_folder}, "
            "or fetch it with --data.download true"
        ) from error
