"""MoCo: the algorithm on one page (1911.05722, Algorithm 1; v2 2003.04297; v3 2104.02057).

v1, v2, v2+ and v3 differ in orthogonal settings (`moco.config.ModelConfig`), not in code.
`moco.images.loader` makes views of images, and `moco.training.run` makes a run of these steps.
Shapes: N images per device, W devices, B = N*W, C embedding, K queue, S side of a view.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from moco.algorithm import optim
from moco.algorithm.batch import Batch
from moco.algorithm.batch_norm import frozen_statistics, set_batch_norm
from moco.algorithm.compiled import compile_network, one_graph
from moco.algorithm.contrast import KeyQueue, at_least_fp32, contrast_accuracy, info_nce
from moco.algorithm.encoder import build_encoder, build_predictor, lay_channels_last
from moco.algorithm.folded_stem import fold_stem
from moco.checks import check_parts
from moco.config import ModelConfig, OptimConfig, TrainConfig
from moco.distributed import all_gather, local_rows, rank, restore, world_size
from moco.random import stream_id


class MoCo(pl.LightningModule):
    """Train a query encoder by gradient; the key encoder follows it and fills the queue of keys.

    Args:
        model_config: Encoders, queue and loss; `key_bn` already decided (not auto).
        optim_config: Optimiser and schedule.
        channels: Of the images.
        image_size: Side of the images in pixels.
        seed: Of the queue's first, random keys, and of what the networks draw themselves.
        chunks: Parts in which a batch is encoded.
        backbone: The user's own, which is copied; `model_config.backbone` then is own:NAME.

    Attributes:
        query_encoder, key_encoder: Equal at the start, head included; the key encoder takes no
            gradient.
        predictor: Behind the query encoder alone; the identity where there is none.
        queue, second_queue: K x C keys, in every checkpoint; None where there is none.
        total_steps, steps_per_epoch, accumulate: Set before training, since the schedules need
            them; `accumulate` counts the batches of an optimiser step.
        wants_metrics, metrics: Where the first is set, a step fills the second, on the device.
        loss_sum, loss_count: Of the epoch's batches so far, on this rank.
        share: 1 - m of this step, where the step is one graph.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        optim_config: OptimConfig,
        channels: int,
        image_size: int,
        seed: int = 0,
        chunks: int = 1,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_parts(TrainConfig(model_config, optim_config), "model", "optim")
        self.model_config, self.optim_config, self.seed = model_config, optim_config, seed
        self.chunks = chunks
        encoder = build_encoder(model_config, channels, image_size, backbone)
        predictor = build_predictor(model_config, encoder.feature_dim)
        key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        encoder.cut_images(model_config.patches, model_config.combine)
        self.query_encoder = set_batch_norm(encoder, model_config.query_bn, model_config.bn_splits)
        self.key_encoder = set_batch_norm(key_encoder, model_config.key_bn, model_config.bn_splits)
        self.predictor = set_batch_norm(predictor, model_config.query_bn, model_config.bn_splits)
        generator = torch.Generator().manual_seed(seed)
        size, dim = model_config.queue_size, model_config.embedding_dim
        self.queue = KeyQueue(size, dim, generator) if size else None
        self.second_queue = KeyQueue(size, dim, generator) if model_config.queues == 2 else None
        # Of the sum of the losses; 2104.02057's code, which has no queue, has the 2 T.
        self.loss_scale = 0.5 if model_config.symmetric == "mean" else 1.0
        if not size and model_config.loss_times_2t:
            self.loss_scale *= 2 * model_config.temperature
        self.plateau = optim.Plateau(optim_config)
        self.total_steps = self.steps_per_epoch = 1
        self.accumulate = 1
        self.wants_metrics = True
        self.metrics: dict[str, Tensor] = {}
        # Of shape 1: graphs of torch 2.11 leave out what is added to an fp64 number without axes.
        self.register_buffer("loss_sum", torch.zeros(1), persistent=False)
        self.register_buffer("share", torch.ones(()), persistent=False)
        self.loss_count = 0
        lay_channels_last(self)

    def compile_encoders(self, backend: str) -> None:
        """Compile each encoder to fused kernels for one shape."""
        fold_stem(self)
        for encoder in (self.query_encoder, self.key_encoder, self.predictor):
            compile_network(encoder, backend)

    def compile_step(self, backend: str, make_batch: Callable[[Any], Batch]) -> None:
        """Compile the whole step to one graph, which replaces `training_step`: see `one_graph`."""
        fold_stem(self)
        self.training_step = one_graph(self.training_step, self.queues, make_batch, backend)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take one step of Algorithm 1 on one pair of views or, if symmetric, on two."""
        queries = [self.encode_queries(view) for view in batch.query_views]  # N C, of patches R*N C
        with torch.no_grad():
            if batch_idx % self.accumulate == 0:
                self.update_key_encoder()
            keys = [self.encode_keys(view, batch.key_order) for view in batch.key_views]  # B C
        negatives = [queue.snapshot() for queue in self.queues] or keys  # K C, or B C
        count = len(batch.query_views[0])  # N
        own_rows = None if self.queues else rank() * count  # of the own keys in B
        temperature, losses = self.model_config.temperature, []
        for query, key, others in zip(queries, keys, cycle(negatives), strict=False):
            own = local_rows(key, count)  # N C
            loss, logits = info_nce(query, own, others, temperature, own_rows)
            losses.append(loss)
        for key, queue in zip(keys, cycle(self.queues), strict=False):
            queue.enqueue(key)  # after all losses: no key may be its own query's negative
        loss = torch.stack(losses).sum() * self.loss_scale
        self.take_note(loss.detach(), logits.detach(), queries[-1].detach())
        if self.accumulate == 1:  # inductor takes a product with 1 for the loss that is noted, and
            return loss  # returns that one, which has no gradient (torch 2.14.1)
        return loss * self.batch_weight(batch_idx)

    @property
    def queues(self) -> list[KeyQueue]:
        """No queue, one for all keys, or one for the keys of each view."""
        return [queue for queue in (self.queue, self.second_queue) if queue is not None]

    def encode_queries(self, view: Tensor) -> Tensor:
        """Encode this device's queries, N x C unit vectors, or R * N x C of patches.

        In chunks, no activation is kept: the backward pass encodes a chunk again with the same
        dropout, and takes its gradient, so that the gradient is the whole batch's at the memory of
        a chunk (GradCache, arXiv:2101.06983).
        """
        if self.chunks == 1:
            return normalize(at_least_fp32(self.predictor(self.query_encoder(view))))
        networks = self.query_encoder, self.predictor
        embeddings = [
            checkpoint(
                lambda images: self.predictor(self.query_encoder(images)),
                part,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), frozen_statistics(*networks)),
            )
            for part in view.chunk(self.chunks)
        ]
        return normalize(at_least_fp32(torch.cat(embeddings)))

    def batch_weight(self, batch_idx: int) -> float:
        """Return the factor that makes Lightning's division by `accumulate` one by the window.

        The last step of an epoch may have fewer batches.
        """
        if self.accumulate == 1:
            return 1.0
        first = batch_idx // self.accumulate * self.accumulate
        return self.accumulate / (self.window_end(batch_idx) - first)

    def window_end(self, batch_idx: int) -> int:
        """Return the number after the last batch of this batch's optimiser step."""
        end = (batch_idx // self.accumulate + 1) * self.accumulate
        return min(end, int(self.trainer.num_training_batches))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Move the key encoder: k <- m*k + (1-m)*q over parameters only (1911.05722, eq. 2).

        The key encoder keeps its own running statistics of BatchNorm. The first update changes
        nothing, since both encoders start equal.
        """
        keys, queries = list(self.key_encoder.parameters()), list(self.query_encoder.parameters())
        if torch.compiler.is_compiling():  # in a graph a number would be that of the first step
            moves = torch._foreach_mul(torch._foreach_sub(queries, keys), self.share)
            torch._foreach_add_(keys, moves)
        else:
            torch._foreach_lerp_(keys, queries, self.key_share())

    def key_share(self) -> float:
        """Return 1 - m, the share of the query encoder that the key encoder takes at this step."""
        momentum = optim.key_momentum(self.model_config, self.global_step, self.total_steps)
        return 1 - momentum

    @torch.no_grad()
    def encode_keys(self, key_view: Tensor, key_order: Tensor | None) -> Tensor:
        """Encode this device's keys and gather those of all devices in the order of the queries.

        Args:
            key_view: N x channels x S x S. `key_order` has put these images on this device, so that
                BatchNorm normalises them in other groups than their queries.
            key_order: B, see `moco.distributed.key_order`; None where the keys were not shuffled.

        Returns:
            B x C unit vectors in rank order, without gradient.
        """
        keys = torch.cat([self.key_encoder(part) for part in key_view.chunk(self.chunks)])
        return restore(normalize(at_least_fp32(keys)), key_order)

    @torch.no_grad()
    def take_note(self, loss: Tensor, logits: Tensor, query: Tensor) -> None:
        """Add up the loss and, where wanted, compute metrics; the host does not wait for them.

        A graph always computes them: one for the steps without would be compiled apart.
        """
        self.loss_sum.add_(loss)
        if not (torch.compiler.is_compiling() or self.wants_metrics):
            return
        top1, top5 = contrast_accuracy(logits)
        pairs = 1 if self.model_config.symmetric == "none" else 2
        candidates = logits.shape[1] - (not self.queues)  # without a queue one is left out
        chance = math.log(candidates) * pairs * self.loss_scale
        self.metrics = {
            "train/loss": loss,
            "train/chance_loss": loss.new_full((), chance),
            "train/contrast_top1": top1,
            "train/contrast_top5": top5,
            "train/queue_fill": self.queue.fill() if self.queue else loss.new_ones(()),
            # It is 1 where embeddings spread evenly over the sphere, 0 where they are one point.
            "train/spread": query.std(0).mean() * query.shape[1] ** 0.5,
        }

    def read_plateau(self, knn_top1: float | None) -> None:
        """Show the plateau schedule the epoch's mean loss or kNN, and set the losses to 0.

        Args:
            knn_top1: Read at the end of this epoch; None where it was not.
        """
        if self.optim_config.schedule == "plateau":  # only then the host must wait for the device
            sums = all_gather(self.loss_sum)
            mean = sums.sum().item() / (self.loss_count * len(sums))
            metric = mean if self.optim_config.plateau_metric == "train/loss" else knn_top1
            if metric is not None:
                self.plateau.read(metric)
        self.loss_sum.zero_()
        self.loss_count = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser over query encoder and predictor."""
        encoder, predictor = self.query_encoder.parameters(), self.predictor.parameters()
        return optim.build_optimizer(encoder, self.optim_config, predictor)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Freeze the backbone, and clip; Lightning refuses to clip where the optimiser is fused.

        What has no gradient neither moves nor decays, and gets no momentum. BatchNorm of a frozen
        backbone takes the batch's statistics and moves the running ones: it does so in the key
        encoder and in both once it thaws, and a head that learnt from others would have to learn
        again.
        """
        if self.global_step < optim.frozen_steps(self.optim_config, self.steps_per_epoch):
            for parameter in self.query_encoder.backbone.parameters():
                parameter.grad = None
        if self.optim_config.clip_grad_norm:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.optim_config.clip_grad_norm)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the batch, set rate and momentum, and seed torch's generators for dropout.

        The masks of a batch belong to the seed, the step, the batch and the rank, so a resumed run
        draws the same ones, and each rank draws its own.
        """
        self.loss_count += 1
        torch.manual_seed(stream_id(self.seed, f"masks {self.global_step} {batch_idx} {rank()}"))
        self.share.fill_(self.key_share())
        rate = self.learning_rate()
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = self.optim_config.lr if group.get("constant") else rate

    def learning_rate(self) -> float:
        """Return the rate of the current optimiser step."""
        rate = optim.learning_rate(
            self.optim_config, self.global_step, self.steps_per_epoch, self.total_steps
        )
        return rate * self.plateau.factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the plateau's counters and the epoch's losses, of each rank, as plain numbers."""
        checkpoint["plateau"] = self.plateau.state_dict()
        is_read = self.optim_config.schedule == "plateau"  # else rank 0's do
        sums = all_gather(self.loss_sum) if is_read else self.loss_sum
        checkpoint["epoch_loss"] = [sums.tolist(), self.loss_count]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the plateau's counters and the epoch's losses from a checkpoint."""
        self.plateau.load_state_dict(checkpoint["plateau"])
        sums, self.loss_count = checkpoint["epoch_loss"]
        sums = sums if isinstance(sums, list) else [sums]  # rank 0's, of an earlier version
        own = sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums)
        self.loss_sum.fill_(own)
