"""Settings: every field explains itself, every range holds, contradictions are named."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import torch

from moco.checks import check, check_ranges
from moco.command import cli
from moco.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TrainerConfig,
    UserError,
    unknown_settings,
)
from moco.judge_config import (
    EmbedConfig,
    ExportConfig,
    JudgeConfig,
    KNNConfig,
    LinearConfig,
    SearchConfig,
    SelectConfig,
)
from moco.pixels import normalisation

FIELDS = [
    (group, item, typing.get_type_hints(kind)[item.name])
    for group, kind in typing.get_type_hints(TrainConfig).items()
    for item in dataclasses.fields(kind)
]
NAMES = [f"{group}.{item.name}" for group, item, _ in FIELDS]
LIMITS = [
    (name, item.metadata, kind, limit)
    for name, (_, item, kind) in zip(NAMES, FIELDS, strict=True)
    for limit in ("above", "at_least", "at_most")
    if limit in item.metadata
]


def valid(**groups: dict) -> TrainConfig:
    """Defaults that pass `check`, with changes such as model={"temperature": 1}."""
    config = TrainConfig(data=DataConfig(dataset="digits"))
    for group, values in groups.items():
        for name, value in values.items():
            assert hasattr(getattr(config, group), name)
            setattr(getattr(config, group), name, value)
    return config


def set_field(name: str, value: object) -> TrainConfig:
    group, field = name.split(".")
    return valid(**{group: {field: value}})


@pytest.mark.parametrize("field", FIELDS, ids=NAMES)
def test_a_field_has_a_meaning_and_a_plain_default(field):
    group, item, kind = field
    meaning = item.metadata["meaning"]
    assert len(meaning) > 4 and (meaning[0].isupper() or meaning.startswith("torch."))
    value = getattr(getattr(TrainConfig(), group), item.name)
    options = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
    if options:
        assert value in options and all(isinstance(option, str) for option in options)
    elif typing.get_origin(kind) is list:
        assert isinstance(value, list)
    else:
        kinds = typing.get_args(kind) or (kind,)
        assert type(value) in kinds or typing.Literal[value] in kinds


def test_groups_say_what_they_hold():
    for kind in typing.get_type_hints(TrainConfig).values():
        assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__)


def test_defaults_are_in_range_and_lists_are_not_shared():
    check(valid())
    one, other = TrainConfig(), TrainConfig()
    one.optim.milestones.append(300)
    assert other.optim.milestones == [120, 160]


@pytest.mark.parametrize(
    "name, limits, kind, limit", LIMITS, ids=[f"{n[0]}-{n[3]}" for n in LIMITS]
)
def test_ranges_are_enforced(name, limits, kind, limit):
    edge, in_list = limits[limit], typing.get_origin(kind) is list
    small = 1 if kind in (int, list[int]) else max(1e-3, abs(edge) * 1e-3)  # 1e39 + 1 is 1e39
    outside = {"above": edge, "at_least": edge - small, "at_most": edge + small}[limit]
    inside = {"above": edge + small}.get(limit, edge)
    outside, inside = ([outside], [inside]) if in_list else (outside, inside)
    with pytest.raises(UserError, match=rf"^{re.escape(name)} is {re.escape(str(outside))}: "):
        check_ranges(set_field(name, outside))
    check_ranges(set_field(name, inside))


NUMERIC = (int, float, float | None, list[int], list[float])


@pytest.mark.parametrize(
    "config",
    [
        *(TrainConfig, JudgeConfig, LinearConfig, KNNConfig, ExportConfig),
        *(EmbedConfig, SearchConfig, SelectConfig),
    ],
)
def test_every_number_has_an_upper_bound(config):
    """An absurd size is refused by name; it must not end in a traceback or run for ever."""
    kinds = typing.get_type_hints(config)
    groups = kinds.values() if config is TrainConfig else [config]
    endless = [
        f"{group.__name__}.{item.name}"
        for group in groups
        for item in dataclasses.fields(group)
        if typing.get_type_hints(group)[item.name] in NUMERIC and "at_most" not in item.metadata
    ]
    assert endless == []


@pytest.mark.parametrize(
    "config, name, value",
    [
        (JudgeConfig, "seed", 99999999999999999999999),
        (LinearConfig, "epochs", 99999999999),
        (LinearConfig, "learning_rates", [0.1, 1e30]),
        (KNNConfig, "k", [10, 10**12]),
    ],
)
def test_absurd_numbers_of_evaluation_are_refused(config, name, value):
    with pytest.raises(UserError, match=f"^{name} is .*: it must be at most"):
        check_ranges(config(**{name: value}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.temperature", "optim.weight_decay", "data.crop_min"])
def test_numbers_are_finite(name, value):
    with pytest.raises(UserError, match=f"{name} is"):
        check_ranges(set_field(name, value))


def test_numbers_in_lists_are_finite():
    for name in ("data.mean", "data.std"):
        for value in (float("nan"), float("inf")):
            assert refused(set_field(name, [0.5, value, 0.5]), name), f"{name} of {value}"


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name, (_, _, kind) in zip(NAMES, FIELDS, strict=True)
        if typing.get_origin(kind) is typing.Literal
    ],
)
def test_choices_are_enforced(name, kind):
    with pytest.raises(
        UserError, match=rf"{name} is 'x': choose one of .*{typing.get_args(kind)[0]}"
    ):
        check_ranges(set_field(name, "x"))


def refused(config: TrainConfig, name: str) -> bool:
    """Whether `check` refuses the settings and names the field."""
    try:
        check(config)
    except UserError as error:
        return name in str(error)
    return False


def test_null_is_refused_where_it_means_nothing():
    """A recipe can hold null anywhere; it must not end in a traceback later."""
    strict = [
        name
        for name, (_, _, kind) in zip(NAMES, FIELDS, strict=True)
        if type(None) not in typing.get_args(kind)
    ]
    assert len(strict) > 40
    assert [name for name in strict if not refused(set_field(name, None), name)] == []


CONTRADICTIONS = {
    "nesterov without momentum": (
        {"optim": {"nesterov": True, "sgd_momentum": 0.0}},
        "optim.nesterov",
        "optim.sgd_momentum",
    ),
    "nesterov with dampening": (
        {"optim": {"nesterov": True, "dampening": 0.1}},
        "optim.nesterov",
        "optim.dampening",
    ),
    "muon that keeps all momentum": (
        {"optim": {"name": "muon", "sgd_momentum": 1.0}},
        "optim.sgd_momentum",
        "below 1",
    ),
    "milestones out of order": ({"optim": {"milestones": [160, 120]}}, "optim.milestones", "order"),
    "plateau of no kNN": (
        {
            "optim": {"schedule": "plateau", "plateau_metric": "val/knn_top1"},
            "run": {"knn_every": 0},
        },
        "optim.plateau_metric",
        "run.knn_every",
    ),
    "plateau of kNN that comes too late": (
        {
            "optim": {"schedule": "plateau", "plateau_metric": "val/knn_top1"},
            "trainer": {"max_epochs": 10},
        },
        "run.knn_every is 10",
        "trainer.max_epochs 10",
    ),
    "queue below the batch": (
        {"model": {"queue_size": 255}},
        "model.queue_size 255",
        "data.batch_size 256",
    ),
    "queue below both views' keys": (
        {"model": {"queue_size": 511, "symmetric": "mean"}},
        "model.queue_size 511",
        "512",
    ),
    "mean of other channels": ({"data": {"mean": [0.5]}}, "data.mean", "data.channels 3"),
    "std of other channels": (
        {"data": {"std": [0.5, 0.5, 0.5], "channels": 1}},
        "data.std",
        "data.channels 1",
    ),
    "std of nothing": ({"data": {"std": [0.5, 0.0, 0.5]}}, "data.std", "positive"),
    "folder without a root": ({"data": {"dataset": "folder"}}, "data.root", "--data.root"),
    "a seed that no generator takes": ({"run": {"seed": 2**64}}, "run.seed", "at most"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(name):
    groups, *parts = CONTRADICTIONS[name]
    with pytest.raises(UserError) as caught:
        check(valid(**groups))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"queue_size": 256}},
        {"model": {"queue_size": 512, "symmetric": "sum"}},
        {"optim": {"nesterov": True}},
        {"optim": {"warmup_epochs": 200.0}},
        {"data": {"mean": [0.5] * 5, "std": [0.1] * 5, "channels": 5}},
        {"optim": {"milestones": []}},
    ],
)
def test_what_just_fits_is_taken(groups):
    check(valid(**groups))


def test_settings_survive_a_checkpoint(tmp_path):
    config = valid(data={"mean": [0.1, 0.2, 0.3], "crop_min": 0.08}, optim={"milestones": [3]})
    torch.save(dataclasses.asdict(config), tmp_path / "settings")
    stored = torch.load(tmp_path / "settings", weights_only=True)
    assert TrainConfig.from_dict(stored) == config
    assert unknown_settings(stored) == []


def test_settings_of_another_version_keep_what_is_known():
    stored = dataclasses.asdict(valid(model={"temperature": 0.5}))
    stored["run"]["skip_nonfinite"] = 3
    del stored["optim"]
    assert unknown_settings(stored) == ["run.skip_nonfinite"]
    assert TrainConfig.from_dict(stored) == valid(model={"temperature": 0.5})


def test_normalisation():
    imagenet = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert normalisation(DataConfig()) == imagenet
    assert normalisation(DataConfig(channels=1)) == ([0.5], [0.25])
    own = DataConfig(channels=2, mean=[0.1, 0.2], std=[0.3, 0.4])
    assert normalisation(own) == ([0.1, 0.2], [0.3, 0.4])


def test_published_defaults():
    """2003.04297 on ImageNet: the defaults are a recipe, not an accident."""
    model, optim, data = ModelConfig(), OptimConfig(), DataConfig()
    assert (model.backbone, model.head, model.embedding_dim) == ("resnet50", "mlp", 128)
    assert (model.queue_size, model.key_momentum, model.temperature) == (65536, 0.999, 0.2)
    assert (optim.lr, optim.sgd_momentum, optim.weight_decay) == (0.03, 0.9, 1e-4)
    assert (optim.schedule, optim.schedule_per, optim.warmup_epochs) == ("cosine", "epoch", 0)
    assert (data.batch_size, data.views, data.image_size) == (256, "v2", 224)
    assert (TrainerConfig().max_epochs, RunConfig().knn_k, RunConfig().knn_temperature) == (
        200,
        200,
        0.1,
    )


@pytest.mark.parametrize("name", ["cifar10_v2plus", "cifar10_v3"])
def test_recipes_of_solo_learn_normalise_keys_as_its_scores_did(name):
    """Its one process normalises keys over the whole batch: no shuffle, and no groups."""
    parser = cli.build_parser("", TrainConfig, {})
    path = str(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    config, _ = cli.parse(parser, TrainConfig, ["--config", path])
    assert (config.model.key_bn, config.model.query_bn) == ("sync", "sync")
