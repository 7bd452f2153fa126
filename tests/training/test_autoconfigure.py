"""What is left to the images, the hardware and the time: decided, told, kept, repeatable."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from pictures import write_pictures
from runs import assert_same_end, load, run_tiny

import eval_knn
import train
from moco.checks import check
from moco.config import AUTOMATIC, DataConfig, ModelConfig, TrainConfig, UserError
from moco.evaluation.findings import own_key_share
from moco.images import sources
from moco.training import rehearsal
from moco.training.autoconfigure import Facts, autoconfigure, choose_length
from moco.training.decide import choose_key_bn
from moco.training.rehearsal import Pace
from moco.training.shares import check_queue, check_shares

pytestmark = pytest.mark.usefixtures("in_tmp")
FOLDER = str(Path(__file__).parents[2] / "configs" / "folder.yaml")
CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--run.knn_every", "0"]
CPU += ["--run.report", "false"]
CPU += ["--optim.schedule", "cosine"]  # not by the clock: how many epochs is then asked before


def all_auto(**model: object) -> TrainConfig:
    config = TrainConfig(data=DataConfig(root="x"), model=ModelConfig(bn_splits=4, **model))
    config.run.minutes = 10.0
    return config.changed({name: "auto" for name in AUTOMATIC})


@pytest.fixture
def pictures(tmp_path):
    """Write 40 pictures of 20 x 24 pixels."""
    names = [f"{number:02d}.png" for number in range(40)]
    write_pictures(tmp_path / "pictures", names, np.random.default_rng(0), size=(24, 20))
    return str(tmp_path / "pictures")


@pytest.fixture
def two_steps(monkeypatch):
    """A rehearsal takes two steps, and finds that ten minutes hold two epochs."""
    real = rehearsal.rehearse

    def measured(*arguments) -> Pace:
        monkeypatch.setattr(rehearsal, "BATCHES", 2)
        found = real(*arguments)
        assert found.seconds > 0 and found.memory > 0
        return Pace(150.0, 0.0, found.memory)

    monkeypatch.setattr("moco.training.run.rehearse", measured)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            Facts(50_000, 32, 3, "cpu", 1),
            {
                "data.image_size": 32, "data.image_size_end": 24, "data.views": "cifar",
                "model.stem": "cifar",
                "model.backbone": "resnet10t", "model.width": 0.25, "data.batch_size": 256,
                "model.queue_size": 4096, "optim.name": "muon", "optim.lr": 0.015,
            },
        ),
        (
            Facts(250, 300, 3, "cpu", 1),
            {
                "data.image_size": 64, "data.image_size_end": 48, "data.views": "v2",
                "model.stem": "imagenet",
                "model.width": 0.5, "data.batch_size": 16, "model.queue_size": 16,
            },
        ),
        (
            Facts(1_281_167, 300, 3, "cuda", 8),
            {
                "data.image_size": 224, "data.image_size_end": 0, "model.backbone": "resnet18",
                "model.width": 1.0, "data.views": "v2",
                "data.batch_size": 256, "model.queue_size": 65536, "optim.name": "sgd",
                "optim.lr": 0.12,
            },
        ),
        (Facts(6000, 64, 16, "cpu", 1), {"data.channels": 16, "model.queue_size": 512}),
    ],
)  # fmt: skip
def test_settings_follow_from_the_images(facts, expected):
    chosen = autoconfigure(all_auto(), facts).chosen
    assert {name: chosen[name] for name in expected} == expected


@pytest.mark.parametrize("seed", range(60))
def test_what_is_chosen_passes_every_check(seed, caplog):
    chance = random.Random(seed)
    facts = Facts(
        int(10 ** chance.uniform(2.2, 7)), chance.randint(8, 4000), chance.choice([1, 3, 16]),
        chance.choice(["cpu", "cuda"]), chance.choice([1, 2, 3, 4, 6, 8]),
    )  # fmt: skip
    own = autoconfigure(all_auto(symmetric=chance.choice(["none", "mean"]), queues=1), facts)
    choose_length(own, max(facts.count // own.config.data.batch_size, 1), seconds=0.1)
    config = own.config
    assert config.undecided() == [] and set(own.chosen) >= set(AUTOMATIC)
    check(config)
    key_bn, _ = choose_key_bn("auto", facts.world, True, facts.accelerator == "cuda")
    check_shares(config, facts.world, key_bn, "plain")
    check_queue(config, facts.count)
    views = 2 if config.model.symmetric == "mean" else 1
    keys = facts.count // config.data.batch_size * config.data.batch_size * views
    if keys >= 8 * config.data.batch_size * views:
        assert own_key_share(config.model.queue_size, keys) < 0.01
        assert not caplog.messages or "is long" not in caplog.text


@pytest.mark.parametrize(
    ("asked", "count", "expected"),
    [
        (
            {"model.backbone": "vit_tiny_patch16_224"},
            1000,
            {"model.stem": "imagenet", "data.image_size_end": 0},
        ),
        ({"model.backbone": "resnet34"}, 1000, {"model.stem": "cifar", "optim.name": "sgd"}),
        ({"model.backbone": "resnet10t", "model.width": 0.25}, 1000, {"optim.name": "muon"}),
        ({"model.width": 1.0}, 1000, {"model.backbone": "resnet10t", "optim.name": "sgd"}),
        ({"optim.name": "sgd"}, 50_000, {"optim.lr": 0.12}),
        ({"model.stem": "patch"}, 1000, {"model.width": 0.5}),
        ({"model.patches": 3}, 1000, {"data.image_size": 24, "data.image_size_end": 18}),
        ({"data.image_size": 5}, 1000, {"data.image_size_end": 0}),
        ({"data.image_size_start": 24}, 1000, {"data.image_size_end": 0}),
        ({"model.patches": 5}, 1000, {"data.image_size": 160}),
        ({"model.patches": 11}, 1000, {"data.image_size": 33}),
        ({"model.key_bn": "shuffle", "model.bn_splits": 6}, 10_000, {"data.batch_size": 252}),
        ({"model.key_bn": "shuffle", "model.bn_splits": 16}, 100, {"data.batch_size": 32}),
        ({}, 12, {"data.batch_size": 8, "model.queue_size": 8}),
        ({"model.symmetric": "mean"}, 20, {"data.batch_size": 8, "model.queue_size": 16}),
    ],
)
def test_what_is_chosen_fits_what_is_set(asked, count, expected):
    side = 200 if asked.get("model.patches") == 5 else 35
    accelerator = "cuda" if side == 200 else "cpu"
    config = all_auto().changed({"trainer.max_epochs": 1, **asked})
    own = autoconfigure(config, Facts(count, side, 3, accelerator, 1))
    assert {name: own.chosen[name] for name in expected} == expected
    check(own.config)
    key_bn, _ = choose_key_bn(own.config.model.key_bn, 1, True, True)
    check_shares(own.config, 1, key_bn, "plain")
    check_queue(own.config, count)


@pytest.mark.parametrize("side", [1, 3])
def test_images_smaller_than_any_view_are_left_to_the_check_of_sizes(side):
    config = all_auto().changed({"trainer.max_epochs": 1})
    own = autoconfigure(config, Facts(40, side, 3, "cpu", 1))
    assert own.chosen["data.image_size"] == 4
    check(own.config)


def test_what_is_set_stays():
    config = all_auto().changed({"data.batch_size": 96, "model.backbone": "resnet34"})
    own = autoconfigure(config, Facts(50_000, 32, 3, "cpu", 1))
    assert own.config.data.batch_size == 96 and own.config.model.backbone == "resnet34"
    assert own.config.model.width == 1.0  # a network that was named is not made narrow
    assert own.config.model.queue_size % 96 == 0
    assert not {"data.batch_size", "model.backbone"} & own.chosen.keys()


@pytest.mark.parametrize(
    ("seconds", "epochs", "steps"), [(0.45, 13, -1), (6.0, 1, -1), (4.0, 2, 150), (12.0, 1, 50)]
)
def test_the_time_decides_the_epochs(seconds, epochs, steps):
    own = autoconfigure(all_auto(), Facts(25_600, 32, 3, "cpu", 1))
    choose_length(own, 100, seconds)
    assert (own.config.trainer.max_epochs, own.config.trainer.max_steps) == (epochs, steps)


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"), [(1, -1, 0.1), (60, -1, 5), (60, 50, 0.05), (5, -1, 5)]
)
def test_a_short_try_has_a_short_warmup(epochs, steps, warmup):
    config = TrainConfig(data=DataConfig(dataset="digits"))
    length = {"trainer.max_epochs": epochs, "trainer.max_steps": steps, "optim.warmup_epochs": 5.0}
    own = autoconfigure(config.changed(length), Facts(1, 8, 1, "cpu", 1))
    choose_length(own, 100)
    assert own.config.optim.warmup_epochs == warmup


def test_a_short_try_of_a_recipe_resumes_with_its_warmup(said):
    short = ["--config", FOLDER.replace("folder", "quickstart"), "--trainer.max_epochs", "1"]
    train.main([*short, *CPU, "--run.dir", "run", "--run.checkpoint_every", "5"])
    assert any(line.startswith("optim.warmup_epochs: 0.1 (a tenth of the run") for line in said)
    assert load("run/checkpoints/last.ckpt")["config"]["optim"]["warmup_epochs"] == 0.1
    Path("run").rename("whole")
    # Only what was asked for stands in config.yaml beside the decision.
    assert yaml.safe_load(Path("whole/config.yaml").read_text())["optim"]["warmup_epochs"] == 2
    train.main([*short, *CPU, "--run.dir", "cut", "--run.checkpoint_every", "5",
                "--run.keep_checkpoints", "9"])  # fmt: skip
    steps = sorted(Path("cut/checkpoints").glob("step_*.ckpt"))
    for path in steps[1:]:
        path.unlink()
    steps[0].replace("cut/checkpoints/last.ckpt")
    train.main(["--resume", "cut"])
    assert_same_end("whole", "cut")


def test_a_folder_alone_trains_resumes_and_can_be_repeated(pictures, two_steps, said):
    asked = ["--config", FOLDER, "--data.root", pictures, *CPU, "--run.checkpoint_every", "1"]
    train.main([*asked, "--run.dir", "chosen", "--run.keep_checkpoints", "99"])
    content = yaml.safe_load(Path("chosen/config.yaml").read_text())
    assert content["data"]["batch_size"] == "auto" and content["trainer"]["max_epochs"] == "auto"
    settings = content["decided"]["settings"]
    assert settings.keys() >= set(AUTOMATIC) and settings["data.image_size"] == 16
    for name in AUTOMATIC:
        assert any(line.startswith(f"{name}: {settings[name]} (") for line in said), name
        assert content["decided"]["reasons"][name]
    # The same settings by name give the same run.
    named = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    train.main([*asked, *named, "--run.dir", "named"])
    assert_same_end("chosen", "named")
    # A run that was cut goes on with what was decided, whatever the speed is now.
    Path("chosen/checkpoints/step_000000001.ckpt").replace("chosen/checkpoints/last.ckpt")
    for path in Path("chosen/checkpoints").glob("step_*.ckpt"):
        path.unlink()
    train.main(["--resume", "chosen"])
    assert_same_end("chosen", "named")
    with pytest.raises(UserError, match="data.batch_size is 4 but the run has 16"):
        train.main(["--resume", "chosen", "--data.batch_size", "4"])


def test_a_plan_leaves_nothing_behind(pictures, two_steps, capfd):
    before = sorted(Path().rglob("*"))
    found = train.main(["--config", FOLDER, "--data.root", pictures, *CPU, "--run.plan", "true"])
    assert sorted(Path().rglob("*")) == before
    assert found["plan"]["settings"]["trainer.max_epochs"] == 2
    assert found["plan"]["steps"] == 4 and found["seconds"] == 600.0
    err = capfd.readouterr().err
    for word in ("data.batch_size", "precision", "images/s", "an epoch", "in all", "disk"):
        assert f"\n{word} " in err, word


def test_a_plan_of_a_recipe_and_of_a_run_that_goes_on(pictures, two_steps):
    asked = ["--config", FOLDER, "--data.root", pictures, *CPU]
    whole = train.main([*asked, "--trainer.max_epochs", "3", "--run.plan", "true"])
    assert whole["plan"]["steps"] == 6
    train.main([*asked, "--run.dir", "run", "--run.checkpoint_every", "1"])
    bytes_before = Path("run/config.yaml").read_bytes()
    Path("run/checkpoints/last.ckpt").unlink()
    Path("run/checkpoints/step_000000004.ckpt").unlink()
    rest = train.main(["--resume", "run", "--run.plan", "true"])
    assert rest["plan"]["steps"] == 1 and Path("run/config.yaml").read_bytes() == bytes_before


def test_auto_epochs_need_a_time(pictures):
    with pytest.raises(UserError, match=r"run\.minutes 0: give the minutes"):
        train.main(["--config", FOLDER, "--data.root", pictures, "--run.minutes", "0"])


def test_evaluation_takes_no_auto(pictures, two_steps):
    asked = ["--config", FOLDER, "--data.root", pictures, *CPU]
    train.main([*asked, "--run.dir", "run"])
    with pytest.raises(UserError, match=r"data\.channels is auto: leave it out"):
        eval_knn.main(["--checkpoint", "run/checkpoints/last.ckpt", "--data.channels", "auto"])


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [("grey", 1), ("grey colour", 3), ("rgba", 3), ("palette", 3), ("bands", 16), ("pair", 2)],
)
def test_channels_of_a_set(tmp_path, kinds, channels):
    from PIL import Image

    from moco.images.sources import open_source

    folder = tmp_path / "set"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (24, 20, 16), dtype=np.uint8)
    for kind in kinds.split():
        for number in range(3):
            path = folder / f"{kind}{number}"
            if kind in ("bands", "pair"):
                np.save(path, values[..., : {"bands": 16, "pair": 2}[kind]])
                continue
            image = Image.fromarray(values[..., 0] if kind == "grey" else values[..., :3])
            mode = {"rgba": "RGBA", "palette": "P"}.get(kind, image.mode)
            image.convert(mode).save(f"{path}.png")
    source = open_source(DataConfig(root=str(folder), channels="auto"), "train")
    assert source.channels == channels
    assert source.read(0).shape == (channels, 24, 20)


def test_the_channels_stay_those_that_were_decided(tmp_path, monkeypatch):
    """Grey images would be broadcast to the network's three channels, and train without a word."""
    root = tmp_path / "root"
    write_pictures(root, [f"{n:02}.png" for n in range(48)], np.random.default_rng(0))
    run_tiny(root, "--data.channels", "auto")
    Path("run").rename("whole")
    shutil.copytree("whole", "run")
    for path in Path("run/checkpoints").iterdir():
        if path.name != "step_000000003.ckpt":
            path.unlink()
    monkeypatch.setattr(sources, "choose_channels", lambda *_: 1)  # as another sample would
    run_tiny(root, "--data.channels", "auto", "--resume", "run")
    assert_same_end("run", "whole")
