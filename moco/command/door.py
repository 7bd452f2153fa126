"""The door for Python: the commands as functions, whose settings are keyword arguments.

A function's settings become the words of its command line, so that both are parsed, checked and
refused alike. What no command line can hold (images, modules, callables) is handed over beside it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moco import slurm
from moco.command import launch, train
from moco.command.words import words_of
from moco.config import ModelConfig, UserError

if TYPE_CHECKING:
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers import Logger
    from torch import nn

    from moco.images.own_views import BatchedView


@dataclass(frozen=True, repr=False)
class Pretrained:
    """What a run has left; it shows itself in a line, without the network.

    Attributes:
        encoder: The backbone in eval mode, from normalised images N x C x S x S to features N x D;
            its `transform` takes a PIL image, or a tensor C x H x W, to such an image. None after
            run.plan.
        metrics: The results, as `moco train` prints them in JSON.
        checkpoint: Path of the last checkpoint; None after run.plan.
        report: Path of the run's page, or None.
    """

    encoder: nn.Module | None
    metrics: dict[str, Any]
    checkpoint: str | None
    report: str | None

    def __repr__(self) -> str:
        names = ("run_dir", "steps", "loss", "knn_top1")
        told = {name: self.metrics[name] for name in names if self.metrics.get(name) is not None}
        return f"Pretrained({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def pretrain(
    images: Any = None,
    recipe: str | None = None,
    *,
    backbone: str | nn.Module | None = None,
    views: str | Callable[..., Any] | BatchedView | Sequence[Any] | None = None,
    pairs: str | Callable[[Any], Any] | None = None,
    loggers: Sequence[Logger] | Logger = (),
    callbacks: Sequence[Callback] | Callback = (),
    dir: str | os.PathLike[str] = "",
    resume: str | os.PathLike[str] | Pretrained = "",
    column: str = "",
    **settings: Any,
) -> Pretrained:
    """Pretrain an encoder without labels, as `moco train` does.

    Args:
        images: A directory; a list of paths; an array or tensor N x C x H x W, N x H x W x C
            or N x H x W; or anything with a length that is indexed by number, as a list, a torch
            Dataset or a Hugging Face one, of PIL images, arrays or tensors, of pairs (image,
            label), or of dictionaries. None: as `data.dataset` and `data.root` say.
        recipe: Name of a recipe (`moco recipes`) or path of one; folder unless a run is resumed.
        backbone: timm name, or a module from N x C x S x S to N x D or to maps N x D x H x W, which
            is copied.
        views: Name of a recipe's views; one callable or two of single images, uint8 C x H x W; or
            `BatchedView`s.
        pairs: As the setting data.pairs; or a function that says what an image shows, given its
            path, or its index where images are not files.
        loggers: Of Lightning; they get the metrics besides metrics.csv.
        callbacks: Of Lightning, called after the run's own.
        dir: Of the run; empty: runs/RECIPE-DATE-TIME-MICROSECONDS.
        resume: A run directory or checkpoint that goes on exactly, what this function has
            returned, or "auto". The images, and a module or callables of your own, must be given
            again.
        column: Of the images where items are dictionaries; needed where several hold images.
        settings: Any other of `moco train`, by its dotted name: **{"optim.lr": 0.06}; and
            init_from, allow_partial, extend and yes.

    Raises:
        UserError: Anything that the caller can mend, before the first step wherever possible.
        RunError: What ends a run although its input is right.
        KeyboardInterrupt: After Ctrl-C; the run has saved and can be resumed.
    """
    if isinstance(resume, Pretrained):
        if resume.checkpoint is None:
            raise UserError("resume is a run that has left no checkpoint: it was a plan")
        resume = resume.checkpoint
    recipe = recipe or ("" if resume and resume != "auto" else "folder")
    own: dict[str, Any] = {"backbone": backbone, "views": views, "pairs": pairs}
    _check_once({"images": images, **own, "dir": dir or None}, settings)
    given = _own_settings(images, own, new=bool(recipe))
    given |= {"run.dir": os.fspath(dir)} if dir else {}
    given |= {"resume": os.fspath(resume)} if resume else {}
    usual = {"data.channels": "auto"} if given.get("data.dataset") == "own" and recipe else {}
    alone = {} if _can_start_ranks() else {"trainer.devices": 1}
    given |= {**alone, **settings}
    given |= {"yes": True} if given.pop("yes", False) else {}
    words = [*(["--config", recipe] if recipe else []), *words_of(given)]
    launch.end_with_launcher()
    slurm.join()
    has_module = backbone is not None and not isinstance(backbone, str)
    arguments = train.settle(words, has_module, words_of(usual))
    return _run(arguments, images, own, loggers, callbacks, column)


def _several(name: str, given: Any, kind: type) -> list[Any]:
    """Return one or several parts of Lightning's as a list.

    Raises:
        UserError: One of them is of another kind, as a class in the place of its instance.
    """
    several = list(given) if isinstance(given, Iterable) else [given]
    several = [] if given is None else several
    for part in several:
        if not isinstance(part, kind):
            what = f"the class {part.__name__}" if isinstance(part, type) else repr(part)[:80]
            raise UserError(f"{name} holds {what}: give instances of Lightning's {kind.__name__}")
    return several


def _check_once(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UserError where an argument and a setting say the same thing."""
    same = {"images": "data.root", "backbone": "model.backbone", "views": "data.views"}
    for name, setting in (same | {"pairs": "data.pairs", "dir": "run.dir"}).items():
        if given[name] is not None and setting in settings:
            raise UserError(f"{name} and {setting} say the same thing: give one of them")


