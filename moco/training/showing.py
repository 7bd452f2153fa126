"""What loggers get besides metrics, as a Lightning callback: the settings and two pictures.

TensorBoard, Weights & Biases and MLflow show the view pairs of some images when a run begins, and
nearest neighbours when it ends. Rank 0 draws them; what fails there is one line, and no more.
Shapes: T side of a tile, k neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from moco.config import TrainConfig
from moco.evaluation.features import evaluating
from moco.images.loader import PretrainData
from moco.log import reason_of
from moco.random import permutation
from moco.reports import sights
from moco.reports.pairs import make_pairs, name_of
from moco.reports.pictures import sheet
from moco.training.metrics import MetricsLogger

log = logging.getLogger("moco")
_ROWS, _NEIGHBOURS = 8, 8  # of a picture
_IMAGES = 512  # among which neighbours are looked for


class Showing(pl.Callback):
    """Hand the settings and the pictures to the loggers that take them.

    Args:
        config: Settings of the run, with what auto came to.
        data: Its images.
        metrics: Leaves the time of drawing out of its rates.
        start_step: Of a resumed run, else 0.
    """

    def __init__(
        self, config: TrainConfig, data: PretrainData, metrics: MetricsLogger, start_step: int
    ) -> None:
        self.config, self.data, self.metrics = config, data, metrics
        self.is_new = start_step == 0

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Hand over the settings, before Lightning saves what its loggers were told of them."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if self.is_new or not isinstance(logger, MLFlowLogger):  # whose settings never change
                self._try("the settings", lambda to=logger: to.log_hyperparams(self.config.flat()))

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Hand over view pairs where the run begins."""
        if trainer.is_global_zero and self.is_new and self.config.data.views != "own":
            self._show(trainer, "views", self._views)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Hand over nearest neighbours, after the last step."""
        if trainer.is_global_zero and trainer.global_step >= module.total_steps:
            backbone = module.query_encoder.backbone
            self._show(trainer, "neighbours", lambda: self._neighbours(backbone))

    def _show(self, trainer: pl.Trainer, name: str, draw: Callable[[], Image.Image]) -> None:
        """Draw a picture if a logger takes it, and hand it over."""
        takers = [one for one in trainer.loggers if isinstance(one, _TAKERS)]
        start = time.perf_counter()
        picture = self._try(f"a picture of {name}", draw) if takers else None
        for logger in takers if picture else ():

            def give(to: Logger = logger) -> None:
                hand_over(to, name, picture, trainer.global_step)

            self._try(f"a picture of {name}", give)
        self.metrics.paused += time.perf_counter() - start

    def _try(self, what: str, do: Callable[[], Any]) -> Any:
        """Return what a function returns; a logger that fails must not end a run."""
        try:
            return do()
        except Exception as error:
            reason = reason_of(error)
            log.warning("the loggers lack %s: %s", what, reason)
            return None

    def _views(self) -> Image.Image:
        """Draw images with their view pairs in the first epochs."""
        source, seed, epochs = self.data.source, self.config.run.seed, (0, 1)
        rows = permutation(seed, "preview", 0, len(source))[:_ROWS].tolist()
        pairs = make_pairs(source, self.data.config, seed, epochs, rows, self.data.partners)
        heads = ["image", *(f"epoch {epoch + 1}, view {view}" for epoch in epochs for view in "12")]
        return sheet([(pair.name, [pair.image, *pair.views]) for pair in pairs], heads)

    def _neighbours(self, backbone: Any) -> Image.Image:
        """Draw random images, each with those of a sample that the backbone finds most alike."""
        source, config = self.data.source, self.data.config
        with evaluating(backbone):
            sample = sights.look(backbone, source, config, _IMAGES, self.config.run.seed)
        rows = []
        for query in range(min(_ROWS, len(sample.rows))):
            near = [query, *sample.neighbours[query, :_NEIGHBOURS].tolist()]
            cosines = sample.similarity[query, :_NEIGHBOURS].tolist()
            name = name_of(source, int(sample.rows[query]))
            said = " ".join(f"{cosine:.2f}" for cosine in cosines)
            rows.append((f"{name}: {said}", [sample.tiles[place] for place in near]))
        count = len(rows[0][1])
        return sheet(rows, ["image", *(f"nearest {n}" for n in range(1, count))])


_TAKERS = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def hand_over(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Hand a picture to a logger of a kind that takes it."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, picture, f"{name}.png")
