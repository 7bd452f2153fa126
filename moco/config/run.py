"""Settings of a run: its length, devices and precision, what it reads, keeps and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco.config.setting import MOST_EPOCHS, MOST_ROWS, MOST_STEPS, Auto, setting


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
        "auto",
        "Arithmetic of the encoders; auto: bf16-mixed where the hardware multiplies it natively, "
        "16-mixed on GPUs whose tensor cores take fp16 alone, else 32-true",
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

    dir: str = setting("", "Run directory; empty: runs/RECIPE-DATE-TIME-MICROSECONDS")
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
        "of it at most, and none of a set below 640 images, of shards, or with run.knn_root; 0: "
        "none",
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
    knn_first: bool = setting(
        True, "Measure the network as it starts, too: kNN, and quality without labels"
    )
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
