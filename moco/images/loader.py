"""Data: batches of view pairs that can stop and go on mid-epoch.

What fits is resident: decoded once, one uint8 tensor, no workers (`moco.images.resident`). What
does not is streamed: workers decode and cut each image twice, to uint8 (`moco.images.streamed`).
Colours are always made batched on the device. Order and views are functions of (seed, epoch,
index): nothing about them is saved. This is the only room of the wing that knows Lightning.
Shapes: M images in the set, N images per device, W devices, B = N*W, C channels, S side of a view.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco import distributed
from moco.algorithm.batch import Batch
from moco.checks import check_parts, check_root
from moco.config import DataConfig, TrainConfig, UserError
from moco.images import sources, views
from moco.images.bad_files import BadFiles
from moco.images.draws import view_recipes
from moco.images.growth import Growth
from moco.images.items import check_pickles
from moco.images.own import open_own
from moco.images.own_views import OwnViewMaker, OwnViews, check_views
from moco.images.pairs import Naming, PairedCuts, Partners, find_partners
from moco.images.resident import make_resident, warn_of_one_value
from moco.images.steps import Indices, StepLoader
from moco.images.streamed import Cuts, OwnCuts
from moco.images.streams import Order
from moco.pixels import normalisation
from moco.random import stream_id

log = logging.getLogger("moco")


class PretrainData(pl.LightningDataModule):
    """Unlabelled images as batches of view pairs.

    Args:
        config: Data settings.
        seed: Of order and views.
        shuffle: Whether keys change places (shuffle-BN, or split groups on one device).
        symmetric: Whether both views are queries and keys.
        source: The images, or what `moco.images.own.open_own` takes; opened from `config` unless
            given.
        own_views: Callables in the place of a recipe, where `config.views` is own.
        naming: Says what an image shows, where `config.pairs` is own.

    Attributes:
        wait_seconds: Time that training has waited for the loader.
        growth, accumulate: Sizes of the views, and batches of an optimiser step; set before
            training where views grow.
        in_graph: Whether the views are made in the step's own graph, by `make_batch`.
        bad: Streamed files that could not be read, met by this rank; set by `prepare`.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        shuffle: bool,
        symmetric: bool,
        source: Any = None,
        own_views: OwnViews | None = None,
        naming: Naming | None = None,
    ) -> None:
        super().__init__()
        check_parts(TrainConfig(data=config), "data")
        self.config, self.seed, self.shuffle, self.symmetric = config, seed, shuffle, symmetric
        self.own_views, self.naming = own_views, naming
        if own_views is None and config.views == "own":
            raise UserError(
                "data.views is own, callables of the user's: give them in Python, as in "
                "moco.pretrain(images, views=views, resume=RUN), or set data.views"
            )
        self.recipes = view_recipes(config) if own_views is None else None
        self._shuffle_stream = stream_id(seed, "shuffle")
        self.partners: Partners | None = None  # for workers and pictures
        self._partners_near: Partners | None = None  # where the indices are
        self.order: Order | None = None
        self.device = torch.device("cpu")
        if source is None:
            check_root(config)
            source = sources.open_source(config, "train")
        self.source = open_own(source, config)
        self.resident = "memory"
        self.wait_seconds = 0.0
        self.in_graph = False
        self.loader: StepLoader | None = None
        self.growth, self.accumulate = Growth((config.view_side,), (0,)), 1
        check_batch(config, len(self.source))

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the set; what is left over waits for another epoch's order."""
        return len(self.source) // self.config.batch_size

    def view_size(self, epoch: int, number: int) -> int:
        """Return the side of the views of an epoch's batch, given by its number."""
        steps = -(-self.steps_per_epoch // self.accumulate)
        return self.growth.size(epoch * steps + number // self.accumulate)

    def prepare(
        self, device: torch.device, report_path: str | None = None, backend: str = ""
    ) -> None:
        """Decode what is to be resident, and drop what cannot be read.

        Args:
            device: Makes the views.
            report_path: Takes the names of unreadable files.
            backend: Of torch.compile, for the views; empty: not compiled.
        """
        own = self.own_views
        holds = torch.device("cpu") if self.in_workers else device
        self.source, self.resident = make_resident(self.source, self.config, holds, report_path)
        check_batch(self.config, len(self.source))
        warn_of_one_value(self.source)
        self.partners = find_partners(self.source, self.config, self.seed, self.naming)
        if self.streams and self.config.num_workers:
            check_pickles("images", self.source.items)
            check_pickles("views", own)
        remedy = "mend them, and go on with --resume if the run has begun"
        self.bad = BadFiles(self.source, self.config.max_bad_fraction, report_path, remedy)
        self.device = device
        near = torch.device("cpu") if self.looks_up_on_host else device
        self._partners_near = self.partners and self.partners.to(near)
        mean, std = (torch.tensor(v, device=device) for v in normalisation(self.config))
        size = self.config.view_side
        self.order = None
        if self.source.is_sharded:
            config, counts = self.config, torch.from_numpy(self.source.paths.counts)
            self.order = Order(counts, self.seed, config.streams, config.window, config.batch_size)
            if self.order.streams < config.streams:
                log.info(
                    "shards are read as %d streams: the most up to data.streams %d that divide "
                    "data.batch_size %d", self.order.streams, config.streams, config.batch_size,
                )  # fmt: skip
        if own is None:
            self._make_view = views.ViewMaker(self.recipes, self.seed, size, mean, std, backend)
        else:
            check_views(own, self.source, self.config)
            self._make_view = OwnViewMaker(own, self.seed, size, mean, std)

    @property
    def in_workers(self) -> bool:
        """Tell whether workers make the whole views, by callables of single images."""
        return self.own_views is not None and not self.own_views.batched

    @property
    def streams(self) -> bool:
        """Tell whether workers read the images, or make views of those in memory."""
        return self.source.images is None or self.in_workers

    def cuts(self) -> Dataset:
        """Build what the workers make batches of."""
        if self.own_views is None:
            cuts = Cuts(self.source, self.config, self.seed)
        else:
            cuts = OwnCuts(self.source, self.config, self.seed, self.own_views)
        return cuts if self.partners is None else PairedCuts(cuts, self.partners)

    def train_dataloader(self) -> StepLoader:
        """Build the loader; it finds its place from Lightning's batch counter, mid-epoch too."""
        if self.trainer is None or not hasattr(self, "bad"):
            raise UserError(
                "PretrainData goes into trainer.fit(module, datamodule=data) of a Trainer with "
                "callbacks=moco.callbacks(module, data, DIR), which prepare it"
            )
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        self.loader = StepLoader(self, position=lambda: progress.total.ready)
        return self.loader

    def close(self) -> None:
        """End the workers."""
        if self.loader is not None:
            self.loader.close()

    @property
    def looks_up_on_host(self) -> bool:
        """Tell whether the images stay in main memory where a GPU makes the views."""
        images = self.source.images
        return images is not None and images.device.type != self.device.type

    def transfer_batch_to_device(
        self, batch: Indices, device: torch.device, dataloader_idx: int
    ) -> Indices:
        """Leave the indices where the images are, so that the host does not wait for a GPU."""
        if self.looks_up_on_host:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Indices, dataloader_idx: int) -> Batch | Indices:
        """Make the views on the device, or leave that to the graph of the step."""
        if not self.in_graph:
            return self.make_batch(batch)
        epoch, step = (batch.index.new_full((), number) for number in (batch.epoch, batch.step))
        return replace(batch, epoch=epoch, step=step)

    def make_batch(self, batch: Indices) -> Batch:
        """Make the views.

        The keys of this rank are those of other images, so that they meet other neighbours in
        BatchNorm than their queries did. Resident images are simply looked up; of streamed ones the
        uint8 cuts change ranks.
        """
        world = distributed.world_size()
        count = len(batch.index) // world
        order, crops = None, batch.crops
        if self.shuffle:
            place = batch.step, count, world, batch.index.device
            order = distributed.key_order(self._shuffle_stream, *place)
        numbers = (0, 1) if self.symmetric else (0,)
        index = distributed.local_rows(batch.index, count)
        moment = batch.epoch, batch.size
        query_views = [self._view(moment, index, crops, n) for n in numbers]
        places = None if order is None else self._here(order)
        if self.symmetric and world == 1:  # the keys are these same views in other places
            swapped = query_views[::-1]
            key_views = swapped if places is None else [view[places] for view in swapped]
        else:
            if order is not None:
                index = distributed.local_rows(batch.index[order], count)
                crops = None if crops is None else distributed.exchange(crops, places)
            key_views = [self._view(moment, index, crops, 1 - n) for n in numbers]
        return Batch(query_views, key_views, places)

    def _view(
        self, moment: tuple[int, int], index: Tensor, crops: Tensor | None, number: int
    ) -> Tensor:
        """Make one view, N x C x S x S, of N images or of their cuts; in this epoch with this S."""
        epoch, size = moment
        if self._partners_near is not None and number == 1:
            index = self._partners_near(epoch, index)
        if crops is not None:
            return self._make_view(crops[:, number], epoch, index, number, whole=False)
        images, index = self._here(self.source.images[index]), self._here(index)
        return self._make_view(images, epoch, index, number, whole=True, size=size)

    def _here(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device, without waiting for what that computes."""
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def check_batch(config: DataConfig, count: int) -> None:
    """Raise UserError when the set does not fill one batch."""
    if count < config.batch_size:
        where = f"{config.dataset} {config.root}".strip()
        raise UserError(
            f"data.batch_size {config.batch_size} is above the {count} images of {where}: lower it "
            f"to {max(2, count)} or less"
        )