def _own_settings(images: Any, own: Mapping[str, Any], new: bool) -> dict[str, Any]:
    """Return the settings that say what is a path or a name, and what comes from Python."""
    found: dict[str, Any] = {}
    if isinstance(images, str | os.PathLike):
        found |= {"data.root": os.fspath(images)}
    elif images is not None:
        found |= {"data.dataset": "own"}
    backbone, views, pairs = own["backbone"], own["views"], own["pairs"]
    if isinstance(backbone, str):
        found |= {"model.backbone": backbone}
    elif backbone is not None:
        from moco.algorithm.names import OF_KNOWN, OWN

        # A recipe's settings of its own network are none of this one's.
        usual = {f"model.{name}": getattr(ModelConfig(), name) for name in OF_KNOWN}
        found |= usual if new else {}
        found |= {"model.backbone": f"{OWN}:{type(backbone).__name__}"}
    if views is not None:
        found |= {"data.views": views if isinstance(views, str) else "own"}
    if isinstance(pairs, Mapping):
        raise UserError("pairs is a mapping: give pairs=mapping.get, which names what a path shows")
    if pairs is not None:
        found |= {"data.pairs": pairs if isinstance(pairs, str) else "own"}
    return found


def _can_start_ranks() -> bool:
    """Tell whether several ranks are there, or can each run this script again."""
    script = not hasattr(sys, "ps1") and getattr(sys.modules["__main__"], "__file__", "")
    return "RANK" in os.environ or bool(script)


def _run(
    arguments: dict[str, Any],
    images: Any,
    own: Mapping[str, Any],
    loggers: Any,
    callbacks: Any,
    column: str,
) -> Pretrained:
    """Open what comes from Python, train, and open what the run has left."""
    import torch
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers import Logger

    from moco.checkpoints.load import load_backbone
    from moco.images.own import open_own
    from moco.images.own_views import open_views
    from moco.training.own import Own
    from moco.training.run import pretrain

    config = arguments["config"]
    backbone, views, pairs = own["backbone"], own["views"], own["pairs"]
    is_own = config.data.dataset == "own" and images is not None
    part = Own(
        open_own(images, config.data, column) if is_own else None,
        None if isinstance(backbone, str) else backbone,
        None if views is None or isinstance(views, str) else open_views(views),
        None if isinstance(pairs, str) else pairs,
        _several("loggers", loggers, Logger),
    )
    listed = _several("callbacks", callbacks, Callback)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        metrics = pretrain(**arguments, callbacks=listed, own=part)
    if number := metrics.get("stopped_by"):
        if number == signal.SIGINT:
            where = metrics.get("run_dir")  # which rank 0 alone is told
            raise KeyboardInterrupt(*([f"go on with resume={where!r}"] if where else []))
        sys.exit(128 + number)
    checkpoint = metrics.get("checkpoint")
    encoder = None
    if checkpoint:
        encoder = load_backbone(checkpoint, backbone="" if part.backbone is None else part.backbone)
    return Pretrained(encoder, metrics, checkpoint, metrics.get("report"))
