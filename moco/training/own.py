"""Own parts: what a run is given in Python in the place of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytorch_lightning.loggers import Logger
from torch import nn

from moco.images.image_source import ImageSource
from moco.images.own_views import OwnViews
from moco.images.pairs import Naming


@dataclass(frozen=True)
class Own:
    """What the user brings; None and nothing: as the settings say.

    Attributes:
        source: The images, where data.dataset is own.
        backbone: From images to features, where model.backbone is own:NAME; it is copied.
        views: Callables, where data.views is own.
        naming: Says what an image shows, where data.pairs is own.
        loggers: Get the metrics besides metrics.csv.
    """

    source: ImageSource | None = None
    backbone: nn.Module | None = None
    views: OwnViews | None = None
    naming: Naming | None = None
    loggers: Sequence[Logger] = ()


NOTHING = Own()
