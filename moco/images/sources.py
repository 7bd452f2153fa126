"""Sources: where images come from. Data sets and folders become uint8 images with a name each.

Small sets (digits, CIFAR, STL-10) are held as arrays; folders are lists of files, decoded when
read, one file at a time or all at once. What cannot be decoded raises `BadImage`, and `check_files`
decides whether a run may go on without it. Nothing is unpickled but CIFAR's own files, after their
checksums.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images.decode import BadImage, decode, image_size, one_line, shown, to_uint8
from moco.images.folders import EXTENSIONS, check_root, expanded, is_dir, visible, walk

FILES_PER_TASK = 256
LOGGER = logging.getLogger("moco")


class MixedSizes(ValueError):
    """Images of two sizes, which no tensor holds; has `first` and `other`, (H, W), and `path`."""

    def __init__(self, first: tuple[int, int], other: tuple[int, int], path: str) -> None:
        super().__init__(first, other, path)
        self.first, self.other, self.path = first, other, path

    def __str__(self) -> str:
        return f"{shown(self.path)} has {self.other} pixels (H W) where others have {self.first}"


@dataclass
class ImageSource:
    """Images under a name.

    Attributes:
        name: For people, e.g. "cifar10 train".
        images: N C H W uint8 where the set is small arrays, else None.
        paths: One per image where images are files, else empty.
        labels: N int64, or None when unlabelled.
        classes: Class names in the order of the labels; empty when unlabelled.
        channels: C of every image.
        max_value: Value in 16-bit files that becomes 255.
    """

    name: str
    images: Tensor | None
    paths: list[str]
    labels: Tensor | None
    classes: list[str]
    channels: int
    max_value: int

    def __len__(self) -> int:
        return len(self.paths) if self.images is None else len(self.images)

    def read(self, index: int) -> Tensor:
        """Return one image, C H W uint8, in its own size; raise BadImage as `decode` does."""
        if self.images is not None:
            return self.images[index]
        return decode(self.paths[index], self.channels, self.max_value)


def open_source(data: DataConfig, split: Literal["train", "test"]) -> ImageSource | None:
    """Open one split; None when `test` is asked of a set that has no held-out split.

    The train split of stl10 is its unlabelled one. Uses the network only with `data.download`.

    Raises:
        UserError: The set is missing, empty, corrupt or laid out otherwise, or has other channels.
    """
    if data.dataset == "digits":
        return _open_digits(data, split)
    if data.dataset.startswith("cifar"):
        return _open_cifar(data, split)
    if data.dataset == "stl10":
        return _open_stl10(data, "unlabeled" if split == "train" else "test")
    train, test = _split_folders(data)
    if split == "train":
        return _open_folder(data, train)
    return test and _open_folder(data, test, _open_folder(data, train).classes)


def open_labelled(
    data: DataConfig, train: ImageSource | None = None
) -> tuple[ImageSource, ImageSource] | None:
    """Open the bank and the queries of an evaluation; None unless both exist and have labels.

    Args:
        data: As for `open_source`.
        train: The train split if it is open already, so that a large folder is not listed again.
            It becomes the bank, except with stl10, whose bank is its labelled train split.

    Raises:
        UserError: As `open_source`, or the queries have classes that the bank lacks.
    """
    if data.dataset == "stl10":
        return _open_stl10(data, "train"), _open_stl10(data, "test")
    bank = train or open_source(data, "train")
    if bank is None or bank.labels is None:
        return None
    if data.dataset in ("folder", "imagenet"):
        folder = _split_folders(data)[1]
        queries = _open_folder(data, folder, bank.classes) if folder else None
    else:
        queries = open_source(data, "test")
    return None if queries is None or queries.labels is None else (bank, queries)


def load_all(
    source: ImageSource, report: Callable[[int, int], None] | None = None
) -> tuple[Tensor | None, list[tuple[int, str]]]:
    """Decode every image into one tensor, on all cores.

    Args:
        source: Its images must share one size.
        report: Called with (done, total) now and then, from this thread.

    Returns:
        N C H W uint8, and (index, reason) of each bad image in rising order: their rows are noise,
        for the caller to drop. The tensor is None when not one image is good.

    Raises:
        MixedSizes: Two images differ in size.
    """
    if source.images is not None:
        return source.images, []
    total, bad = len(source), []
    for index in range(total):  # the first good image tells the size
        try:
            shape = source.read(index).shape
            break
        except BadImage as error:
            bad.append((index, error.reason))
    else:
        return None, bad
    images, bad = torch.empty(total, *shape, dtype=torch.uint8), []
    # Pillow decodes outside the GIL; small files are half Python, and more threads only contend.
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        starts = range(0, total, FILES_PER_TASK)
        for start, more in zip(
            starts, pool.map(partial(_load, source, images), starts), strict=True
        ):
            bad += more
            if report:
                report(min(start + FILES_PER_TASK, total), total)
    return images, bad


def _load(source: ImageSource, images: Tensor, start: int) -> list[tuple[int, str]]:
    """Decode the files from `start` on into their rows; return the bad ones."""
    rows, bad = images.numpy(), []
    for index in range(start, min(start + FILES_PER_TASK, len(source))):
        try:
            image = source.read(index).numpy()
        except BadImage as error:
            bad.append((index, error.reason))
            continue
        if image.shape != rows.shape[1:]:
            raise MixedSizes(rows.shape[2:], image.shape[1:], source.paths[index])
        rows[index] = image
    return bad


def estimate_bytes(source: ImageSource, samples: int = 64) -> tuple[int, tuple[int, int] | None]:
    """Estimate the bytes of all images decoded, from the headers of some.

    Returns:
        The bytes, exact for arrays; and (H, W) if the images looked at agree, else None.
    """
    if source.images is not None:
        return source.images.nbytes, tuple(source.images.shape[2:])
    sizes = []
    count = min(samples, len(source))
    for index in range(count):
        with contextlib.suppress(BadImage):
            path = source.paths[index * len(source) // count]
            sizes.append(image_size(path, source.channels))
    if not sizes:
        return 0, None
    area = sum(height * width for height, width in sizes) / len(sizes)
    common = sizes[0] if len(set(sizes)) == 1 else None
    return round(area * source.channels * len(source)), common


def identify(source: ImageSource, root: str) -> dict[str, int]:
    """Return what tells one set of images from another: their count, and a checksum.

    Of files, the names below `root` in their order; of arrays, about a thousand images.
    """
    if source.images is None:
        start = len(expanded(root))
        text = "\n".join(path[start:] for path in source.paths)
        return {"count": len(source), "crc32": crc32(os.fsencode(text))}
    some = source.images[:: max(1, len(source) // 1000)]
    return {"count": len(source), "crc32": crc32(some.contiguous().numpy())}


def check_files(
    source: ImageSource,
    bad: list[tuple[int, str]],
    max_bad_fraction: float,
    report_path: str | None,
) -> ImageSource:
    """Drop the bad images, or refuse to go on when they are too many.

    Args:
        source: Files.
        bad: (index, reason) of each bad image, as `load_all` returns them.
        max_bad_fraction: Share of the images that may be bad.
        report_path: Where the bad ones are listed: path, tab, reason per line; None for nowhere.

    Raises:
        UserError: More are bad, or no image is left.
    """
    if not bad:
        return source
    if report_path:
        with contextlib.suppress(OSError):  # a full disk must not hide what is said below
            os.makedirs(os.path.dirname(report_path), exist_ok=True)
            with open(report_path, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(f"{one_line(source.paths[i])}\t{reason}\n" for i, reason in bad)
    index, reason = bad[0]
    share = len(bad) / len(source)
    if share > max_bad_fraction or share == 1:
        listed = f" (all are listed in {shown(report_path)})" if report_path else ""
        raise UserError(
            f"{len(bad)} of {len(source)} images of {source.name} ({100 * share:.3g} %) cannot be "
            f"used, first {shown(source.paths[index])}: {reason}{listed}: mend or remove them, "
            f"or raise data.max_bad_fraction (now {max_bad_fraction:g})"
        )
    dropped = {index for index, _ in bad}
    kept = [index for index in range(len(source)) if index not in dropped]
    labels = None if source.labels is None else source.labels[torch.tensor(kept)]
    return replace(source, paths=[source.paths[index] for index in kept], labels=labels)


def _open_digits(data: DataConfig, split: str) -> ImageSource:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if data.channels not in (1, 3):
        raise UserError(f"data.channels is {data.channels}: digits are grey, set it to 1 or 3")
    digits = load_digits()
    rows = train_test_split(
        np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0
    )[split == "test"]
    images = torch.from_numpy(to_uint8(digits.images[rows], 16))[:, None]  # N 1 8 8
    return _array_source(
        data, split, images.repeat(1, data.channels, 1, 1), digits.target[rows], "0123456789"
    )


def _open_cifar(data: DataConfig, split: str) -> ImageSource:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.dataset]
    found = _open_torchvision(kind, data, train=split == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    return _array_source(data, split, images.contiguous(), found.targets, found.classes)


def _open_stl10(data: DataConfig, split: str) -> ImageSource:
    from torchvision import datasets

    found = _open_torchvision(datasets.STL10, data, split=split)
    images = torch.from_numpy(found.data).contiguous()
    if split == "unlabeled":
        return _array_source(data, split, images, None, [])
    classes = getattr(found, "classes", range(1, 11))  # the file of names may be missing
    return _array_source(data, split, images, found.labels, map(str, classes))


def _array_source(
    data: DataConfig, split: str, images: Tensor, labels: Any, classes: Iterable[str]
) -> ImageSource:
    labels = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64))
    name = f"{data.dataset} {split}"
    return ImageSource(name, images, [], labels, list(classes), data.channels, data.max_value)


def _open_torchvision(kind: Any, data: DataConfig, **split: Any) -> Any:
    """Open a set of torchvision, which checks the MD5 of every file before it reads one."""
    if data.channels != 3:
        raise UserError(f"data.channels is {data.channels}: {data.dataset} is RGB, set it to 3")
    root = expanded(data.root)
    try:
        return kind(root, download=data.download, **split)
    except (OSError, RuntimeError) as error:
        if data.download:
            raise UserError(
                f"data.root {data.root!r}: {data.dataset} cannot be fetched "
                f"({one_line(str(error))}): mend that, or extract {kind.filename} there yourself"
            ) from error
        first = os.path.join(root, kind.base_folder, kind.train_list[0][0])
        raise UserError(
            f"data.root {data.root!r} lacks {data.dataset}, or a checksum differs (looked for "
            f"{shown(first)} and so on): give the directory that holds {kind.base_folder}, "
            "or fetch it with --data.download true"
        ) from error


def _split_folders(data: DataConfig) -> tuple[str, str | None]:
    """Return the directories of the train and the held-out split, by their names below the root."""
    root = check_root(data.root)
    names = [entry.name for entry in os.scandir(root) if visible(entry.name) and is_dir(entry)]
    by_name = {name.lower(): os.path.join(root, name) for name in sorted(names)}
    train = by_name.get("train")
    if data.dataset == "imagenet":
        if train is None or "val" not in by_name:
            raise UserError(
                f"data.root {data.root!r} lacks train/ or val/: lay imagenet out as "
                "train/CLASS/*.JPEG and val/CLASS/*.JPEG; for another tree set data.dataset folder"
            )
        return train, by_name["val"]
    test = by_name.get("test") or by_name.get("val") or by_name.get("validation")
    # Beside other folders `train` may be a class (railways), unless one is a held-out split.
    if train and (test or len(names) == 1):
        return train, test
    return root, None


def _open_folder(data: DataConfig, top: str, classes: list[str] | None = None) -> ImageSource:
    """List a directory; the first-level subfolders are its labels, by `classes` where given."""
    paths = _list_images(data, top)
    start = len(os.path.join(top, ""))
    parts = [path[start:].split(os.sep, 1) for path in paths]
    names = {part[0] for part in parts}
    labelled = all(len(part) == 2 for part in parts)
    if data.dataset == "imagenet" and not labelled:
        raise UserError(
            f"data.root {data.root!r}: images lie directly in {shown(top)}, imagenet has them in "
            "one subfolder per class; for another tree set data.dataset folder"
        )
    source = ImageSource(
        f"folder {shown(top)}", None, paths, None, [], data.channels, data.max_value
    )
    if not labelled or classes == [] or (len(names) < 2 and not names <= set(classes or [])):
        return source
    classes = sorted(names) if classes is None else classes
    unknown = sorted(names - set(classes))
    if unknown:
        raise UserError(
            f"data.root {data.root!r}: {len(unknown)} class folders of {shown(top)} are not in the "
            f"train split ({', '.join(map(shown, unknown[:5]))}): give both the same class names"
        )
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[part[0]] for part in parts])
    return replace(source, labels=labels, classes=classes)


def _list_images(data: DataConfig, top: str) -> list[str]:
    paths, unread = walk(top)
    if unread:
        LOGGER.warning(
            "%d folders cannot be read and are skipped, first %s", len(unread), unread[0]
        )
    if not paths:
        where = f"{data.root!r}" if top == expanded(data.root) else f"{data.root!r}: {shown(top)}"
        skipped = f"; {len(unread)} of them cannot be read" if unread else ""
        raise UserError(
            f"data.root {where} holds no images (looked for {' '.join(EXTENSIONS)} in all "
            f"subfolders{skipped}): give the folder that holds them"
        )
    return paths
