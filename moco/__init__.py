"""MoCo (Momentum Contrast): self-supervised training of image encoders.

Names are imported on first use, so that `import moco` and the command line start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers read these, and Python the table below
    from moco.algorithm.contrast import KeyQueue as KeyQueue
    from moco.algorithm.contrast import info_nce as info_nce
    from moco.algorithm.pretrain import MoCo as MoCo
    from moco.checkpoints.load import load_backbone as load_backbone
    from moco.command.asked import report as report
    from moco.command.asked import search as search
    from moco.command.asked import select as select
    from moco.command.door import Pretrained as Pretrained
    from moco.command.door import pretrain as pretrain
    from moco.command.judged import embed as embed
    from moco.command.judged import export as export
    from moco.command.judged import knn as knn
    from moco.command.judged import linear as linear
    from moco.command.judged import quality as quality
    from moco.config import DataConfig as DataConfig
    from moco.config import ModelConfig as ModelConfig
    from moco.config import OptimConfig as OptimConfig
    from moco.config import RunError as RunError
    from moco.config import TrainConfig as TrainConfig
    from moco.config import UserError as UserError
    from moco.evaluation.features import extract_features as extract_features
    from moco.evaluation.knn import knn_predict as knn_predict
    from moco.evaluation.probe import LinearProbe as LinearProbe
    from moco.images.labelled import LabelledData as LabelledData
    from moco.images.loader import PretrainData as PretrainData
    from moco.images.own_views import BatchedView as BatchedView
    from moco.training.plain_trainer import callbacks as callbacks

_ROOMS = {
    "moco.command.door": "pretrain Pretrained",
    "moco.command.judged": "knn linear quality embed export",
    "moco.command.asked": "search select report",
    "moco.images.own_views": "BatchedView",
    "moco.algorithm.pretrain": "MoCo",
    "moco.algorithm.contrast": "KeyQueue info_nce",
    "moco.training.plain_trainer": "callbacks",
    "moco.config": "TrainConfig ModelConfig OptimConfig DataConfig UserError RunError",
    "moco.images.loader": "PretrainData",
    "moco.images.labelled": "LabelledData",
    "moco.checkpoints.load": "load_backbone",
    "moco.evaluation.features": "extract_features",
    "moco.evaluation.knn": "knn_predict",
    "moco.evaluation.probe": "LinearProbe",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = sorted(_HOME)
__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moco' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
