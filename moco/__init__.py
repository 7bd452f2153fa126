"""MoCo (Momentum Contrast): self-supervised training of image encoders.

Names are imported on first use, so that `import moco` and the command line start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "MoCo": "moco.pretrain",
    "KeyQueue": "moco.contrast",
    "info_nce": "moco.contrast",
    "TrainConfig": "moco.config",
    "UserError": "moco.config",
    "PretrainData": "moco.data",
    "LabelledData": "moco.labelled",
    "load_backbone": "moco.checkpoint",
    "extract_features": "moco.knn",
    "knn_predict": "moco.knn",
    "LinearProbe": "moco.probe",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moco' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
