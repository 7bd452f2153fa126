"""The door for Python, after a run: the commands that take a checkpoint as functions.

`moco.command.door` has `pretrain`, and says how settings are handed over; `moco.command.asked` has
the commands that take what these have written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from moco import slurm
from moco.command import judge, launch
from moco.command.door import Pretrained
from moco.command.words import words_of
from moco.config import UserError
from moco.judge_config import KNNConfig, LinearConfig

if TYPE_CHECKING:
    from torch import nn


def knn(
    checkpoint: str | os.PathLike[str] | Pretrained,
    images: Any = None,
    *,
    backbone: str | nn.Module = "",
    column: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Judge an encoder by its nearest neighbours, as `moco knn` does.

    Args:
        checkpoint: In any layout, or what `pretrain` has returned.
        images: A directory; or the training and the test images as a pair, each an array and its
            labels, or a data set of pairs (image, label) or of dictionaries with `label`. None:
            those of the checkpoint's run.
        backbone: timm name where the file leaves it open, or the module that was trained.
        column: Of the images where items are dictionaries.
        settings: Others of `moco knn`, such as k=[20] or **{"data.root": "PATH"}.

    Returns:
        What the command prints and writes; empty on ranks above 0.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.evaluation.judge import judge_knn

    return judge_knn(*_judged(checkpoint, images, backbone, column, settings, KNNConfig))


def linear(
    checkpoint: str | os.PathLike[str] | Pretrained,
    images: Any = None,
    *,
    backbone: str | nn.Module = "",
    column: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Judge an encoder by a classifier on top of it, as `moco linear` does.

    Arguments, result and errors as of `knn`; settings such as protocol="finetune", epochs=10.
    """
    from moco.evaluation.judge import judge_linear

    return judge_linear(*_judged(checkpoint, images, backbone, column, settings, LinearConfig))


def export(
    checkpoint: str | os.PathLike[str] | Pretrained,
    format: str,
    output: str | os.PathLike[str],
    *,
    backbone: str | nn.Module = "",
    **settings: Any,
) -> dict[str, Any]:
    """Write a backbone in another layout, as `moco export` does.

    Args:
        checkpoint: In any layout, or what `pretrain` has returned.
        format: timm, torchvision, safetensors, onnx, torch-export and so on; a module of your own
            takes the last three.
        output: File, or for timm a directory.
        backbone: As of `knn`.
        settings: Others of `moco export`, such as overwrite=True.

    Returns:
        What was written, and the largest difference that was found when it was read back.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.command.export import write

    name, module = _name_or_module(backbone)
    given = {"checkpoint": _place(checkpoint), "format": format, "output": os.fspath(output)}
    return write(words_of({**given, "backbone": name, **settings}), module)


def quality(
    checkpoint: str | os.PathLike[str] | Pretrained,
    images: Any = None,
    *,
    backbone: str | nn.Module = "",
    column: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Measure an encoder without labels, as `moco quality` does.

    Args:
        checkpoint: In any layout, or what `pretrain` has returned.
        images: As of `pretrain`. None: those of the checkpoint's run.
        backbone, column: As of `knn`.
        settings: Others of `moco quality`, such as count=500 and views=8.

    Returns:
        How many images and views, and of each network its measures by name.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.command import quality

    name, module = _name_or_module(backbone)
    where, own = _named(images)
    given = {"checkpoint": _place(checkpoint), "backbone": name, **where}
    return quality.main(words_of({**given, **settings}), own, module, column)


def embed(
    checkpoint: str | os.PathLike[str] | Pretrained,
    images: Any,
    output: str | os.PathLike[str],
    *,
    backbone: str | nn.Module = "",
    column: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Write the features of images to a Parquet file, as `moco embed` does.

    Args:
        checkpoint: In any layout, or what `pretrain` has returned.
        images: As of `pretrain`. None: those of the checkpoint's run.
        output: Directory of features.parquet; a call that was stopped goes on in it.
        backbone, column: As of `knn`.
        settings: Others of `moco embed`, such as index=True.

    Returns:
        What was written, its count and shape; empty on ranks above 0.

    Raises:
        UserError: Anything that the caller can mend.
    """
    from moco.command import embed

    name, module = _name_or_module(backbone)
    where, own = _named(images)
    given = {"checkpoint": _place(checkpoint), "backbone": name, **where}
    launch.end_with_launcher()
    slurm.join()
    words = words_of({**given, "output": os.fspath(output), **settings})
    return embed.main(words, own, module, column)


def _judged(
    checkpoint: Any, images: Any, backbone: Any, column: str, settings: dict[str, Any], kind: type
) -> tuple[Any, ...]:
    """Return the arguments of a command that judges."""
    name, module = _name_or_module(backbone)
    where, pair = _named(images)
    given = {"checkpoint": _place(checkpoint), "backbone": name, **where}
    launch.end_with_launcher()
    slurm.join()
    parts = judge.read_settings(words_of({**given, **settings}), kind, "")
    from moco.evaluation.own import Given

    return *parts, Given(pair, module, column)


def _place(checkpoint: Any) -> str:
    """Return the path of a checkpoint."""
    if isinstance(checkpoint, Pretrained):
        if checkpoint.checkpoint is None:
            raise UserError("this run has left no checkpoint: it was a plan, or rank 0 has it")
        return checkpoint.checkpoint
    return os.fspath(checkpoint)


def _name_or_module(backbone: Any) -> tuple[str, Any]:
    return (backbone, None) if isinstance(backbone, str) else ("", backbone)


def _named(images: Any) -> tuple[dict[str, Any], Any]:
    """Return the settings that name the images, and those that no setting holds."""
    if isinstance(images, str | os.PathLike):
        return {"data.dataset": "folder", "data.root": os.fspath(images)}, None
    return ({} if images is None else {"data.dataset": "own"}), images
