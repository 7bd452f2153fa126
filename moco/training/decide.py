"""What `auto` means here, and what cannot work here: decided and refused before the first step.

Shapes: W devices over all machines.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from moco.config import TrainConfig, UserError

WORTH_COMPILING = 3000  # steps on a GPU; an estimate, 20 ms won at each against a minute


def choose_devices(config: TrainConfig) -> int:
    """Decide how many processes each machine runs, from the settings or from torchrun's and SLURM's
    environment.

    Raises:
        UserError: Devices that do not exist.
    """
    trainer = config.trainer
    gpus = torch.cuda.device_count()
    on_gpu = accelerator(config) == "cuda"
    if trainer.accelerator == "gpu" and not gpus:
        raise UserError(
            "trainer.accelerator is gpu but torch sees none: use cpu or auto, or mend the driver"
        )
    available = gpus if on_gpu else (os.cpu_count() or 1)
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "0")))
    if launched and trainer.devices not in (0, launched):
        raise UserError(
            f"trainer.devices is {trainer.devices} but {launched} processes were launched: "
            "leave it out"
        )
    if launched and "WORLD_SIZE" in os.environ:
        trainer.num_nodes = max(1, int(os.environ["WORLD_SIZE"]) // launched)
    devices = trainer.devices or launched or (gpus if on_gpu else 1)
    if devices > available:
        kind = "GPUs" if on_gpu else "CPU cores"
        raise UserError(f"trainer.devices is {devices} but there are {available} {kind}: lower it")
    return devices


def check_shares(config: TrainConfig, world: int) -> None:
    """Raise UserError when the batch does not divide as the devices and groups need it."""
    batch, model = config.data.batch_size, config.model
    if "sync" in (model.key_bn, model.query_bn) and world > 1 and accelerator(config) == "cpu":
        raise UserError(
            "model.key_bn or query_bn is sync on CPUs, where torch has none: use shuffle"
        )
    parts, why = world, f"{world} devices"
    if model.key_bn == "shuffle":
        parts, why = world * world, f"{world} devices, {world} equal blocks on each to shuffle keys"
    if "split" in (model.key_bn, model.query_bn):
        parts, why = (
            world * model.bn_splits,
            f"{world} devices x {model.bn_splits} BatchNorm groups",
        )
    if batch % parts:
        near = max(parts, batch // parts * parts)
        raise UserError(f"data.batch_size {batch} does not divide by {parts} ({why}): take {near}")
    smallest = batch // (parts if parts != world * world else world)
    if smallest < 2:
        raise UserError(
            f"data.batch_size {batch} leaves {smallest} image in a BatchNorm group ({why}): "
            f"take {2 * parts}"
        )


def check_queue(config: TrainConfig, count: int) -> None:
    """Raise UserError when the queue would hold an image's keys of the same epoch twice."""
    if config.model.queue_size > count:
        batch = config.data.batch_size
        most = max(count // batch * batch, batch)
        raise UserError(
            f"model.queue_size {config.model.queue_size} is above the {count} images of the "
            "data set, so that "
            f"images would meet their own older keys as negatives: take {most} or less"
        )


def choose_key_bn(key_bn: str, world: int) -> tuple[str, str]:
    """Decide what `auto` means, and say why."""
    if key_bn != "auto":
        return key_bn, "as set"
    if world > 1:
        return "shuffle", f"auto: {world} devices, each normalises keys of all"
    return "split", "auto: one device, so its batch is split into groups for the keys"


def choose_compile(config: TrainConfig, steps: int) -> tuple[str, str]:
    """Decide which backend of torch.compile serves, empty for none, and say why.

    Args:
        steps: Of the run: a short one does not win back the time that compiling takes.

    Raises:
        UserError: Asked for, and no compiler is there.
    """
    wanted, on_gpu = config.model.compile, accelerator(config) == "cuda"
    if wanted == "off" or (wanted == "auto" and not on_gpu):
        return "", "as set" if wanted == "off" else "auto: a CPU gains little"
    if wanted == "auto" and steps < WORTH_COMPILING:
        return "", f"auto: not worth a minute before {steps} steps"
    missing = missing_compiler(on_gpu)
    if missing and wanted == "on":
        raise UserError(f"model.compile is on but there is no {missing}: install it, or take off")
    if missing:
        return "", f"auto: there is no {missing}, with one this would run faster"
    return "inductor", "as set" if wanted == "on" else "auto: a GPU"


def missing_compiler(on_gpu: bool) -> str:
    """Name what torch.compile needs and does not find; empty if all is there."""
    from torch.utils._triton import has_triton

    if on_gpu and not has_triton():
        return "Triton"
    if on_gpu and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h (python3-dev)"
    names = ("gcc", "cc", "clang") if on_gpu else ("g++", "c++", "clang++")
    known = os.environ.get("CC" if on_gpu else "CXX")
    return "" if known or any(map(shutil.which, names)) else "C or C++ compiler"


def choose_precision(config: TrainConfig) -> str:
    """Decide what `auto` means: bf16 where the hardware multiplies it natively.

    Raises:
        UserError: fp16 on a CPU.
    """
    precision, on_gpu = config.trainer.precision, accelerator(config) == "cuda"
    if precision == "16-mixed" and not on_gpu:
        raise UserError(
            "trainer.precision is 16-mixed on a CPU, which has no fp16: use bf16-mixed or 32-true"
        )
    if precision != "auto":
        return precision
    if on_gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def accelerator(config: TrainConfig) -> str:
    """Return cuda where a GPU is there and not refused, else cpu."""
    gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return "cuda" if gpu else "cpu"


def own_device(config: TrainConfig) -> torch.device:
    """Return this process's device before Lightning has set up."""
    if accelerator(config) == "cpu":
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(local) % max(1, torch.cuda.device_count()))
