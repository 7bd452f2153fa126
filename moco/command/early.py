"""What is wrong with a command that can be seen before torch is imported, which takes seconds.

What is asked here is asked again where it is used: a run may also start from Python. Ranks leave it
to the process that started them, so that no rank ends alone.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from moco.config import DataConfig, TrainConfig, UserError
from moco.run_directory import new_run


def check_start(
    config: TrainConfig, recipe: str, init_from: str, is_new: bool, has_module: bool = False
) -> None:
    """Raise UserError for what a run cannot start with: names, files and directories.

    Args:
        config: Settings, passed by `moco.checks.check`.
        recipe: Name for a new run's directory.
        init_from: A checkpoint, or empty.
        is_new: Whether a new run is to begin.
        has_module: Whether Python gives the backbone.
    """
    if "RANK" in os.environ:
        return
    if is_new:
        if config.model.backbone != "auto" and not has_module:
            check_name(config.model.backbone, "model.backbone")
        new_run(config, recipe)
        if config.trainer.precision != "auto":
            from moco.training.hardware import choose_precision

            choose_precision(config)
    if init_from:
        from moco.checkpoints.places import check_place

        check_place(init_from)
    check_images(config.data)
    if config.run.knn_every and config.run.knn_root:
        own = {"dataset": "folder", "root": config.run.knn_root, "files": "", "labels": ""}
        try:
            check_images(replace(config.data, **own))
        except UserError as error:
            raise UserError(str(error).replace("data.root", "run.knn_root")) from None


def check_images(data: DataConfig) -> None:
    """Raise UserError where the images' directory, list or table is not there, or holds nothing.

    Shards in a store are asked for later, by the processes that read them.
    """
    if data.dataset == "own":  # Python's, which `moco.images.sources` asks for
        return
    if data.dataset in ("shards", "parquet"):
        if "://" not in data.root:
            from moco.images.patterns import find_shards

            find_shards(data)
        return
    if data.dataset not in ("folder", "imagenet"):
        if not (data.dataset == "digits" or data.download or os.path.exists(data.root)):
            raise UserError(
                f"data.root {data.root!r} does not exist: give the directory that holds "
                f"{data.dataset}, or fetch it with --data.download true"
            )
        return
    from moco.images.folders import expanded, has_image, list_images
    from moco.images.labels import read_list
    from moco.images.splits import split_folders
    from moco.images.tables import read_table

    top, _ = split_folders(data)
    if data.labels:
        read_table(data.labels)
    if data.files:
        read_list(data.files, expanded(data.root))
    elif not has_image(top):
        list_images(data, top)


def check_name(backbone: str, setting: str) -> None:
    """Raise UserError for a backbone that does not exist; an empty one stands for a file's own."""
    from moco.algorithm.names import check_backbone

    if backbone:
        check_backbone(backbone, setting)


def check_package(name: str, purpose: str) -> None:
    """Raise UserError where an extra package is not installed."""
    if find_spec(name) is None:
        raise UserError(f"{purpose} needs {name}: pip install {name}")


def check_new_folder(folder: str) -> None:
    """Raise UserError when a directory cannot be made there, or takes no file."""
    path = Path(folder).absolute()
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
    except (OSError, ValueError) as error:
        raise UserError(f"--output {folder[:80]!r} is no possible directory: {error}") from None
    check_output(there)


def check_output(folder: Path, named: str = "--output DIR") -> None:
    """Raise UserError when no file can be made in a directory; `named` is what to name instead."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UserError(
            f"{folder} is no directory to write in ({error.strerror}): give another {named}"
        ) from None


def check_file(option: str, file: str | Path, *endings: str) -> None:
    """Raise UserError when no file of this name can be made.

    What a command writes has an ending, so that no file of another kind that was named by mistake
    is replaced by it.

    Args:
        option: That names the file.
        endings: With which it may end.
    """
    path = Path(file)
    if path.is_dir():
        hint = path / f"NAME{endings[0]}"
        raise UserError(f"{option} {file} is a directory: name a file, such as {hint}")
    if path.suffix.lower() not in endings:
        raise UserError(f"{option} {file}: give a name that ends in {' or '.join(endings)}")
    target = Path(os.path.realpath(path))  # where a link leads to
    if target.suffix.lower() not in endings:
        raise UserError(f"{option} {file} leads to {target}: give another name")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {file} is no regular file: choose another")
    check_output(target.parent, f"{option} FILE")
