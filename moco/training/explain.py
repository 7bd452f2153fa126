"""Explanations: what a library raised during training, as one line that says what to set.

When this room is entered the run has failed, and Lightning has moved the module to the CPU: the
device is free to measure on, and nothing here may wait for other ranks.
Shapes: N images per device, K queue, C embedding, S side of a view.
"""

from __future__ import annotations

import copy
import math
import traceback
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import normalize

from moco.algorithm.contrast import info_nce
from moco.config import DataConfig, RunError, TrainConfig, UserError
from moco.training.monitor import KNNMonitor
from moco.training.quality import Quality
from moco.training.shares import batch_unit

_NO_ENGINE = "unable to find an engine to execute"  # cuDNN's, for want of room, or it is broken
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", _NO_ENGINE)
_LOST = ("onnection closed", "onnection reset", "Broken pipe", "NCCL", "gloo")


def fit(trainer: pl.Trainer, module: Any, data: Any, **options: Any) -> None:
    """Run Lightning's loop; turn what ends it before its time into one line.

    Args:
        data: The `PretrainData`, whose workers are ended.
        options: Of `Trainer.fit`.
    """
    try:
        trainer.fit(module, datamodule=data, **options)
    except (UserError, RunError):
        raise
    except SystemExit:  # Lightning's answer to KeyboardInterrupt
        raise KeyboardInterrupt from None
    except Exception as error:
        raise explain(error, trainer, module, data.config) from error
    finally:
        data.close()


def explain(error: Exception, trainer: pl.Trainer, module: Any, data: DataConfig) -> Exception:
    """Turn what a library raised during training into a RunError; other errors stay."""
    text = " ".join(str(error).split())
    memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    if (memory or _is_out_of_memory(error)) and (what := _what_was_read(error)):
        return _full_in_reading(trainer, what)
    if _is_out_of_memory(error):
        # The failed step's activations hang on the frames that the error remembers.
        traceback.clear_frames(error.__traceback__)
        share = data.batch_size // trainer.world_size
        fits = fitting_batch(trainer, module, share, data) * trainer.world_size
        if not fits and _NO_ENGINE in text:
            return error
        advice = f"about {fits} would fit" if fits else "not even a small one would fit"
        return RunError(
            f"out of memory on {trainer.strategy.root_device} with data.batch_size "
            f"{data.batch_size}, {share} per device: {advice}; or set trainer.precision "
            f"bf16-mixed, a smaller model.backbone, or {_in_parts(module, data)}",
            local=True,
        )
    if memory:
        return RunError(
            f"memory ran out with data.batch_size {data.batch_size}: lower it, data.num_workers or "
            "data.resident_budget, or set data.resident off",
            local=True,
        )
    if trainer.world_size > 1 and any(words in text for words in _LOST):
        return RunError(
            f"another rank died or cannot be reached ({text[:120]}): go on with --resume from the "
            "last checkpoint",
            local=True,
        )
    return error


def _in_parts(module: Any, data: DataConfig) -> str:
    """Say how a step takes its images in smaller parts; without a queue, parts are other losses."""
    chunks = f"data.chunks {2 * data.chunks} with the same batch"
    queued = module.model_config.queue_size > 0
    return (
        f"a smaller batch with trainer.accumulate_grad_batches, or {chunks}" if queued else chunks
    )


def _what_was_read(error: Exception) -> str:
    """Say what was read while an error was raised; empty where nothing was."""
    frames = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    readings = {"kNN": KNNMonitor.judge, "quality": Quality.read}
    return next((name for name, read in readings.items() if read.__code__ in frames), "")


def _full_in_reading(trainer: pl.Trainer, what: str) -> RunError:
    judge = {"kNN": "eval_knn.py", "quality": "moco quality, which needs no labels"}[what]
    return RunError(
        f"out of memory on {trainer.strategy.root_device} while {what} was read after step "
        f"{trainer.global_step}: set data.resident memory or off if the images lie on the "
        "device, or run.knn_every 0 (a resumed run may change both) and judge the checkpoint "
        f"with {judge}",
        local=True,
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def fitting_batch(trainer: pl.Trainer, module: Any, tried: int, data: DataConfig) -> int:
    """Measure which batch per device fits, or return 0 where nothing below `tried` does.

    The memory of a step grows along a line with the batch, so two small steps are enough. Where
    they are not small enough, smaller ones are tried; all have whole groups for BatchNorm.
    """
    world = trainer.world_size
    unit = batch_unit(TrainConfig(model=module.model_config, data=data), world) // world
    small, low = tried, None
    while low is None and small > unit:
        small = small // 8 // unit * unit or unit
        low = _measured(trainer, module, small, data)
    if low is None:
        return 0
    high = _measured(trainer, module, 2 * small, data) if 2 * small < tried else None
    if high is None:
        return small
    slope = max(high - low, 1) / small
    room = 0.9 * device_memory(trainer.strategy.root_device) - low
    most = min(int(small + room / slope), tried - 1)
    even = math.lcm(8, unit)
    return max(small, most // even * even or most // unit * unit)


def _measured(trainer: pl.Trainer, module: Any, count: int, data: DataConfig) -> int | None:
    """Return `peak_memory`, or None where it is more than there is."""
    try:
        return peak_memory(trainer, module, count, data)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            return None
        raise


def peak_memory(trainer: pl.Trainer, module: Any, count: int, data: DataConfig) -> int:
    """Return the most bytes that a step on `count` images takes: forward, loss and backward.

    It runs on copies of the encoders, since hooks of DistributedDataParallel would wait for other
    ranks. So would SyncBatchNorm, which is put into eval mode.
    """
    device, model = trainer.strategy.root_device, module.model_config
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    query_side = nn.Sequential(module.query_encoder, module.predictor)
    encoders = nn.ModuleList([query_side, module.key_encoder])
    encoders = copy.deepcopy(encoders).to(device)
    for layer in encoders.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.eval()
    parameters = sum(p.nbytes for p in encoders[0].parameters())
    state = torch.empty(  # of the optimiser
        parameters * (2 if module.optim_config.name == "adamw" else 1),
        dtype=torch.uint8,
        device=device,
    )
    size_of_queue = model.queue_size * model.queues or count * trainer.world_size
    negatives = torch.zeros(size_of_queue, model.embedding_dim, device=device)
    pairs = 1 if model.symmetric == "none" else 2
    size = data.view_side
    views = [torch.zeros(count, data.channels, size, size, device=device) for _ in range(2)]
    parts = views[:pairs]
    if module.chunks > 1:  # the activations of one part of one view are alive at a time
        parts = [views[0][: -(-count // module.chunks)]]
    with trainer.precision_plugin.forward_context():
        queries = [normalize(encoders[0](part).float()) for part in parts]
        with torch.no_grad():
            keys = [normalize(encoders[1](part).float()) for part in parts]
        losses = [
            info_nce(query, key, negatives, model.temperature)[0]
            for query, key in zip(queries, keys, strict=True)
        ]
    torch.stack(losses).sum().backward()
    del state
    return torch.cuda.max_memory_allocated(device)


def device_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that this process has or could have."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
