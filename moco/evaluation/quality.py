"""Quality of an encoder without labels: `python -m moco quality`, see `moco.evaluation.measures`.

Shapes: N images, V views, D feature.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed, rendezvous
from moco.checkpoints.architecture import Architecture, build
from moco.checkpoints.load import Loaded
from moco.config import DataConfig, UserError
from moco.distributed import gather_ragged
from moco.evaluation.features import check_finite, evaluating
from moco.evaluation.measures import MEASURES
from moco.evaluation.opening import ReadData, open_encoder, start_process
from moco.evaluation.own import NOTHING, Given
from moco.images import sources
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.own_views import OwnViews
from moco.images.steps import StepLoader
from moco.judge_config import QualityConfig
from moco.random import stream_id

log = logging.getLogger("moco")
BATCH = 128  # images at a time, at most


def quality(config: QualityConfig, read_data: ReadData, given: Given = NOTHING) -> dict[str, Any]:
    """Measure backbone, head and the untrained backbone on fresh views of images.

    Args:
        read_data: Data settings, given those of the run that made the checkpoint as defaults.

    Returns:
        Plain values: how many images and views, and of each network its measures by name.
    """
    device = start_process(config)
    try:
        loaded, data, _ = open_encoder(config, read_data, given)
        data = _with_known_views(data)
        views = open_views(config, data, device, given.open_plain(data))
        found = {
            name: measure(network.to(device), views, config.views // 2)
            for name, network in _networks(config, loaded, data).items()
        }
    finally:
        rendezvous.disconnect()
    for line in _table(found, len(views.source)):
        log.info("%s", line)
    about = {"checkpoint": config.checkpoint, "images": len(views.source), "views": config.views}
    return about | {"data": views.source.name} | found


def _with_known_views(data: DataConfig) -> DataConfig:
    """Put a recipe's views in the place of callables, which no checkpoint holds, and say so."""
    if data.views != "own":
        return data
    views = "cifar" if data.image_size < 64 else "v2"
    log.info("the run's views are callables, which its checkpoint does not hold: those of "
             "data.views %s are taken", views)  # fmt: skip
    return replace(data, views=views)


def open_views(
    config: QualityConfig, data: DataConfig, device: torch.device, source: ImageSource | None = None
) -> PretrainData:
    """Prepare fresh views of some images: of the test split, or of the only one there is.

    Args:
        device: On which the views are made.
        source: Images that are taken in the place of those.

    Raises:
        UserError: There are fewer than two images, which tell nothing about each other.
    """
    if source is None and sources.has_test_split(data):
        source = sources.open_source(data, "test")
    if source is None:
        source = sources.open_source(data, "train")
        log.info("%s has no test split: the network may have been trained on these images",
                 source.name)  # fmt: skip
    source = some(source, config.count, config.seed)
    _check_count(source)
    views = fresh_views(source, replace(data, batch_size=2), config.seed)
    views.config = replace(views.config, batch_size=1)  # so that what is left is told below
    views.prepare(device)
    source = views.source  # bad files are left out by now
    _check_count(source)
    batch = min(BATCH, len(source))
    # Each epoch shall have the same images, so they fill whole batches.
    views.source = source.rows(torch.arange(len(source) // batch * batch))
    views.config = replace(views.config, batch_size=batch)
    return views


def _check_count(source: ImageSource) -> None:
    if len(source) < 2:
        raise UserError(f"{source.name} holds {len(source)} image to measure: give two or more")


def fresh_views(
    source: ImageSource, data: DataConfig, seed: int, own_views: OwnViews | None = None
) -> PretrainData:
    """Build what makes views of images that are measured; they are no views of training.

    They are as large as images that are judged, but for own views, which have the size they have.
    """
    end = data.image_size_end if own_views else 0
    settings = replace(data, num_workers=0, pairs="", image_size_start=0, image_size_end=end)
    seed = stream_id(seed, "held out") % 2**32
    return PretrainData(settings, seed, False, False, source, own_views)


def some(source: ImageSource, count: int, seed: int) -> ImageSource:
    """Draw `count` images, or as many as there are."""
    if source.is_sharded:
        raise UserError("shards are not measured: give a folder with data.root")
    generator = torch.Generator().manual_seed(seed)
    return source.rows(torch.randperm(len(source), generator=generator)[:count].sort().values)


@torch.no_grad()
def view_features(network: nn.Module, data: PretrainData, epochs: int = 1) -> Tensor:
    """Return features of fresh views, N x V x D float32 with V = 2 * epochs, the same on all ranks.

    Args:
        network: Images to N x D; in eval mode here, and then as it was.
        data: Of images in whole batches.
    """
    with evaluating(network):
        return torch.cat([_of_epoch(network, data, epoch) for epoch in range(epochs)], 1)


def _of_epoch(network: nn.Module, data: PretrainData, epoch: int) -> Tensor:
    """Return features of an epoch's two views, N x 2 x D, in the order of the images."""
    features, rows = [], []
    for indices in StepLoader(data, lambda: epoch * data.steps_per_epoch):
        indices = data.transfer_batch_to_device(indices, data.device, 0)
        batch = data.on_after_batch_transfer(indices, 0)
        views = batch.query_views[0], batch.key_views[0]
        features.append(torch.stack([network(view).float() for view in views], 1))
        rows.append(distributed.local_rows(indices.index, len(views[0])))
    place = gather_ragged(torch.cat(rows).to(features[0].device)).argsort()
    return gather_ragged(torch.cat(features))[place]


def measure(network: nn.Module, views: PretrainData, epochs: int) -> dict[str, float]:
    """Return the measures of what a network makes of views, two for each epoch.

    Raises:
        UserError: A feature is not finite.
    """
    features = view_features(network, views, epochs)
    check_finite(features.flatten(1), "the encoder's features")
    return {name: round(measure(features), 4) for name, (measure, _) in MEASURES.items()}


def _networks(config: QualityConfig, loaded: Loaded, data: DataConfig) -> dict[str, nn.Module]:
    networks = {"backbone": loaded.backbone}
    if loaded.head is not None:
        networks["head"] = nn.Sequential(loaded.backbone, loaded.head)
    if loaded.own is None:
        images = {"channels": data.channels, "image_size": data.image_size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            architecture = Architecture(loaded.model, images, loaded.variant)
            networks["untrained"] = build(architecture, False)[0]
    return networks


def _table(found: dict[str, dict[str, float]], images: int) -> list[str]:
    """Return a line for each measure, with what is better."""
    lines = [f"{images} images".ljust(14) + "".join(name.rjust(12) for name in found)]
    for name, (_, more) in MEASURES.items():
        values = "".join(f"{row[name]:.2f}".rjust(12) for row in found.values())
        lines.append(f"{name.ljust(14)}{values}  {'higher' if more else 'lower'} is better")
    return lines
