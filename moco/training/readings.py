"""Readings: the images that kNN and quality without labels are read on."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from moco.config import DataConfig, TrainConfig, UserError
from moco.images import sources
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData, open_data
from moco.images.loader import PretrainData

log = logging.getLogger("moco")


def open_labelled(
    config: TrainConfig, data: PretrainData
) -> tuple[LabelledData, LabelledData] | None:
    """Open the bank and the queries of kNN, sharing the training images; None without labels.

    Raises:
        UserError: The rate is to follow kNN, and there are no labels.
    """
    if config.run.knn_every == 0:
        return None
    if config.run.knn_root:
        pair = _open_own_labelled(data.config, config.run.knn_root)
    else:
        pair = _shared(sources.open_labelled(data.config, data.source))
    if pair is None:
        if (config.optim.schedule, config.optim.plateau_metric) == ("plateau", "val/knn_top1"):
            raise UserError(
                "optim.plateau_metric is val/knn_top1 but the images have no labelled train and "
                "test splits, so kNN is never read: set it to train/loss, or run.knn_root to "
                "a folder that has them"
            )
        log.info(
            "no labelled train and test splits: kNN is not read; run.knn_root may name a folder "
            "that has them"
        )
        return None
    bank, queries = (
        LabelledData(source, data.config, data.bad)
        if source is data.source
        else open_data(source, data.config, data.device, data.bad.report_path)
        for source in pair
    )
    if 0 < config.run.knn_bank < len(bank):
        log.info("run.knn_bank: %d of %d training images vote", config.run.knn_bank, len(bank))
        generator = torch.Generator().manual_seed(config.run.seed)
        rows = torch.randperm(len(bank), generator=generator)[: config.run.knn_bank]
        bank = bank.rows(rows.sort().values)
    return bank, queries


def _shared(pair: tuple[ImageSource, ImageSource] | None) -> tuple[ImageSource, ImageSource] | None:
    """Keep the classes that both splits have, as evaluation does; None where that leaves no two."""
    try:
        return pair and sources.shared_classes(*pair)
    except UserError as error:  # which stops no run: training needs no labels
        log.info("kNN is not read: %s", error)
        return None


def open_test_images(config: TrainConfig, data: PretrainData) -> ImageSource | None:
    """Open the test split of a set without labels; None where there is none, or nothing is read."""
    is_read = config.run.knn_every and data.config.dataset != "own"
    return sources.open_source(data.config, "test") if is_read else None


def _open_own_labelled(data: DataConfig, root: str) -> tuple[ImageSource, ImageSource]:
    """Open `run.knn_root`, whose images are read as those of the run.

    Raises:
        UserError: It has no labelled train and test images.
    """
    own = replace(data, dataset="folder", root=root, files="", labels="")
    try:
        pair = sources.open_labelled(own)
    except UserError as error:
        raise UserError(str(error).replace("data.root", "run.knn_root")) from None
    if pair is None:
        raise UserError(
            f"run.knn_root {root!r} has no labelled train and test images: give a folder with "
            "train/CLASS/ and test/CLASS/ of two classes or more"
        )
    return sources.shared_classes(*pair)
