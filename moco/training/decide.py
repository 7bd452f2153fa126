"""Decisions before the first step: what `auto` means on this machine, and what cannot work on it.

Settings stay as the user gave them. What they came to is a `Decided`; config.yaml and every
checkpoint hold it, and a resumed run keeps of it whatever changes a number.
Shapes: W devices over all machines.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field, replace
from typing import Any

from moco.config import ModelConfig, TrainConfig, UserError
from moco.training import hardware
from moco.training.shares import check_shares

log = logging.getLogger("moco")


@dataclass
class Decided:
    """What the settings came to, in plain values.

    Attributes:
        accelerator: cuda or cpu.
        devices, num_nodes: Processes per machine, and machines.
        precision, key_bn, query_bn: As the settings of these names, never auto; query_bn is empty
            in a checkpoint of the first version, whose settings say it.
        compile: Backend of torch.compile; empty: nothing is compiled.
        resident: Where the images are held: device, memory, or streamed; empty until they are read.
        reasons: Name of an attribute to why.
        min_value, max_value: What becomes black and white in files of more than 8 bits, one value
            or one per channel; empty where the images need none.
        is_open: Whether the clock has still to fix how long the run is (`moco.training.clock`).
        held_out: Images that were set aside; None where a version has not noted it.
        images: How many are trained on, of resident ones those that could be read; None as above.
        pairs: Checksum of which images show the same thing; None without pairs, and as above.
    """

    accelerator: str
    devices: int
    num_nodes: int
    precision: str
    key_bn: str
    compile: str
    resident: str = ""
    query_bn: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    min_value: list[float] = field(default_factory=list)
    max_value: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    is_open: bool = False
    held_out: int | None = None
    images: int | None = None
    pairs: int | None = None

    @property
    def world(self) -> int:
        """Processes over all machines, W."""
        return self.devices * self.num_nodes

    @classmethod
    def from_dict(cls, stored: Any) -> Decided | None:
        """Rebuild from `dataclasses.asdict`; None where a version kept something else."""
        known = {item.name for item in dataclasses.fields(cls)}
        newer = {"query_bn", "min_value", "max_value", "settings", "is_open", "held_out", "images"}
        newer |= {"pairs"}
        needed = known - newer
        fits = isinstance(stored, dict) and needed <= stored.keys() <= known
        return cls(**stored) if fits else None


def decide(
    config: TrainConfig, steps: int, before: Decided | None = None, asked: TrainConfig | None = None
) -> Decided:
    """Decide all that is left to `auto`, but `resident`, which reading the images decides.

    Args:
        steps: Of the run.
        before: What a resumed run has decided; None for a new run.
        asked: The settings of the resumed run as they were stored. Where `config` names another
            model.compile or data.resident, the user wants it so.

    Raises:
        UserError: Devices, precision or shares that cannot work here.
    """
    devices, num_nodes = hardware.choose_devices(config)
    world, resident = devices * num_nodes, ""
    wanted = config
    if before and asked:
        wanted = _as_before(config, before, asked, world)
        if config.data.resident == asked.data.resident:
            resident = _resident_here(config, before)
    precision, why_precision = hardware.choose_precision(wanted)
    model, synced = wanted.model, hardware.accelerator(config) == "cuda"
    key_bn, why_key_bn = choose_key_bn(model.key_bn, world, model.queue_size > 0, synced)
    query_bn, why_query_bn = choose_query_bn(model.query_bn, world, synced)
    backend, why_compile = hardware.choose_compile(wanted, steps)
    is_auto = config.data.resident == "auto"
    resides = "auto: what fits into data.resident_budget" if is_auto else "as set"
    if config.data.dataset in ("shards", "parquet"):
        resides = "shards always are"
    reasons = {"precision": why_precision, "key_bn": why_key_bn, "query_bn": why_query_bn}
    reasons |= {"compile": why_compile, "resident": resides}
    chosen = precision, key_bn, backend, resident, query_bn
    decided = Decided(hardware.accelerator(config), devices, num_nodes, *chosen, reasons)
    if before:
        decided.min_value, decided.max_value = before.min_value, before.max_value
        decided.is_open = before.is_open
        kept = [name for name in reasons if getattr(decided, name) == getattr(before, name)]
        reasons.update(dict.fromkeys(kept, "as the run began"))
    check_shares(config, world, key_bn, query_bn)
    return decided


def _as_before(config: TrainConfig, before: Decided, asked: TrainConfig, world: int) -> TrainConfig:
    """Return the settings with what a resumed run has decided in the place of `auto`.

    Raises:
        UserError: This machine cannot go on with it.
    """
    on_gpu, compiled = hardware.accelerator(config) == "cuda", config.model.compile
    if before.precision == "16-mixed" and not on_gpu:
        raise UserError(
            "--resume: the run computes in 16-mixed, which no CPU can: go on where there is a GPU, "
            "or start a new run with --init_from and trainer.precision bf16-mixed"
        )
    if before.key_bn == "shuffle" and world == 1 < before.world:
        raise UserError(
            f"--resume: the run shuffles keys over {before.world} devices, and on one device that "
            "would hide nothing: go on with trainer.devices 2 or more, or start a new run with "
            "--init_from and model.key_bn split"
        )
    if "sync" in (before.key_bn, before.query_bn) and world > 1 and not on_gpu:
        raise UserError(
            "--resume: the run's BatchNorm is sync, which torch has not on several CPU processes: "
            "go on with GPUs or one process, or start a new run with --init_from"
        )
    if compiled == asked.model.compile:
        compiled = "on" if before.compile else "off"
        if before.compile and (missing := hardware.missing_compiler(on_gpu)):
            raise UserError(
                f"--resume: the run's encoders are compiled and there is no {missing}: install it, "
                "or give --model.compile off, which changes the last digits of numbers"
            )
    if world != before.world:
        log.info(
            "the run began on %d devices and goes on on %d: with the same batches, though not to "
            "the same bits",
            before.world,
            world,
        )
    trainer = replace(config.trainer, precision=before.precision)
    query_bn = before.query_bn or config.model.query_bn
    model = replace(config.model, key_bn=before.key_bn, query_bn=query_bn, compile=compiled)
    return replace(config, trainer=trainer, model=model)


def check_held(decided: Decided, before: Decided) -> None:
    """Raise UserError where a resumed run would read its images in another way than it began.

    Args:
        decided: What was done with the images.
        before: What the run has decided.
    """
    kinds = {"": "", "streamed": "streamed", "memory": "resident", "device": "resident"}
    now, then = kinds[decided.resident], kinds[before.resident]
    if then and now != then:
        raise UserError(
            f"--resume: the run's images are {then}, and {now} ones are cut from other numbers: "
            "leave data.resident out, or start a new run with --init_from"
        )
    if before.images not in (None, decided.images):
        raise UserError(
            f"--resume: {decided.images} images can be read, and the run has {before.images}, so "
            "each epoch would have other batches: see bad_files.txt in the run directory and put "
            "the files back as they were, or start a new run with --init_from"
        )
    if before.pairs not in (None, decided.pairs):
        raise UserError(
            "--resume: data.pairs names other images as showing the same thing than when the run "
            "began: give the table or the function of then, or start a new run with --init_from"
        )


def _resident_here(config: TrainConfig, before: Decided) -> str:
    """Say where a resumed run holds its images; device and memory give the same numbers.

    A run that has kept them off its GPU does so for want of room, and is compiled in parts there.
    """
    if before.resident == "streamed" or config.data.resident != "auto":
        return before.resident
    here = hardware.accelerator(config)
    if here == before.accelerator:
        return before.resident
    return "device" if here == "cuda" else "memory"


def choose_key_bn(key_bn: str, world: int, queued: bool, synced: bool) -> tuple[str, str]:
    """Decide what `auto` means for the keys' BatchNorm, and say why.

    Args:
        key_bn: As set.
        world: Devices; on one there is no other to shuffle with.
        queued: Whether the negatives are queued keys.
        synced: Whether BatchNorm can reach over several devices.
    """
    if key_bn == "shuffle" and world == 1:
        return "split", "shuffle as set would hide nothing on one device: groups stand for devices"
    if key_bn == "auto" and not queued:
        key_bn, why = "sync", "auto: no queue, so nothing is hidden from it"
    elif key_bn == "auto" and world > 1:
        return "shuffle", f"auto: {world} devices, each normalises keys of all"
    elif key_bn == "auto":
        return "split", "auto: one device, so its batch is split into groups for the keys"
    else:
        why = "as set"
    return choose_query_bn(key_bn, world, synced, why)


def choose_query_bn(kind: str, world: int, synced: bool, why: str = "as set") -> tuple[str, str]:
    """Decide the queries' BatchNorm, and say why; arguments as of `choose_key_bn`."""
    if kind == "sync" and world > 1 and not synced:
        return "plain", "torch has no sync on CPUs: each device has statistics of its own"
    return kind, why


def views_for(model: ModelConfig, key_bn: str) -> dict[str, bool]:
    """Return the arguments of `PretrainData` that follow from the model and its decided key_bn."""
    return {"shuffle": key_bn in ("shuffle", "split"), "symmetric": model.symmetric != "none"}
