"""Every setting of training: its meaning, unit, range, default and source.

Settings are declared here and nowhere else (those of evaluation and export in `judge_config`): the
command line, its help, the checks and what a checkpoint stores are derived from these dataclasses.
Fields are flat primitives, so that a checkpoint loads with ``weights_only=True``.
`moco.command.cli` turns a command line into a `TrainConfig`. This room imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints


class UserError(ValueError):
    """Input is wrong. The message says what, where, and how to mend it; scripts exit with 2."""


class RunError(RuntimeError):
    """A run cannot go on although its input is right: a worker died, memory or numbers overflowed.

    The message says what happened and how to go on; scripts print it and exit with 1. Rank 0 prints
    it for all ranks, unless it is `local` to the rank that raised it.
    """

    def __init__(self, message: str, local: bool = False) -> None:
        super().__init__(message)
        self.local = local


Auto = Literal["auto"]  # left to `moco.training.autoconfigure`

# Bounds of what is counted: no run or evaluation comes near them, and none of them overflows.
MOST_EPOCHS, MOST_STEPS, MOST_ROWS = 1_000_000, 1_000_000_000, 1_000_000
MOST_VALUE = 1e9  # of a pixel
LEAST_VIEW = 4  # pixels a side


def setting(
    default: Any,
    meaning: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare a field: its default, its meaning, and the range that `check` enforces.

    A field whose default is MISSING must be given.
    """
    limits = {"above": above, "at_least": at_least, "at_most": at_most}
    metadata = {"meaning": meaning, **{k: v for k, v in limits.items() if v is not None}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """Encoders, queue and loss (1911.05722, section 3; 2003.04297; 2104.02057)."""

    backbone: str = setting(
        "resnet50",
        "Any torchvision ResNet or timm model by name; auto: a small one that this hardware trains",
    )
    stem: Literal["auto", "imagenet", "cifar"] = setting(
        "imagenet",
        "First layers of a ResNet: 7x7 stride 2 and max-pool, or 3x3 stride 1 without (images "
        "of 32 px); auto: by the size of the views",
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
        "all devices, or plain; auto: shuffle on several devices, split on one",
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

    name: Literal["sgd", "adamw", "lars"] = setting(
        "sgd", "torch.optim.SGD, torch.optim.AdamW, or v3's LARS for large batches"
    )
    lr: float | Auto = setting(
        0.03,
        "Learning rate at its highest, for the global batch as it is; auto: in proportion to it",
        above=0,
        at_most=1000,
    )
    sgd_momentum: float = setting(0.9, "Momentum of SGD and LARS", at_least=0, at_most=1)
    dampening: float = setting(0.0, "Dampening of SGD's momentum", at_least=0, at_most=1)
    nesterov: bool = setting(False, "Nesterov momentum; needs sgd_momentum above 0 and dampening 0")
    adam_beta1: float = setting(0.9, "Decay of AdamW's mean", at_least=0, at_most=0.9999)
    adam_beta2: float = setting(0.999, "Decay of AdamW's variance", at_least=0, at_most=0.99999)
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


@dataclass
class DataConfig:
    """Images, views and batches."""

    dataset: Literal[
        "digits",
        "cifar10",
        "cifar100",
        "stl10",
        "folder",
        "imagenet",
        "shards",
        "parquet",
        "own",
    ] = setting(
        "folder",
        "Where images come from; `folder` takes any tree of images, `digits` needs no files, "
        "`shards` are tars of images, `parquet` as Hugging Face writes it; own: what moco.pretrain "
        "is given in Python",
    )
    root: str = setting(
        "",
        "Directory of the data set; of shards also a pattern, here or in a store, as "
        "s3://bucket/train-{000..146}.tar; not needed for digits",
    )
    files: str = setting(
        "", "File that lists the training images, one path a line, absolute or below root"
    )
    labels: str = setting(
        "",
        "Table (CSV) of a path, a label and perhaps a split in each row, where folders are no "
        "labels",
    )
    download: bool = setting(
        False, "Fetch cifar10, cifar100 or stl10 into root when missing (uses the network)"
    )
    channels: int | Auto = setting(
        3,
        "Channels that images are brought to: 1 grey, 3 RGB, 4 RGBA, other: as stored; auto: from "
        "a sample of the files",
        at_least=1,
        at_most=1024,
    )
    min_value: float | list[float] | Literal["auto"] = setting(
        "auto",
        "Value that becomes black in files of more than 8 bits, one or one per channel; auto: "
        "from a sample of the files",
        at_least=-MOST_VALUE,
        at_most=MOST_VALUE,
    )
    max_value: float | list[float] | Literal["auto"] = setting(
        "auto",
        "Value that becomes white in files of more than 8 bits, one or one per channel; auto: "
        "from a sample of the files, rounded up to 1, 255, 1023, 4095, 10000 or 65535",
        at_least=-MOST_VALUE,
        at_most=MOST_VALUE,
    )
    dicom_window: bool = setting(
        True, "Show DICOM files through their own window; false: by min_value and max_value"
    )
    exif: Literal["apply", "ignore"] = setting(
        "apply",
        "Turn pictures upright as their EXIF orientation says; the references of published scores "
        "ignore it",
    )
    max_pixels: int = setting(
        178_956_970,
        "Pixels above which an image counts as unreadable: a small file may claim any number",
        at_least=1,
        at_most=2**34,
    )
    image_size: int | Auto = setting(
        224,
        "Side of a view in pixels; auto: by the images and the hardware",
        at_least=LEAST_VIEW,
        at_most=8192,
    )
    image_size_start: int = setting(
        0,
        "Side of the first views in pixels, which grow to image_size in two steps; 0: they do not",
        at_least=0,
        at_most=8192,
    )
    image_size_share: float = setting(
        0.75, "Share of the run over which the views grow", above=0, at_most=0.99
    )
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "How crops are resized to views, antialiased (Fast-MoCo: bicubic)"
    )
    reduce_jpegs: bool = setting(
        True,
        "Of streamed images: decode a JPEG at 1/4 or 1/8 of its size where the boxes of both "
        "views keep image_size pixels a side. Large photographs are read several times faster",
    )
    upscale: float = setting(
        1.0,
        "How many times larger than the images a view may be; 1 refuses to enlarge",
        at_least=1,
        at_most=1024,
    )
    batch_size: int | Auto = setting(
        256,
        "Images per step over all devices; auto: 256, or what a small set allows",
        at_least=2,
        at_most=MOST_ROWS,
    )
    chunks: int = setting(
        1,
        "Parts in which a device encodes its share of the batch, to save memory: the gradient is "
        "the whole batch's, BatchNorm sees a part",
        at_least=1,
        at_most=MOST_ROWS,
    )
    views: Literal["auto", "v1", "v2", "cifar", "v3", "own"] = setting(
        "v2",
        "Augmentation: 1911.05722, 2003.04297, the CIFAR demo or 2104.02057, whose two views "
        "differ; in the five probabilities below a list of two values is one for each view; auto: "
        "cifar for views below 64 px, else v2; own: what moco.pretrain is given in Python",
    )
    pairs: str = setting(
        "",
        "Which images show the same thing, so that the second view is cut from another one of "
        "them: a regular expression whose groups name it in the path below root, or a table (CSV) "
        "of a path and a name in each row; own: a function in Python",
    )
    crop_min: float | list[float] | None = setting(
        None,
        "Smallest share of the area that a crop keeps; null: as in `views`",
        above=0,
        at_most=1,
    )
    flip: float | list[float] | None = setting(
        None, "Probability of a horizontal flip; null: as in `views`", at_least=0, at_most=1
    )
    jitter: float | list[float] | None = setting(
        None, "Probability of colour jitter; null: as in `views`", at_least=0, at_most=1
    )
    grey: float | list[float] | None = setting(
        None, "Probability of greyscale; null: as in `views`", at_least=0, at_most=1
    )
    blur: float | list[float] | None = setting(
        None, "Probability of Gaussian blur; null: as in `views`", at_least=0, at_most=1
    )
    solarise: float | list[float] | None = setting(
        None, "Probability of solarisation; null: as in `views`", at_least=0, at_most=1
    )
    mean: list[float] = setting(
        [],
        "Mean per channel on a 0-1 scale; empty: ImageNet's for RGB, else 0.5",
        at_least=0,
        at_most=1,
    )
    std: list[float] = setting(
        [], "Standard deviation per channel; empty: ImageNet's for RGB, else 0.25", at_most=10
    )
    resident: Literal["auto", "device", "memory", "off"] = setting(
        "auto",
        "Hold all images decoded on the device or in memory, or stream them through workers; "
        "auto: what fits",
    )
    resident_budget: float = setting(
        4.0, "GiB that auto may fill with decoded images", at_least=0, at_most=65536
    )
    num_workers: int = setting(
        -1,
        "Processes that decode streamed images; -1: one per core left",
        at_least=-1,
        at_most=1024,
    )
    streams: int = setting(
        64,
        "Streams that shards are dealt to, of which each batch takes equal parts; taken is the "
        "largest number of them that divides the batch",
        at_least=1,
        at_most=65536,
    )
    window: int = setting(
        1024,
        "Images of a stream of shards among which their order is shuffled",
        at_least=1,
        at_most=2**24,
    )
    cache_gib: float = setting(
        100.0,
        "GiB of shards from a store, or of images from Parquet, that a machine keeps on its disk",
        above=0,
        at_most=2**20,
    )
    max_bad_fraction: float = setting(
        0.0, "Share of unreadable images that is skipped, not an error", at_least=0, at_most=1
    )
    worker_timeout: float = setting(
        300.0,
        "Seconds to wait for a worker's batch before the run stops; 0: for ever",
        at_least=0,
        at_most=604_800,  # a week; a timer refuses what is far beyond
    )


@dataclass
class TrainerConfig:
    """The fields of Lightning's Trainer that matter here, under its names."""

    max_epochs: int | Auto = setting(
        200,
        "Passes over the images; auto: what fits into run.minutes",
        at_least=1,
        at_most=MOST_EPOCHS,
    )
    max_steps: int = setting(
        -1,
        "Stop after so many optimiser steps; -1: after max_epochs",
        at_least=-1,
        at_most=MOST_STEPS,
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "Hardware to run on")
    devices: int = setting(
        0, "Devices per machine; 0: all GPUs, or one CPU process", at_least=0, at_most=1024
    )
    num_nodes: int = setting(
        1,
        "Machines; torchrun or srun tells them, and a number above 1 must be theirs",
        at_least=1,
        at_most=65536,
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = setting(
        "auto", "Arithmetic of the encoders; auto: bf16-mixed where the hardware is fast at it"
    )
    accumulate_grad_batches: int = setting(
        1, "Batches per optimiser step", at_least=1, at_most=65536
    )
    log_every_n_steps: int = setting(
        50, "Steps between two rows of metrics.csv", at_least=1, at_most=MOST_STEPS
    )
    deterministic: bool = setting(False, "Only deterministic kernels; slower on a GPU")


@dataclass
class RunConfig:
    """Where a run lives, what it records and when it saves."""

    dir: str = setting("", "Run directory; empty: runs/RECIPE-DATE-TIME")
    seed: int = setting(0, "Seed of weights, order and views", at_least=0, at_most=2**32 - 1)
    minutes: float = setting(
        0.0,
        "Time that a new run may train, from which trainer.max_epochs auto follows: at the start, "
        "or with optim.schedule stable as it trains; 0: none",
        at_least=0,
        at_most=1_000_000,
    )
    plan: bool = setting(
        False, "Try some steps, tell what was decided and how long the run would take, and end"
    )
    checkpoint_every: int = setting(
        0,
        "Steps between checkpoints; 0: by the clock alone, -1: at the end of each epoch",
        at_least=-1,
        at_most=MOST_STEPS,
    )
    checkpoint_minutes: float = setting(
        10.0, "Minutes between checkpoints besides; 0: none", at_least=0, at_most=1_000_000
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints that are kept", at_least=1, at_most=MOST_STEPS
    )
    knn_every: int = setting(
        10,
        "Epochs between readings of kNN and of quality without labels, besides the first and the "
        "last; 0: none",
        at_least=0,
        at_most=MOST_EPOCHS,
    )
    held_out: int = setting(
        512,
        "Images that a set without a test split is trained without, to measure quality on: a tenth "
        "of it at most, and none of a set below 640 images; 0: none",
        at_least=0,
        at_most=MOST_ROWS,
    )
    select: Literal["", "knn_top1", "rankme", "lidar", "alignment", "uniformity", "retrieval"] = (
        setting("", "Reading by which the best checkpoint is kept as best.ckpt; empty: none is")
    )
    knn_root: str = setting(
        "",
        "Labelled folder of its own for kNN readings, with train/CLASS/ and test/CLASS/; empty: "
        "data.root",
    )
    knn_first: bool = setting(True, "Read kNN of the network as it starts, too")
    knn_bank: int = setting(
        100_000,
        "Training images whose labels may vote, drawn by run.seed from a larger set; 0: all",
        at_least=0,
        at_most=MOST_ROWS,
    )
    knn_layer: Literal["backbone", "head"] = setting("backbone", "Whose output kNN reads")
    knn_k: int = setting(200, "Neighbours that vote", at_least=1, at_most=MOST_ROWS)
    knn_temperature: float = setting(
        0.1, "Each neighbour votes exp(similarity / temperature)", above=0, at_most=100
    )
    report: bool = setting(
        True, "At the end, write report.html: what was run, what was learnt, what to change"
    )
    tensorboard: bool = setting(False, "Also write TensorBoard events to the run directory")
    wandb: bool = setting(False, "Also log to Weights & Biases; without a key it stays offline")
    wandb_project: str = setting("moco", "Weights & Biases project")
    mlflow: bool = setting(
        False, "Also log to MLflow: to $MLFLOW_TRACKING_URI, else to mlflow.db in the run directory"
    )


@dataclass
class TrainConfig:
    """Everything that `train.py` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def ends_by_clock(self) -> bool:
        """Tell whether the length of a new run is fixed while it trains (`moco.training.clock`)."""
        has_no_length = self.trainer.max_epochs == "auto" and self.trainer.max_steps < 0
        return has_no_length and self.optim.schedule == "stable" and self.optim.decay_share < 1

    def undecided(self) -> list[str]:
        """Name the settings that are left to `moco.training.autoconfigure`."""
        return [name for name in AUTOMATIC if self.value(name) == "auto"]

    def value(self, name: str) -> Any:
        """Return the setting of a dotted name, as data.batch_size."""
        group, _, field = name.partition(".")
        return getattr(getattr(self, group), field)

    def changed(self, settings: dict[str, Any]) -> TrainConfig:
        """Return a copy with other values of some settings, given by their dotted names."""
        groups = {name: vars(group) for name, group in vars(self).items()}
        for name, value in settings.items():
            group, _, field = name.partition(".")
            groups[group] = groups[group] | {field: value}
        return TrainConfig(**{name: type(getattr(self, name))(**v) for name, v in groups.items()})

    @classmethod
    def from_dict(cls, stored: dict[str, dict[str, Any]]) -> TrainConfig:
        """Rebuild from `dataclasses.asdict`, as a checkpoint of any version stores it.

        What the checkpoint does not know gets its default; what is gone is left out.
        """
        stored = with_former_ways(stored)
        gone = unknown_settings(stored)
        groups = {}
        for group, kind in get_type_hints(cls).items():
            fields = stored.get(group, {}).items()
            groups[group] = kind(**{k: v for k, v in fields if f"{group}.{k}" not in gone})
        return cls(**groups)


# What may be left to the images, the hardware and the time, in the order of the decisions.
AUTOMATIC = (
    "data.channels",
    "data.image_size",
    "data.views",
    "model.stem",
    "model.backbone",
    "model.width",
    "data.batch_size",
    "model.queue_size",
    "optim.lr",
    "trainer.max_epochs",
)


def with_former_ways(stored: dict[str, Any]) -> dict[str, Any]:
    """Add to stored settings what an older version did before there was a setting for it."""
    data, run = stored.get("data"), stored.get("run")
    former = {"exif": "ignore", "reduce_jpegs": False}
    stored = stored | {"data": former | data} if isinstance(data, dict) else stored
    if isinstance(run, dict):
        run = {"held_out": 0} | run
        stored = stored | {"run": run}
    if isinstance(run, dict) and not (run.get("checkpoint_every") or run.get("checkpoint_minutes")):
        stored = stored | {"run": run | {"checkpoint_every": -1}}  # the ends of epochs
    return stored


def unknown_settings(stored: dict[str, dict[str, Any]]) -> list[str]:
    """Name the fields of stored settings that are no settings, as those of an older version."""
    hints = get_type_hints(TrainConfig)
    known = {f"{group}.{item.name}" for group in hints for item in dataclasses.fields(hints[group])}
    names = [f"{group}.{field}" for group, fields in stored.items() for field in fields]
    return [name for name in names if name not in known]


def per_view(value: float | list[float], name: str = "") -> tuple[float, float]:
    """Return a setting of the views as two values, one for each view.

    Raises:
        UserError: A list that has neither one value nor two.
    """
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 2):
        raise UserError(f"{name} is {value}: give one value, or two, one for each view")
    return values[0], values[-1]
