"""Idle settings: which settings do nothing beside the values of others, and one line that says so.

A setting that stands in no table of this room always does something. This room needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moco.config import DataConfig, TrainConfig
from moco.judge_config import EmbedConfig, JudgeConfig, KNNConfig, LinearConfig, SearchConfig

# The name of a setting, what makes it idle in words, and whether given values of all settings do.
Rules = dict[str, tuple[str, Callable[[dict[str, Any]], bool]]]
_ARRAYS = ("digits", "cifar10", "cifar100", "stl10")  # read whole, 8 bits a value
_SHARDS = ("shards", "parquet")


def _is(name: str, *values: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda given: given[name] in values


def _is_not(name: str, *values: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda given: given[name] not in values


def _in_memory(given: dict[str, Any]) -> bool:
    kind = given["data.dataset"]
    held = given["data.resident"] in ("device", "memory") and kind not in _SHARDS
    return kind in _ARRAYS or held


def _nothing_cached(given: dict[str, Any]) -> bool:
    kind = given["data.dataset"]
    return kind != "parquet" and not (kind == "shards" and "://" in given["data.root"])


def _milestones_idle(given: dict[str, Any]) -> bool:
    milestones, epochs = given["optim.milestones"], given["trainer.max_epochs"]
    return given["optim.schedule"] != "step" or any(epoch >= epochs for epoch in milestones)


def _judged_milestones_idle(given: dict[str, Any]) -> bool:
    epochs, trained = given["epochs"] or 100, given["protocol"] == "paper"
    trained = trained or (given["protocol"] == "finetune" and given["baselines"])  # raw pixels
    return not trained or any(epoch >= epochs for epoch in given["milestones"])


def _nothing_to_choose(given: dict[str, Any]) -> bool:
    by_default = given["protocol"] in ("paper", "v3", "v3_vit", "finetune")
    several = len(given["learning_rates"]) > 1 or not (given["learning_rates"] or by_default)
    return not several and not (by_default and given["baselines"])  # baselines try several rates


OF_DATA: Rules = {
    "data.root": ("digits need no files", _is("data.dataset", "digits")),
    **dict.fromkeys(
        ("data.files", "data.labels"),
        ("this data set has no files to list", _is("data.dataset", *_ARRAYS, *_SHARDS, "own")),
    ),
    "data.download": (
        "only cifar10, cifar100 and stl10 are fetched",
        _is_not("data.dataset", "cifar10", "cifar100", "stl10"),
    ),
    **dict.fromkeys(
        ("data.min_value", "data.max_value", "data.dicom_window", "data.exif", "data.max_pixels"),
        ("this data set has 8 bits and no files", _is("data.dataset", *_ARRAYS)),
    ),
    "data.resident": (
        "this data set is held in memory, or streamed from shards",
        lambda given: (
            given["data.dataset"] in _SHARDS
            or (given["data.dataset"] in _ARRAYS and given["data.resident"] == "off")
        ),
    ),
    **dict.fromkeys(
        ("data.streams", "data.window"), ("there are no shards", _is_not("data.dataset", *_SHARDS))
    ),
    "data.cache_gib": ("all images are read where they lie", _nothing_cached),
    "data.resident_budget": (
        "nothing is left to decide",
        lambda given: (
            given["data.dataset"] in (*_ARRAYS, *_SHARDS) or given["data.resident"] != "auto"
        ),
    ),
    **dict.fromkeys(("data.reduce_jpegs", "data.num_workers"), ("nothing is streamed", _in_memory)),
    "data.worker_timeout": (
        "no worker streams images",
        lambda given: _in_memory(given) or given["data.num_workers"] == 0,
    ),
    "data.max_bad_fraction": ("this data set has no image files", _is("data.dataset", *_ARRAYS)),
}
OF_TRAINING: Rules = OF_DATA | {
    **dict.fromkeys(
        (
            *("data.crop_min", "data.flip", "data.jitter", "data.blur", "data.solarise"),
            *("data.interpolation", "data.upscale"),
        ),
        ("data.views is own", _is("data.views", "own")),
    ),
    "data.grey": (
        "only images of 3 channels are turned grey, by views that are not own",
        lambda given: given["data.views"] == "own" or given["data.channels"] not in ("auto", 3),
    ),
    "model.head_layers": ("model.head is linear", _is("model.head", "linear")),
    "model.head_hidden_dim": (
        "model.head is linear and there is no predictor",
        lambda given: given["model.head"] == "linear" and given["model.predictor"] == "none",
    ),
    "model.predictor_last_bn": ("there is no predictor", _is("model.predictor", "none")),
    "model.loss_times_2t": (
        "there is a queue, whose loss is not multiplied",
        lambda given: given["model.queue_size"] != 0,
    ),
    "model.key_momentum_end": (
        "model.key_momentum_schedule is constant",
        _is("model.key_momentum_schedule", "constant"),
    ),
    "model.bn_splits": (
        "no BatchNorm is split",
        lambda given: (
            "split" not in (given["model.key_bn"], given["model.query_bn"])
            and (given["model.key_bn"] != "auto" or given["model.queue_size"] == 0)
        ),
    ),
    "data.image_size_share": ("the views do not grow", _is("data.image_size_start", 0)),
    "optim.sgd_momentum": ("optim.name is adamw", _is("optim.name", "adamw")),
    "optim.dampening": (
        "there is no momentum of SGD",
        lambda given: (
            given["optim.name"] not in ("auto", "sgd") or given["optim.sgd_momentum"] == 0
        ),
    ),
    "optim.nesterov": ("optim.name is adamw or lars", _is("optim.name", "adamw", "lars")),
    **dict.fromkeys(
        ("optim.adam_beta1", "optim.adam_beta2"),
        ("optim.name is neither adamw nor muon", _is_not("optim.name", "auto", "adamw", "muon")),
    ),
    "optim.lars_trust": ("optim.name is not lars", _is_not("optim.name", "lars")),
    "optim.decay_norm_and_bias": (
        "LARS never decays them, and there is nothing to decay at optim.weight_decay 0",
        lambda given: given["optim.name"] == "lars" or given["optim.weight_decay"] == 0,
    ),
    "optim.warmup_start": ("optim.warmup_epochs is 0", _is("optim.warmup_epochs", 0)),
    "optim.predictor_schedule": ("there is no predictor", _is("model.predictor", "none")),
    "optim.schedule": (
        "no milestone lies before trainer.max_epochs",
        lambda given: (
            given["optim.schedule"] == "step"
            and all(epoch >= given["trainer.max_epochs"] for epoch in given["optim.milestones"])
        ),
    ),
    "optim.schedule_per": ("only cosine heeds it", _is_not("optim.schedule", "cosine")),
    "optim.milestones": (
        "only schedule step heeds them, and only before trainer.max_epochs",
        _milestones_idle,
    ),
    "optim.decay_share": ("optim.schedule is not stable", _is_not("optim.schedule", "stable")),
    "optim.gamma": (
        "only the schedules step and plateau heed it",
        _is_not("optim.schedule", "step", "plateau"),
    ),
    **dict.fromkeys(
        ("optim.plateau_metric", "optim.plateau_patience"),
        ("optim.schedule is not plateau", _is_not("optim.schedule", "plateau")),
    ),
    "run.minutes": ("trainer.max_epochs is a number", _is_not("trainer.max_epochs", "auto")),
    "run.knn_root": ("run.knn_every is 0", _is("run.knn_every", 0)),
    "run.select": ("run.knn_every is 0", _is("run.knn_every", 0)),
    "run.held_out": (
        "this data set has a test split, or run.knn_root is measured on",
        lambda given: given["data.dataset"] in (*_ARRAYS, *_SHARDS) or given["run.knn_root"] != "",
    ),
    **dict.fromkeys(
        [f"run.knn_{name}" for name in ("first", "bank", "layer", "k", "temperature")],
        ("run.knn_every is 0", _is("run.knn_every", 0)),
    ),
    "run.wandb_project": ("run.wandb is false", _is("run.wandb", False)),
}
OF_JUDGING: Rules = OF_DATA | {"untrained_draws": ("baselines is false", _is("baselines", False))}
OF_LINEAR: Rules = OF_JUDGING | {
    "data.flip": ("only crops are mirrored", _is("protocol", "cached")),
    "milestones": (
        "only paper heeds them, and only before its last epoch",
        _judged_milestones_idle,
    ),
    "num_views": ("only protocol views takes several", _is_not("protocol", "views")),
    "held_out": ("there is one learning rate", _nothing_to_choose),
    "crop_min": ("protocol cached takes no random crops", _is("protocol", "cached")),
}
OF_KNN: Rules = OF_JUDGING | {
    "data.flip": ("nothing is mirrored", lambda given: True),
    "temperature": ("one neighbour alone votes", lambda given: set(given["k"]) == {1}),
}
OF_EMBED: Rules = OF_DATA | {
    "data.flip": ("nothing is mirrored", lambda given: True),
    **dict.fromkeys(
        ("data.resident", "data.resident_budget"), ("each image is read once", lambda given: True)
    ),
    **dict.fromkeys(
        ("data.num_workers", "data.worker_timeout"),
        ("this data set is held in memory", _is("data.dataset", *_ARRAYS)),
    ),
}
OF_SEARCH: Rules = {
    **dict.fromkeys(
        ("k", "picture", "checkpoint", "accelerator"), ("there is no query", _is("query", ""))
    ),
    **dict.fromkeys(("above", "output"), ("duplicates is false", _is("duplicates", False))),
}


def idle_settings(given: dict[str, Any], usual: dict[str, Any], rules: Rules) -> str:
    """Name the settings that differ from the usual ones although they do nothing.

    Args:
        given, usual: The name of every setting to its value, and to what it is unless it was set.
        rules: One of the tables above.

    Returns:
        One line; empty if there are none.
    """
    idle = [
        f"{name} ({reason})"
        for name, (reason, does_nothing) in rules.items()
        if given[name] != usual[name] and does_nothing(given)
    ]
    return f"warning: these settings do nothing here: {', '.join(idle)}" if idle else ""


def idle_in_training(config: TrainConfig) -> str:
    """Name the idle settings of a run, in one line."""
    given, usual = (each.flat() for each in (config, TrainConfig()))
    return idle_settings(given, usual, OF_TRAINING)


def idle_in_evaluation(
    judge: JudgeConfig, own: LinearConfig | KNNConfig, data: DataConfig, stored: dict[str, Any]
) -> str:
    """Name the idle settings of an evaluation, in one line.

    Args:
        stored: Those data settings that the checkpoint holds, which are the usual ones here.
    """
    rules = OF_LINEAR if isinstance(own, LinearConfig) else OF_KNN
    given, usual = (
        vars(judge) | vars(own) | _of_data(vars(data)),
        vars(JudgeConfig()) | vars(type(own)()) | _of_data(vars(DataConfig()) | stored),
    )
    return idle_settings(given, usual, rules)


def idle_in_embedding(config: EmbedConfig, data: DataConfig, stored: dict[str, Any]) -> str:
    """Name the idle settings of `moco embed`, in one line; arguments as of `idle_in_evaluation`."""
    given, usual = (
        vars(config) | _of_data(vars(data)),
        vars(config) | _of_data(vars(DataConfig()) | stored),
    )
    return idle_settings(given, usual, OF_EMBED)


def idle_in_search(config: SearchConfig) -> str:
    """Name the idle settings of `moco search`, in one line."""
    return idle_settings(vars(config), vars(SearchConfig(index=config.index)), OF_SEARCH)


def _of_data(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"data.{name}": value for name, value in fields.items()}
