"""Idle settings: whatever is set and does nothing is said, in one line."""

import dataclasses
import logging
import typing

import pytest
from processes import ROOT

import moco.idle as idle
from moco.command import cli
from moco.config import DataConfig, TrainConfig
from moco.images.datasets import ARRAYS
from moco.judge_config import EmbedConfig, JudgeConfig, KNNConfig, LinearConfig, SearchConfig

# What always does something, whatever the other settings are.
NEVER_IDLE = {
    "run.plan",
    *("model.backbone", "model.stem", "model.width", "model.head", "model.embedding_dim"),
    *("model.queue_size", "model.temperature", "model.symmetric", "model.key_momentum"),
    *("model.key_momentum_schedule", "model.key_bn", "model.query_bn", "model.compile"),
    *("model.zero_init_residual", "model.patch_size", "model.depth", "model.num_heads"),
    *("model.positions", "model.vit_init", "model.freeze_patch_embed", "model.predictor"),
    *("model.patches", "model.combine"),
    *("model.queues", "optim.clip_grad_norm", "data.chunks"),
    *("optim.name", "optim.lr", "optim.weight_decay", "optim.warmup_epochs"),
    "optim.freeze_backbone_epochs",
    *("data.dataset", "data.channels", "data.image_size", "data.batch_size"),
    *("data.views", "data.pairs", "data.image_size_start", "data.image_size_end"),
    *("data.mean", "data.std"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.accelerator", "trainer.devices"),
    *("trainer.num_nodes", "trainer.precision", "trainer.accumulate_grad_batches"),
    *("trainer.log_every_n_steps", "trainer.deterministic"),
    *("run.dir", "run.seed", "run.checkpoint_every", "run.checkpoint_minutes"),
    *("run.keep_checkpoints", "run.knn_every", "run.tensorboard", "run.wandb", "run.mlflow"),
    "run.report",
}
# Those of evaluation, besides its settings of images.
NEVER_IDLE_IN_EVALUATION = {
    *({item.name for item in dataclasses.fields(JudgeConfig)} - {"untrained_draws"}),
    *("protocol", "label_fraction", "learning_rates", "epochs", "batch_size"),
    *("k", "budget", "shots", "draws", "gallery"),
}
# Of each setting that may be idle: a value that was set, others beside which it is idle, and others
# beside which it is not.
TRAINING = {
    **{f"data.{name}": (0.3, {"data.views": "own"}, {}) for name in ("crop_min", "flip", "jitter")},
    **{f"data.{name}": (0.3, {"data.views": "own"}, {}) for name in ("grey", "blur", "solarise")},
    "data.interpolation": ("bicubic", {"data.views": "own"}, {}),
    "data.upscale": (2.0, {"data.views": "own"}, {"data.views": "v1"}),
    "data.root": ("x", {"data.dataset": "digits"}, {"data.dataset": "folder"}),
    "data.files": ("x", {"data.dataset": "digits"}, {}),
    "data.labels": ("x", {"data.dataset": "digits"}, {}),
    "data.download": (True, {"data.dataset": "folder"}, {"data.dataset": "stl10"}),
    "data.min_value": (5.0, {"data.dataset": "cifar10"}, {}),
    "data.max_value": (255, {"data.dataset": "cifar10"}, {}),
    "data.dicom_window": (False, {"data.dataset": "stl10"}, {}),
    "data.exif": ("ignore", {"data.dataset": "digits"}, {}),
    "data.max_pixels": (9, {"data.dataset": "digits"}, {}),
    "data.resident": ("off", {"data.dataset": "digits"}, {}),
    "data.resident_budget": (1.0, {"data.resident": "device"}, {}),
    "data.reduce_jpegs": (False, {"data.resident": "device"}, {"data.resident": "off"}),
    "data.num_workers": (3, {"data.resident": "memory"}, {"data.resident": "auto"}),
    "data.worker_timeout": (9.0, {"data.num_workers": 0}, {}),
    "data.streams": (8, {"data.dataset": "folder"}, {"data.dataset": "shards"}),
    "data.window": (64, {"data.dataset": "digits"}, {"data.dataset": "parquet"}),
    "data.cache_gib": (
        1.0,
        {"data.dataset": "shards", "data.root": "x/*.tar"},
        {"data.dataset": "shards", "data.root": "s3://x/*.tar"},
    ),
    "data.max_bad_fraction": (0.1, {"data.dataset": "cifar100"}, {}),
    "model.head_layers": (3, {"model.head": "linear"}, {}),
    "model.head_hidden_dim": (
        64,
        {"model.head": "linear"},
        {"model.head": "linear", "model.predictor": "mlp"},
    ),
    "model.predictor_last_bn": (True, {}, {"model.predictor": "mlp"}),
    "model.loss_times_2t": (False, {}, {"model.queue_size": 0}),
    "model.key_momentum_end": (0.999, {}, {"model.key_momentum_schedule": "cosine"}),
    "model.bn_splits": (4, {"model.key_bn": "shuffle"}, {"model.query_bn": "split"}),
    "data.image_size_share": (0.5, {}, {"data.image_size_start": 112}),
    "optim.sgd_momentum": (0.5, {"optim.name": "adamw"}, {}),
    "optim.dampening": (0.1, {"optim.sgd_momentum": 0.0}, {}),
    "optim.nesterov": (True, {"optim.name": "adamw"}, {"optim.name": "muon"}),
    "optim.adam_beta1": (0.8, {}, {"optim.name": "adamw"}),
    "optim.adam_beta2": (0.99, {}, {"optim.name": "muon"}),
    "optim.lars_trust": (0.02, {}, {"optim.name": "lars"}),
    "optim.decay_norm_and_bias": (False, {"optim.name": "lars"}, {}),
    "optim.warmup_start": (0.5, {}, {"optim.warmup_epochs": 1.0}),
    "optim.predictor_schedule": ("constant", {}, {"model.predictor": "mlp"}),
    "optim.schedule": ("step", {"trainer.max_epochs": 100}, {}),
    "optim.schedule_per": ("step", {"optim.schedule": "constant"}, {}),
    "optim.milestones": ([20], {"optim.schedule": "plateau"}, {"optim.schedule": "step"}),
    "optim.decay_share": (0.5, {}, {"optim.schedule": "stable"}),
    "optim.gamma": (0.5, {}, {"optim.schedule": "plateau"}),
    "optim.plateau_metric": ("val/knn_top1", {}, {"optim.schedule": "plateau"}),
    "optim.plateau_patience": (3, {"optim.schedule": "step"}, {"optim.schedule": "plateau"}),
    "run.minutes": (5.0, {}, {"trainer.max_epochs": "auto"}),
    "run.knn_root": ("x", {"run.knn_every": 0}, {}),
    "run.select": ("lidar", {"run.knn_every": 0}, {}),
    "run.held_out": (9, {"data.dataset": "digits"}, {"data.dataset": "folder"}),
    "run.knn_first": (False, {"run.knn_every": 0}, {}),
    "run.knn_bank": (9, {"run.knn_every": 0}, {}),
    "run.knn_layer": ("head", {"run.knn_every": 0}, {}),
    "run.knn_k": (20, {"run.knn_every": 0}, {}),
    "run.knn_temperature": (0.2, {"run.knn_every": 0}, {}),
    "run.wandb_project": ("x", {}, {"run.wandb": True}),
}
LINEAR = {
    "data.flip": (0.0, {}, {"protocol": "views"}),
    "untrained_draws": (5, {"baselines": False}, {}),
    "milestones": ([3], {"protocol": "finetune", "baselines": False}, {"protocol": "paper"}),
    "num_views": (8, {"protocol": "cached"}, {"protocol": "views"}),
    "held_out": (0.2, {"learning_rates": [0.1]}, {"protocol": "paper"}),
    "crop_min": (0.5, {}, {"protocol": "finetune"}),
}
EMBED = {
    "data.flip": (0.0, {}, None),
    "data.resident": ("memory", {}, None),
    "data.resident_budget": (1.0, {}, None),
    "data.num_workers": (3, {"dataset": "cifar10"}, {"resident": "memory"}),
    "data.worker_timeout": (9.0, {"dataset": "digits"}, {}),
}
SEARCH = {
    "k": (3, {"duplicates": True}, {"query": "x"}),
    "picture": ("x", {"duplicates": True}, {"query": "x"}),
    "checkpoint": ("x", {"duplicates": True}, {"query": "x"}),
    "accelerator": ("cpu", {"duplicates": True}, {"query": "x"}),
    "above": (0.9, {"query": "x"}, {"duplicates": True}),
    "output": ("x", {"query": "x"}, {"duplicates": True}),
}


def test_images_are_set_aside_whether_or_not_they_are_read():
    config = train_config(**{"data.dataset": "folder", "run.held_out": 9, "run.knn_every": 0})
    assert "run.held_out" not in idle.idle_in_training(config)
    for name, value in (("data.dataset", "shards"), ("run.knn_root", "x")):
        assert "run.held_out (" in idle.idle_in_training(config.changed({name: value}))


def train_config(**values):
    config = TrainConfig()
    for name, value in values.items():
        group, field = name.split(".")
        assert hasattr(getattr(config, group), field)
        setattr(getattr(config, group), field, value)
    return config


def test_every_setting_is_never_idle_or_stands_in_the_table():
    groups = typing.get_type_hints(TrainConfig).items()
    fields = {f"{group}.{item.name}" for group, kind in groups for item in dataclasses.fields(kind)}
    assert idle.OF_TRAINING.keys() | NEVER_IDLE == fields
    assert not idle.OF_TRAINING.keys() & NEVER_IDLE
    of_data = {f"data.{item.name}" for item in dataclasses.fields(DataConfig)}
    for rules, kind in ((idle.OF_LINEAR, LinearConfig), (idle.OF_KNN, KNNConfig)):
        own = {item.name for each in (JudgeConfig, kind) for item in dataclasses.fields(each)}
        assert own == (own & (rules.keys() | NEVER_IDLE_IN_EVALUATION))
        assert rules.keys() <= own | of_data and not rules.keys() & NEVER_IDLE_IN_EVALUATION


def test_every_rule_of_training_has_its_case():
    assert TRAINING.keys() == idle.OF_TRAINING.keys()
    assert LINEAR.keys() == idle.OF_LINEAR.keys() - idle.OF_DATA.keys()


@pytest.mark.parametrize("name", TRAINING)
def test_an_idle_setting_of_training_is_said_and_one_that_works_is_not(name):
    value, others, working = TRAINING[name]
    line = idle.idle_in_training(train_config(**{name: value}, **others))
    assert line.startswith("warning: ") and f" {name} (" in line and "\n" not in line
    assert f" {name} (" not in idle.idle_in_training(train_config(**{name: value}, **working))
    assert f" {name} (" not in idle.idle_in_training(train_config(**others))


@pytest.mark.parametrize("name", LINEAR)
def test_an_idle_setting_of_evaluation_is_said_and_one_that_works_is_not(name):
    value, others, working = LINEAR[name]
    for beside, said in ((others, True), (working, False)):
        judge, config, data = JudgeConfig(), LinearConfig(), DataConfig()
        for field, each in ({name: value} | beside).items():
            field = field.removeprefix("data.")
            holder = next(part for part in (judge, config, data) if hasattr(part, field))
            setattr(holder, field, each)
        line = idle.idle_in_evaluation(judge, config, data, {})
        assert (f" {name} (" in line) == said


@pytest.mark.parametrize("name", EMBED)
def test_an_idle_setting_of_embedding_is_said_and_one_that_works_is_not(name):
    value, idly, working = EMBED[name]
    for beside, said in ((idly, True), (working, False)):
        if beside is not None:
            data = DataConfig(**{name.removeprefix("data."): value}, **beside)
            line = idle.idle_in_embedding(EmbedConfig("", ""), data, {})
            assert (f" {name} (" in line) == said
    assert EMBED.keys() == {k for k, rule in idle.OF_EMBED.items() if idle.OF_DATA.get(k) != rule}


@pytest.mark.parametrize("name", SEARCH)
def test_an_idle_setting_of_a_search_is_said_and_one_that_works_is_not(name):
    value, idly, working = SEARCH[name]
    for beside, said in ((idly, True), (working, False)):
        line = idle.idle_in_search(SearchConfig("set", **{name: value}, **beside))
        assert (f" {name} (" in line) == said
    fields = {item.name for item in dataclasses.fields(SearchConfig)}
    assert SEARCH.keys() == idle.OF_SEARCH.keys() == fields - {"index", "query", "duplicates"}


@pytest.mark.parametrize(
    ("name", "value", "beside", "works"),
    [
        ("data.files", "x", {"data.dataset": "own"}, {}),
        ("data.labels", "x", {"data.dataset": "own"}, {}),
        ("data.grey", 0.5, {"data.channels": 1}, {"data.channels": "auto"}),
        ("data.grey", 0.5, {"data.channels": 4}, {}),
    ],
)
def test_what_images_of_python_or_without_colours_do_not_heed_is_said(name, value, beside, works):
    config = TrainConfig().changed({name: value})
    assert f"{name} (" in idle.idle_in_training(config.changed(beside))
    assert name not in idle.idle_in_training(config.changed(works))


def test_what_the_checkpoint_holds_was_not_set_here():
    judge, config = JudgeConfig(), KNNConfig(k=[1], temperature=0.2)
    line = idle.idle_in_evaluation(judge, config, DataConfig(flip=0.0), {"flip": 0.0})
    assert "temperature" in line and "flip" not in line


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_recipe_holds_an_idle_setting(path):
    parser = cli.build_parser("", TrainConfig, {})
    config, _ = cli.parse(parser, TrainConfig, ["--config", str(path)])
    assert idle.idle_in_training(config) == ""


def test_the_sets_that_are_arrays_are_those_of_the_images():
    assert idle._ARRAYS == ARRAYS


def test_a_run_and_an_evaluation_say_it_in_one_line(tmp_path, monkeypatch, caplog):
    import train
    from moco.command.knn import main as eval_knn

    monkeypatch.setattr(logging.getLogger("moco"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("moco"), "handlers", [logging.NullHandler()])
    small = ["--model.backbone", "resnet10t", "--model.width", "0.125", "--model.queue_size", "64"]
    small += ["--data.dataset", "digits", "--data.channels", "1", "--data.image_size", "8"]
    small += ["--data.batch_size", "16", "--trainer.max_steps", "1", "--run.knn_every", "0"]
    small += ["--run.report", "false"]
    small += ["--run.dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    result = train.main([*small, "--data.root", "nowhere", "--optim.adam_beta1", "0.8"])
    shots = ["--k", "[1]", "--temperature", "0.2", "--shots", "[1]", "--baselines", "false"]
    eval_knn(["--checkpoint", result["checkpoint"], "--gallery", "false", *shots])
    said = [line for line in caplog.messages if "these settings do nothing" in line]
    assert len(said) == 2
    assert "data.root (" in said[0] and "optim.adam_beta1 (" in said[0]
    assert "temperature (" in said[1] and "data.root" not in said[1]


def test_groups_of_a_split_are_idle_without_a_queue_and_not_where_shuffle_came_to_split(
    tmp_path, monkeypatch, caplog
):
    line = idle.idle_in_training(train_config(**{"model.bn_splits": 4, "model.queue_size": 0}))
    assert " model.bn_splits (" in line
    import train

    monkeypatch.setattr(logging.getLogger("moco"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("moco"), "handlers", [logging.NullHandler()])
    small = ["--model.backbone", "resnet10t", "--model.width", "0.125", "--model.queue_size", "64"]
    small += ["--data.dataset", "digits", "--data.channels", "1", "--data.image_size", "8"]
    small += ["--data.batch_size", "16", "--trainer.max_steps", "1", "--run.knn_every", "0"]
    small += ["--run.report", "false"]
    small += ["--trainer.accelerator", "cpu", "--model.key_bn", "shuffle", "--model.bn_splits", "4"]
    train.main([*small, "--run.dir", str(tmp_path / "run")])
    assert any("key BatchNorm: split" in line for line in caplog.messages)
    assert not any("model.bn_splits" in line for line in caplog.messages)
