"""Short trainings for tests: a small module, related views, a rank's batches, and the loop."""

from __future__ import annotations

import os
from dataclasses import replace

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from moco import distributed
from moco.algorithm.batch import Batch
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig
from moco.random import stream_id

SIZE, STEPS, PER_RANK = 16, 10, 8
MODEL = ModelConfig(
    backbone="resnet10t", stem="cifar", width=0.125, embedding_dim=16, queue_size=52,
    key_momentum=0.9, key_bn="split", bn_splits=2,
)  # fmt: skip
SMALL = replace(MODEL, backbone="own:Small", stem="imagenet", width=1.0)
OPTIM = OptimConfig(lr=0.01, schedule="constant", weight_decay=1e-3)


class Small(nn.Sequential):
    """A network with BatchNorm that is compiled in a few seconds, for the settings SMALL."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(8, 8, 3, stride=2))


def make_module(
    model: ModelConfig = MODEL,
    seed: int = 0,
    optim: OptimConfig = OPTIM,
    chunks: int = 1,
    backbone: nn.Module | None = None,
) -> MoCo:
    """Build a small module in fp64, as the views are.

    Ten steps of training make 1e-3 of a rounding error of fp32, and how kernels round depends on
    the CPU.
    """
    pl.seed_everything(seed, verbose=False)
    size = {"channels": 3, "image_size": SIZE}
    return MoCo(model, optim, **size, seed=seed, chunks=chunks, backbone=backbone).double()


def make_views(count: int, seed: int = 0, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Draw global batches of two views each, which are related but not equal."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(steps):
        image = torch.randn(count, 3, SIZE, SIZE, generator=generator).double()
        pairs.append(
            tuple(
                image + 0.3 * torch.randn(image.shape, generator=generator).double()
                for _ in range(2)
            )
        )
    return pairs


def make_batches(pairs, world: int, rank: int, shuffled: bool, symmetric: bool) -> list[Batch]:
    """Cut this rank's batches out of the global ones, keys already in shuffled places."""
    batches = []
    for step, (first, second) in enumerate(pairs):
        count = len(first) // world
        rows = slice(rank * count, (rank + 1) * count)
        stream = stream_id(0, "shuffle")
        order = distributed.key_order(stream, step, count, world) if shuffled else None
        views = [(first, second), (second, first)] if symmetric else [(first, second)]
        queries = [query[rows] for query, _ in views]
        keys = [(key if order is None else key[order])[rows] for _, key in views]
        batches.append(Batch(queries, keys, order))
    return batches


class Recorder(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())


def train(
    module: MoCo,
    batches: list[Batch],
    world: int = 1,
    accelerator: str = "cpu",
    recorder: Recorder | None = None,
    **options,
) -> list[float]:
    """Train through Lightning as a run does, and return the loss of each batch."""
    recorder = recorder or Recorder()
    module.steps_per_epoch = module.total_steps = len(batches)
    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    trainer = pl.Trainer(
        accelerator=accelerator, devices=world, strategy=strategy if world > 1 else "auto",
        max_epochs=1,
        logger=False, callbacks=[recorder], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader)
    return recorder.losses


def as_rank() -> tuple[int, int]:
    """Tell Lightning that this process is one of torchrun's."""
    rank, world = distributed.rank(), distributed.world_size()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "t", "MASTER_ADDR": "localhost"}
    os.environ.update({k: str(v) for k, v in names.items()} | {"MASTER_PORT": "1"})
    return rank, world
