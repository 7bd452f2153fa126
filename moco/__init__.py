"""MoCo (Momentum Contrast): self-supervised training of image encoders.

Names are imported on first use, so that `import moco` and the command line start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "pretrain": "moco.command.door",
    "Pretrained": "moco.command.door",
    "knn": "moco.command.judged",
    "linear": "moco.command.judged",
    "export": "moco.command.judged",
    "BatchedView": "moco.images.own_views",
    "MoCo": "moco.algorithm.pretrain",
    "KeyQueue": "moco.algorithm.contrast",
    "info_nce": "moco.algorithm.contrast",
    "callbacks": "moco.training.plain_trainer",
    "TrainConfig": "moco.config",
    "ModelConfig": "moco.config",
    "OptimConfig": "moco.config",
    "DataConfig": "moco.config",
    "UserError": "moco.config",
    "RunError": "moco.config",
    "PretrainData": "moco.images.loader",
    "LabelledData": "moco.images.labelled",
    "load_backbone": "moco.checkpoints.load",
    "extract_features": "moco.evaluation.features",
    "knn_predict": "moco.evaluation.knn",
    "LinearProbe": "moco.evaluation.probe",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moco' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
