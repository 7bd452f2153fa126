"""Autoconfiguration: settings left to `auto` that follow from the images and the hardware.

What a setting comes to stands in `Decided.settings`, with its reason, so that a run can be repeated
and resumed as it was. The rules are few and plain; BENCHMARKS.md says where they were measured.
Shapes: M images in the set, B global batch, K queue, W devices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moco.config import TrainConfig
from moco.config.setting import LEAST_VIEW
from moco.training.build import steps_per_epoch, total_steps
from moco.training.shares import batch_unit

log = logging.getLogger("moco")
SIZES = (8, 16, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224)  # sides of a view that are chosen
LARGEST = {"cuda": 224, "cpu": 64}
SMALL_VIEW = 40  # pixels up to which a ResNet starts with a 3x3 convolution and no pooling
BATCH, LEAST_BATCH = 256, 16
QUEUE = {"cuda": 65536, "cpu": 4096}  # most keys
RATES = {"sgd": 0.12, "adamw": 1.5e-4, "lars": 0.3, "muon": 0.015}  # for a batch of 256
FEW_EPOCHS = 10  # with more, the part of an epoch that is left of the time does not matter
WARMUP_SHARE = 0.1  # of a run that is shorter than its warm-up


@dataclass(frozen=True)
class Facts:
    """What the settings follow from.

    Attributes:
        count: Images, M.
        side: Short side in pixels that nine in ten of the images looked at have, or more.
        channels: As the source reads them.
        accelerator: cuda or cpu.
        world: Devices, W.
        view: Side in pixels that the user's own views have; 0: there are none.
    """

    count: int
    side: int
    channels: int
    accelerator: str
    world: int
    view: int = 0


class Settings:
    """Decide one setting after another; `chosen` and `reasons` have the dotted name as key."""

    def __init__(
        self,
        config: TrainConfig,
        chosen: dict[str, Any] | None = None,
        reasons: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.chosen = dict(chosen or {})
        self.reasons = {name: why for name, why in (reasons or {}).items() if name in self.chosen}

    def take(self, name: str, value: Any, reason: str) -> None:
        """Give a setting its value, where it is left to `auto`."""
        if self.config.value(name) == "auto":
            self.replace(name, value, reason)

    def replace(self, name: str, value: Any, reason: str) -> None:
        """Give a setting another value than it was asked for."""
        self.chosen[name], self.reasons[name] = value, reason
        self.config = self.config.changed({name: value})
        log.info("%s: %s (%s)", name, value, reason)


def autoconfigure(
    config: TrainConfig, facts: Facts, given: Mapping[str, Any] = MappingProxyType({})
) -> Settings:
    """Decide all settings left to `auto` but the epochs, which the speed decides.

    Args:
        config: Settings as they were asked for.
        facts: About images and hardware.
        given: Settings that follow from the weights that a run starts from.
    """
    own = Settings(config)
    for name, value in given.items():
        own.replace(name, value, "as the weights of --init_from have it")
    own.take("data.channels", facts.channels, "what the images hold")
    _choose_views(own, facts)
    _choose_network(own, facts)
    _choose_batch(own, facts)
    return own


def _choose_views(own: Settings, facts: Facts) -> None:
    if facts.view:
        own.take("data.image_size", facts.view, "what the views give")
    most = LARGEST[facts.accelerator]
    room = min(facts.side * own.config.data.upscale, most)
    patches = own.config.model.patches  # which a view divides into
    sizes = (size for size in SIZES if size <= room and size % patches == 0)
    least = -(-LEAST_VIEW // patches)  # for smaller images, which are refused later
    size = max(sizes, default=max(int(room) // patches, least) * patches)
    why = f"the short side of nine in ten images is {facts.side} px or more"
    why += f", and a {facts.accelerator} takes {most} px at most" if facts.side > most else ""
    own.take("data.image_size", size, why)
    _choose_end(own, facts)
    size = own.config.data.image_size
    views = "cifar" if size < 64 else "v2"
    blur = "without blur, which would hide all" if size < 64 else "with blur"
    own.take("data.views", views, f"{blur} at {size} px")


def _choose_end(own: Settings, facts: Facts) -> None:
    """Choose the side of the last views, which divides into patches as all views do."""
    size, patches = own.config.data.image_size, own.config.model.patches
    end = size * 3 // 4 // patches * patches
    backbone = own.config.model.backbone
    if own.config.data.views == "own":
        end, why = 0, "own views are as large as the images unless this says otherwise"
    elif facts.accelerator != "cpu":
        end, why = 0, "smaller views are measured on CPUs alone"
    elif end < LEAST_VIEW:
        end, why = 0, "the images are small"
    elif end <= (start := own.config.data.image_size_start):
        end, why = 0, f"the first views have {start} px"
    elif backbone != "auto" and not _is_resnet(backbone):
        end, why = 0, "the backbone is no ResNet"
    else:
        why = "crops show things larger than the whole images that are judged"
    own.take("data.image_size_end", end, why)


def _choose_network(own: Settings, facts: Facts) -> None:
    size, on_gpu = own.config.data.image_size, facts.accelerator == "cuda"
    small = size <= SMALL_VIEW
    chosen = own.config.model.backbone == "auto"
    if chosen or _is_resnet(own.config.model.backbone):
        own.take("model.stem", "cifar" if small else "imagenet", f"images of {size} px")
    own.take("model.stem", "imagenet", "the backbone has a stem of its own")
    own.take(
        "model.backbone",
        "resnet18" if on_gpu else "resnet10t",
        f"what a {facts.accelerator} trains",
    )
    narrow = 0.25 if own.config.model.stem == "cifar" else 0.5
    width = narrow if chosen and not on_gpu else 1.0
    why = "a CPU then sees each image more often" if width < 1 else "the published network"
    own.take("model.width", width, why)
    model = own.config.model
    is_small = not on_gpu and model.backbone == "resnet10t" and model.width <= 0.5
    why = "a small network learns more from its steps" if is_small else "as published"
    own.take("optim.name", "muon" if is_small else "sgd", why)


def _is_resnet(backbone: str) -> bool:
    import timm  # this takes 2 s, and a backbone that is left to `auto` needs none

    return timm.is_model(backbone) and timm.models.is_model_in_modules(backbone, ["resnet"])


def _choose_batch(own: Settings, facts: Facts) -> None:
    """Choose B, K and the rate: K holds a step's keys, and at most an eighth of an epoch's."""
    model, count = own.config.model, facts.count
    batch = BATCH
    while batch > LEAST_BATCH and batch * 8 > count:
        batch //= 2
    unit = batch_unit(own.config, facts.world)
    most = count if model.queue_size == "auto" else model.queue_size or count
    most = min(most, count) // model.keys_per_image  # so that a step's keys fit the queue
    batch = max(min(batch, most) // unit, 1) * unit
    own.take("data.batch_size", batch, f"{count} images on {facts.world} device(s)")
    batch = own.config.data.batch_size
    keys = batch * model.keys_per_image  # of a step
    room = min(max(count // batch, 1) * keys // 8, QUEUE[facts.accelerator])
    size = keys * 2 ** int(math.log2(max(room // keys, 1)))
    why = f"at most an eighth of the keys of {count} images"
    if size > room:
        why = f"the keys of a step, though more than an eighth of those of {count} images"
    own.take("model.queue_size", size, why)
    name, asked = own.config.optim.name, own.config.optim.lr
    rate = float(f"{RATES[name] * batch / 256:.4g}")
    own.take("optim.lr", rate, f"{RATES[name]:g} x batch / 256")
    if "optim.name" in own.chosen and asked not in ("auto", rate):
        log.info("optim.lr: %g as given, of %s, to which optim.name auto has come; its own would "
                 "be %g", asked, name, rate)  # fmt: skip


def choose_length(own: Settings, batches: int, seconds: float = 0.0) -> None:
    """Decide how long the run trains, and shorten freezing and warm-up that would outlast it.

    Args:
        own: With everything else decided.
        batches: Of an epoch, 1 or more.
        seconds: That a batch takes; needed where the time decides the epochs.
    """
    if seconds:
        _choose_epochs(own, batches, seconds)
    epochs = total_steps(own.config, batches) / steps_per_epoch(own.config, batches)
    names = ("optim.freeze_backbone_epochs", "optim.warmup_epochs")
    asked = {name: own.config.value(name) for name in names}
    if sum(asked.values()) <= epochs:
        return
    tenth = float(f"{WARMUP_SHARE * epochs:.4g}")
    for name, value in asked.items():
        if value > tenth:
            reason = f"a tenth of the run: the {value:g} asked for are too many for its"
            own.replace(name, tenth, f"{reason} {epochs:.3g} epochs")


def _choose_epochs(own: Settings, batches: int, seconds: float) -> None:
    fitting = max(int(own.config.run.minutes * 60 / seconds), 1)  # batches
    why = f"{own.config.run.minutes:g} minutes at {seconds * 1000:.0f} ms a batch"
    epochs, rest = divmod(fitting, batches)
    few = epochs < FEW_EPOCHS and rest > 0 and own.config.trainer.max_steps < 0
    is_fixed = not own.config.ends_by_clock
    about = why if is_fixed else f"{why}: about so many, the clock fixes it while the run trains"
    own.take("trainer.max_epochs", epochs + few or 1, about)
    if few and is_fixed:
        steps = max(fitting // own.config.trainer.accumulate_grad_batches, 1)
        own.replace("trainer.max_steps", steps, f"{why}: not to the end of an epoch")
