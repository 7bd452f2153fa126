"""Packing: a folder of images becomes shards, tars in WebDataset's layout, whole or not at all.

Images stand in an order drawn once, so that a shard holds all classes: a run shuffles only within
windows. A held-out split gets shards of its own. This room needs no torch.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from moco.config import DataConfig, RunError, UserError
from moco.images.dicom import split_frame
from moco.images.folders import expanded, list_images
from moco.images.formats import extension, shown
from moco.images.labels import HELD_OUT, by_folder
from moco.images.patterns import first_word
from moco.images.splits import split_folders
from moco.images.tables import read_table
from moco.log import track
from moco.whole_files import is_of_the_disk

log = logging.getLogger("moco")
_BLOCK = 512  # bytes of a header; members begin at multiples
_MOST_SHARDS = 100_000  # that a name of five digits counts


def pack(folder: str, output: str, shard_mib: float, labels: str = "") -> dict[str, Any]:
    """Write the images of a folder as shards, copies of the files with their labels.

    Args:
        folder: As `data.root` of `data.dataset folder`.
        output: Directory that is made.
        shard_mib: Size of a shard; one of larger images has one image.
        labels: As `data.labels`.

    Returns:
        What was written: `root` is the `data.root` that reads it.

    Raises:
        UserError: There are no images, one cannot be read, or the output cannot be written.
        RunError: The disk is full or broken.
    """
    data = DataConfig(dataset="folder", root=folder, labels=labels)
    target = Path(expanded(output))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output} is there already: name a directory that does not exist")
    train, held_out = split_folders(data, say=True)
    splits = {"train": train}
    if held_out:
        name = os.path.basename(held_out).lower()
        splits[name if first_word(name) in HELD_OUT else "test"] = held_out
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}") from None
    try:
        counts = {
            name: _pack_split(data, name, top, part, shard_mib * 2**20)
            for name, top in splits.items()
        }
        part.chmod(0o755)  # a temporary directory is its owner's alone
        target.rmdir() if target.exists() else None
        part.rename(target)
    except OSError as error:
        kind = RunError if is_of_the_disk(error) else UserError
        raise kind(
            f"{shown(str(error.filename or output))}: {error.strerror or error}: mend that; "
            f"nothing was written to {output}"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shards = sorted(path.name for path in target.iterdir())
    log.info("%s: %s", target, ", ".join(f"{n} images of {name}" for name, n in counts.items()))
    return {"root": str(target), "shards": len(shards), "images": counts}


def _pack_split(data: DataConfig, split: str, top: str, part: Path, size: float) -> int:
    """Write the shards of one split; return the number of its images."""
    paths = list_images(data, top)
    table = read_table(data.labels) if data.labels else None
    if table:
        if split == "train":
            table.say_unused(paths)
        paths = table.part(paths, held_out=split != "train")
    names = table.labels(paths) if table else by_folder(paths, top)
    if not table and len({*names} - {None}) < 2:
        names = [None] * len(paths)  # one folder is no class
    images = list(dict(zip((split_frame(path)[0] for path in paths), names, strict=True)).items())
    if len(images) < len(paths):
        first = next(path for path in paths if split_frame(path)[0] != path)
        raise UserError(
            f"{shown(split_frame(first)[0])} has several frames, and a shard has one image a "
            "file: write the frames as files of their own"
        )
    images = [images[row] for row in np.random.default_rng(0).permutation(len(images))]
    parts: list[list[tuple[str, str | None]]] = []
    held = size
    for image in images:
        if held >= size:
            parts.append([])
            held = 0.0
        parts[-1].append(image)
        held += 2 * _BLOCK + os.path.getsize(image[0])  # with its headers
    if len(parts) > _MOST_SHARDS:
        raise UserError(f"there would be {len(parts)} shards of {split}: raise --shard_mib")
    row = 0
    for number, some in enumerate(track(parts, f"{split} shards", len(parts))):
        with tarfile.open(part / f"{split}-{number:05d}.tar", "w") as tar:
            for path, label in some:
                _add(tar, f"{row:09d}{extension(path)}", Path(path).read_bytes())
                if label is not None:
                    _add(tar, f"{row:09d}.cls", label.encode("utf-8", "surrogateescape"))
                row += 1
    return row


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member that bears no date and no owner, so that equal folders make equal shards."""
    item = tarfile.TarInfo(name)
    item.size = len(content)
    tar.addfile(item, io.BytesIO(content))
