"""Every setting of training: its meaning, unit, range, default and source.

Settings are declared here and nowhere else (those of evaluation and export in `judge_config`): the
command line, its help, the checks and what a checkpoint stores are derived from these dataclasses,
one room for each of `algorithm`, `data` and `run`. Fields are flat primitives, so that a checkpoint
loads with ``weights_only=True``. `moco.command.cli` turns a command line into a `TrainConfig`.
These rooms import nothing heavy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from moco.config.algorithm import ModelConfig, OptimConfig
from moco.config.data import DataConfig
from moco.config.run import RunConfig, TrainerConfig
from moco.config.setting import RunError, UserError

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "RunError",
    "TrainConfig",
    "TrainerConfig",
    "UserError",
]


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

    def flat(self) -> dict[str, Any]:
        """Return the value of each setting by its dotted name."""
        groups = dataclasses.asdict(self).items()
        return {f"{group}.{name}": value for group, own in groups for name, value in own.items()}

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
    "data.image_size_end",
    "data.views",
    "model.stem",
    "model.backbone",
    "model.width",
    "optim.name",
    "data.batch_size",
    "model.queue_size",
    "optim.lr",
    "trainer.max_epochs",
)


def with_former_ways(stored: dict[str, Any]) -> dict[str, Any]:
    """Add to stored settings what an older version did before there was a setting for it."""
    data, run = stored.get("data"), stored.get("run")
    if isinstance(data, dict):
        stored = stored | {"data": {"exif": "ignore", "reduce_jpegs": False} | data}
    if isinstance(run, dict):
        run = {"held_out": 0} | run
        if not (run.get("checkpoint_every") or run.get("checkpoint_minutes")):
            run["checkpoint_every"] = -1  # the ends of epochs
        stored = stored | {"run": run}
    return stored


def unknown_settings(stored: dict[str, dict[str, Any]]) -> list[str]:
    """Name the fields of stored settings that are no settings, as those of an older version."""
    hints = get_type_hints(TrainConfig)
    known = {f"{group}.{item.name}" for group in hints for item in dataclasses.fields(hints[group])}
    names = [f"{group}.{field}" for group, fields in stored.items() for field in fields]
    return [name for name in names if name not in known]
