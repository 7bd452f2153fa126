"""Settings of the algorithm: encoders, queue, loss and optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco.config.setting import MOST_EPOCHS, Auto, setting


@dataclass
class ModelConfig:
    """Encoders, queue and loss (1911.05722, section 3; 2003.04297; 2104.02057)."""

    backbone: str = setting(
        "resnet50",
        "Any torchvision ResNet or timm model by name; auto: a small one that this hardware trains",
    )
    stem: Literal["auto", "imagenet", "cifar", "patch"] = setting(
        "imagenet",
        "First layers of a ResNet: 7x7 stride 2 and max-pool, 3x3 stride 1 without (images of "
        "32 px), or 4x4 stride 2 without (the same, at a quarter of the work); auto: by the size "
        "of the views",
    )
    width: float | Auto = setting(
        1.0,
        "Channel multiplier of a ResNet or ViT; 1 is the published network; auto: as the backbone "
        "is chosen",
        above=0,
        at_most=8,
    )
    zero_init_residual: bool = setting(
        False, "Start the last BatchNorm of each block of a ResNet at 0 (v3)"
    )
    patch_size: int = setting(
        0, "Side of a ViT's patches in pixels; 0: as its name says", at_least=0, at_most=1024
    )
    depth: int = setting(
        0, "Number of a ViT's blocks; 0: as its name says", at_least=0, at_most=1024
    )
    num_heads: int = setting(
        0,
        "Attention heads of a ViT; 0: as its name says; v3's ViT-S has 12, timm's 6",
        at_least=0,
        at_most=1024,
    )
    positions: Literal["learned", "sincos"] = setting(
        "learned", "Positions of a ViT: learned, or fixed sines and cosines of row and column (v3)"
    )
    vit_init: Literal["timm", "xavier"] = setting(
        "timm",
        "First weights of a ViT: timm's, or Xavier's with query, key and value each apart (v3)",
    )
    freeze_patch_embed: bool = setting(
        False, "Keep the random patch projection of a ViT as it starts (v3, for stability)"
    )
    head: Literal["linear", "mlp", "mlp_bn", "mlp_bn_affine"] = setting(
        "mlp",
        "Projection head: linear (v1), MLP (v2), MLP without biases and with BatchNorm after each "
        "layer, the last one without gain and bias (v3), or MLP with biases and with BatchNorm "
        "with gain and bias after each layer (Fast-MoCo)",
    )
    head_layers: int = setting(
        2,
        "Linear layers of an MLP head; v3 has 2 for ResNets and 3 for ViTs",
        at_least=2,
        at_most=8,
    )
    head_hidden_dim: int = setting(
        0,
        "Hidden width of MLP head and predictor; 0 takes the backbone's feature width",
        at_least=0,
        at_most=65536,
    )
    embedding_dim: int = setting(128, "Width of the embedding, C", at_least=2, at_most=65536)
    predictor: Literal["none", "mlp", "bottleneck"] = setting(
        "none",
        "MLP of two layers behind the head, on the query side only: with BatchNorm and without "
        "biases (v3), or with biases and a hidden width of a quarter (Fast-MoCo)",
    )
    predictor_last_bn: bool = setting(
        False, "BatchNorm without gain and bias behind the predictor (v3 with ViTs)"
    )
    patches: int = setting(
        1,
        "Cut the queries' views into so many by so many patches, which are encoded apart; keys "
        "stay whole (Fast-MoCo: 2)",
        at_least=1,
        at_most=16,
    )
    combine: int = setting(
        1,
        "Patches whose features are averaged before the head, in every combination (Fast-MoCo: 2)",
        at_least=1,
        at_most=16,
    )
    queue_size: int | Auto = setting(
        65536,
        "Number of negative keys, K; any size from one global batch up; 0: no queue, the other "
        "keys of the global batch are the negatives (v3); auto: at most an eighth of the keys of "
        "an epoch",
        at_least=0,
        at_most=2**24,
    )
    queues: int = setting(
        1,
        "Queues of that size: 1, or 2 where the keys of each view have their own (solo-learn)",
        at_least=1,
        at_most=2,
    )
    temperature: float = setting(
        0.2, "Softmax temperature: 0.07 in v1, 0.2 in v2", above=0, at_most=100
    )
    loss_times_2t: bool = setting(
        True, "Without a queue, multiply the loss by twice the temperature (v3; not Fast-MoCo)"
    )
    symmetric: Literal["none", "mean", "sum"] = setting(
        "none",
        "Loss on one view pair (v1, v2), or on both and their mean (v2+) or sum (the official "
        "CIFAR demo)",
    )
    key_momentum: float = setting(
        0.999, "Share that the key encoder keeps at each step, m", at_least=0, at_most=1
    )
    key_momentum_end: float = setting(
        1.0, "Where a cosine key momentum ends", at_least=0, at_most=1
    )
    key_momentum_schedule: Literal["constant", "cosine"] = setting(
        "constant", "Keep key_momentum, or move it to key_momentum_end along half a cosine"
    )
    key_bn: Literal["auto", "shuffle", "split", "sync", "plain"] = setting(
        "auto",
        "BatchNorm of the keys: shuffled across devices, split into groups on one device, over "
        "all devices, or plain; auto: shuffle on several devices, split on one, sync without a "
        "queue (plain on several CPU processes)",
    )
    query_bn: Literal["plain", "split", "sync"] = setting(
        "plain",
        "BatchNorm of the queries; split imitates several devices on one, as the official CIFAR "
        "demo does",
    )
    bn_splits: int = setting(8, "Number of BatchNorm groups of a split", at_least=2, at_most=65536)
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "Compile the step to fused kernels, a minute at the start; auto: on a GPU, for 3000 steps "
        "or more",
    )

    @property
    def keys_per_image(self) -> int:
        """Keys that an image adds to a queue in a step; numbers and choices must be decided."""
        return 2 if self.symmetric != "none" and self.queues == 1 else 1


@dataclass
class OptimConfig:
    """Optimiser and schedule. `lr` is what the optimiser gets; a number is not rescaled."""

    name: Literal["auto", "sgd", "adamw", "lars", "muon"] = setting(
        "sgd",
        "torch.optim.SGD, torch.optim.AdamW, v3's LARS for large batches, or timm's Muon, whose "
        "steps are orthogonal matrices, as large as those of AdamW, which norms, biases and narrow "
        "matrices get; auto: muon on a CPU for a ResNet-10 of half its width or less, else sgd",
    )
    lr: float | Auto = setting(
        0.03,
        "Learning rate at its highest, for the global batch as it is; auto: in proportion to it",
        above=0,
        at_most=1000,
    )
    sgd_momentum: float = setting(0.9, "Momentum of SGD, LARS and Muon", at_least=0, at_most=1)
    dampening: float = setting(0.0, "Dampening of SGD's momentum", at_least=0, at_most=1)
    nesterov: bool = setting(
        False, "Nesterov momentum of SGD and Muon; needs sgd_momentum above 0 and dampening 0"
    )
    adam_beta1: float = setting(
        0.9, "Decay of AdamW's mean, in Muon too", at_least=0, at_most=0.9999
    )
    adam_beta2: float = setting(
        0.999, "Decay of AdamW's variance, in Muon too", at_least=0, at_most=0.99999
    )
    weight_decay: float = setting(
        1e-4,
        "Weight decay; of every parameter unless decay_norm_and_bias is false",
        at_least=0,
        at_most=10,
    )
    decay_norm_and_bias: bool = setting(
        True, "Decay parameters of one dimension too, as v1, v2 and v3's AdamW do; LARS never does"
    )
    lars_trust: float = setting(
        0.001, "Factor of |weights| / |update| in the rates of LARS", above=0, at_most=1
    )
    clip_grad_norm: float = setting(
        0.0, "Scale gradients down to this norm; 0: never", at_least=0, at_most=1e6
    )
    schedule: Literal["cosine", "step", "plateau", "constant", "stable"] = setting(
        "cosine",
        "How the rate falls; stable: constant, then linearly to 0 in the last decay_share of the "
        "run, which can be extended from before that",
    )
    decay_share: float = setting(
        0.2, "Last share of the run in which `stable` falls", above=0, at_most=1
    )
    schedule_per: Literal["epoch", "step"] = setting(
        "epoch", "Recompute the rate once per epoch (v1, v2) or per step"
    )
    milestones: list[int] = setting(
        [120, 160],
        "Epochs at which `step` multiplies the rate by gamma",
        at_least=0,
        at_most=MOST_EPOCHS,
    )
    gamma: float = setting(0.1, "Factor of `step` and `plateau`", above=0, at_most=1)
    warmup_epochs: float = setting(
        0.0,
        "Epochs of linear warm-up, per step, before any schedule; a tenth of a shorter run",
        at_least=0,
        at_most=MOST_EPOCHS,
    )
    warmup_start: float = setting(
        0.0, "Share of lr at which the warm-up begins", at_least=0, at_most=1
    )
    freeze_backbone_epochs: float = setting(
        0.0,
        "Epochs at the start in which the backbone's weights stay and head and queue are trained "
        "at lr, before any warm-up; a tenth of a shorter run",
        at_least=0,
        at_most=MOST_EPOCHS,
    )
    predictor_schedule: Literal["same", "constant"] = setting(
        "same", "Rate of the predictor: as of all else, or lr throughout (Fast-MoCo, SimSiam)"
    )
    plateau_metric: Literal["train/loss", "val/knn_top1"] = setting(
        "train/loss",
        "What `plateau` watches; val/knn_top1 lets labels of test images steer the rate",
    )
    plateau_patience: int = setting(
        10,
        "Readings without progress that `plateau` waits for: one an epoch, or each of kNN",
        at_least=0,
        at_most=MOST_EPOCHS,
    )
