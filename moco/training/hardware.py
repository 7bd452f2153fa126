"""What this machine has, and what the settings can have of it: devices, arithmetic, a compiler.

torch takes seconds to import, so each function asks it only where the answer depends on it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from moco.config import TrainConfig, UserError

if TYPE_CHECKING:
    import torch

# What drivers make where there is a GPU: NVIDIA's, Jetson's, AMD's, and Windows' below Linux.
_DEVICE_FILES = ("nvidiactl", "nvidia0", "nvhost-gpu", "nvgpu", "kfd", "dxg")
WORTH_COMPILING = 3000  # steps on a GPU; an estimate, 20 ms won at each against a minute


def choose_devices(config: TrainConfig) -> tuple[int, int]:
    """Decide how many processes each machine runs, and on how many machines.

    Processes that were started together are what they are, and settings that ask for other numbers
    are refused; a process alone starts as many as the settings ask for.

    Raises:
        UserError: Devices that do not exist, or others than were started.
    """
    trainer = config.trainer
    gpus = count_gpus(trainer.accelerator)
    on_gpu = accelerator(config) == "cuda"
    _check_gpu(trainer.accelerator, gpus)
    available = gpus if on_gpu else (os.cpu_count() or 1)
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if launched and trainer.devices not in (0, launched):
        raise UserError(
            f"trainer.devices is {trainer.devices} but {launched} of the started processes run on "
            "this machine: give --trainer.devices 0 (of a run that goes on, config.yaml has it)"
        )
    num_nodes = int(os.environ["WORLD_SIZE"]) // launched if launched else 1
    if trainer.num_nodes not in (1, num_nodes):
        raise UserError(
            f"trainer.num_nodes is {trainer.num_nodes} but processes were started on {num_nodes}: "
            "start train.py on every machine with torchrun or srun"
        )
    devices = trainer.devices or launched or (gpus if on_gpu else 1)
    if on_gpu and launched > available == 1:
        raise UserError(
            f"{launched} processes were started here and each sees one GPU: give SLURM "
            "--gpus-per-node in the place of --gpus-per-task, so that each sees all"
        )
    if devices > available:
        kind = "GPUs" if on_gpu else "CPU cores"
        if launched:
            raise UserError(
                f"{launched} processes were started here and there are {available} {kind}: start "
                "fewer (--nproc-per-node of torchrun, --ntasks-per-node of srun)"
            )
        raise UserError(f"trainer.devices is {devices} but there are {available} {kind}: lower it")
    return devices, num_nodes


def _check_gpu(wanted: str, gpus: int) -> None:
    """Raise UserError where a GPU is asked for by name and there is none."""
    if wanted != "gpu" or gpus:
        return
    if sys.platform == "darwin":
        raise UserError("trainer.accelerator is gpu, but Apple's (MPS) is not supported: use cpu")
    raise UserError(
        "trainer.accelerator is gpu but torch sees none: use cpu or auto, or mend the driver"
    )


def choose_compile(config: TrainConfig, steps: int) -> tuple[str, str]:
    """Decide which backend of torch.compile serves, empty for none, and say why.

    Args:
        steps: Of the run; a short run does not win back the time that compiling takes.

    Raises:
        UserError: Compiling is asked for, and there is no compiler.
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
    """Name the first program that torch.compile needs and does not find; empty where it has all."""
    from torch.utils._triton import has_triton

    if on_gpu and not has_triton():
        return "Triton"
    if on_gpu and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h (python3-dev)"
    names = ("gcc", "cc", "clang") if on_gpu else ("g++", "c++", "clang++")
    known = os.environ.get("CC" if on_gpu else "CXX")
    return "" if known or any(map(shutil.which, names)) else "C or C++ compiler"


def choose_precision(config: TrainConfig) -> tuple[str, str]:
    """Decide what `auto` means, and say why: bf16 where the hardware multiplies it natively, fp16
    on the GPUs before, which have tensor cores for that alone (V100, T4).

    Raises:
        UserError: fp16 on a CPU, or in the place of a GPU that is asked for and not there.
    """
    precision, on_gpu = config.trainer.precision, accelerator(config) == "cuda"
    if precision == "16-mixed" and not on_gpu:
        _check_gpu(config.trainer.accelerator, 0)
        raise UserError(
            "trainer.precision is 16-mixed on a CPU, which has no fp16: use bf16-mixed or 32-true"
        )
    if precision != "auto":
        return precision, "as set"
    import torch

    if on_gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    if native:
        return "bf16-mixed", "auto: the hardware multiplies bf16"
    if on_gpu and torch.cuda.get_device_capability() >= (7, 0):
        return "16-mixed", "auto: the GPU multiplies fp16 and not bf16"
    return "32-true", "auto: the hardware is no faster at bf16"


def accelerator(config: TrainConfig) -> str:
    """Return cuda where a GPU is there and not refused, else cpu."""
    if not _may_have_gpus(config.trainer.accelerator):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def count_gpus(wanted: str) -> int:
    """Count the GPUs that this process may take: none where `wanted`, an accelerator, is cpu."""
    if not _may_have_gpus(wanted):
        return 0
    import torch

    return torch.cuda.device_count()


def _may_have_gpus(wanted: str) -> bool:
    """Tell whether torch must be asked: not where no driver has made a device."""
    is_there = any(os.path.exists(f"/dev/{name}") for name in _DEVICE_FILES)
    return wanted != "cpu" and ("torch" in sys.modules or is_there)


def name_device(kind: str) -> str:
    """Name the hardware of an accelerator, cuda or cpu, for people."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):  # Linux alone has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def own_device(config: TrainConfig) -> torch.device:
    """Return the device that Lightning will give to this process."""
    import torch

    if accelerator(config) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def free_memory() -> None:
    """Give back what nobody uses any more: Lightning's parts refer to each other in circles."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
