"""What a run may go on with, and that the road works which is named where it may not."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from runs import at, run_tiny, trained

import train
from moco.config import TrainConfig, UserError
from moco.training import resuming
from moco.training.resuming import check_same

pytestmark = pytest.mark.usefixtures("in_tmp")
ROADS = {
    "more epochs, and more": ["--trainer.max_epochs", "3", "--optim.weight_decay", "0.001"],
    "another image size": ["--data.image_size", "20", "--data.flip", "[0.5,0.0]"],
    "another rate, and more": ["--optim.lr", "0.02", "--optim.nesterov", "true"],
}


def road_in(text: str) -> list[str]:
    """Return the words of the command line that a message names."""
    return shlex.split(text.partition("from its weights: ")[2].partition(" (images for kNN")[0])


@pytest.mark.parametrize("name", ROADS)
def test_the_road_that_a_refused_resume_names_works(images, name, said):
    trained(images, "--trainer.max_epochs", "1")
    with pytest.raises(UserError) as error:
        train.main(["--resume", "run", *ROADS[name]])
    for option in ROADS[name][::2]:
        assert f"{option[2:]} is" in str(error.value), "all that differs is named at once"
    result = train.main(road_in(str(error.value)))
    assert result["run_dir"] == "run-2" and result["steps"] == (9 if "epochs" in name else 3)
    assert any("starts from run/checkpoints/last.ckpt" in line for line in said)
    assert at(1, "run-2")["global_step"] == 1


def test_the_road_to_more_epochs_works(images, said):
    run_tiny(images, "--trainer.max_epochs", "1", "--optim.schedule", "constant")
    train.main(["--resume", "run"])
    assert any("nothing to do; to train longer, add --extend" in line for line in said)
    with pytest.raises(UserError, match=r"go on for longer with --extend 2$"):
        train.main(["--resume", "run", "--trainer.max_epochs", "3"])
    assert train.main(["--resume", "run", "--extend", "2"])["steps"] == 9


def test_a_finished_run_of_so_many_steps_names_a_road_that_is_open(images, said):
    trained(images, "--trainer.max_steps", "2")
    train.main(["--resume", "run"])
    assert any("to train longer, start a new run with --init_from run/" in line for line in said)


def test_the_road_to_other_images_works(copied):
    run_tiny(copied, "--trainer.max_epochs", "1")
    (copied / "47.jpg").unlink()
    with pytest.raises(UserError, match=r"47 images, the run has 48.*set run.knn_root\)") as error:
        train.main(["--resume", "run", "--data.root", str(copied)])
    words = road_in(str(error.value))
    words[words.index("--run.dir") + 1] = "run-3"
    assert train.main(words)["run_dir"] == "run-3"


def test_another_network_is_sent_to_a_new_run_without_the_weights():
    config, stored = TrainConfig(), asdict(TrainConfig())
    config.model.backbone = "resnet18"
    with pytest.raises(UserError, match="train another network in a new run, without --resume"):
        check_same(config, stored, Path("runs/x"))


def test_the_same_recipe_may_go_on():
    check_same(TrainConfig(), asdict(TrainConfig()), Path("runs/x"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("model.temperature", 0.07),
        ("model.queue_size", 4096),
        ("optim.lr", 0.06),
        ("optim.milestones", [60]),
        ("data.batch_size", 128),
        ("data.crop_min", 0.08),
        ("data.mean", [0.5, 0.5, 0.5]),
        ("trainer.max_epochs", 100),
        ("trainer.precision", "32-true"),
        ("run.seed", 1),
    ],
)
def test_another_recipe_is_refused_by_name(name, value):
    config, stored = TrainConfig(), asdict(TrainConfig())
    group, field = name.split(".")
    setattr(getattr(config, group), field, value)
    with pytest.raises(UserError) as caught:
        check_same(config, stored, Path("runs/x"))
    for part in ("runs/x", name, repr(value), repr(stored[group][field])):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("data.root", "elsewhere"),
        ("data.num_workers", 3),
        ("data.resident", "off"),
        ("trainer.devices", 2),
        ("trainer.accelerator", "cpu"),
        ("run.dir", "elsewhere"),
        ("run.checkpoint_every", 5),
        ("run.wandb", True),
        ("model.compile", "on"),
    ],
)
def test_where_and_how_a_run_runs_may_differ(name, value):
    config = TrainConfig()
    group, field = name.split(".")
    setattr(getattr(config, group), field, value)
    check_same(config, asdict(TrainConfig()), Path("runs/x"))


def test_an_older_checkpoint_had_the_default_of_what_it_does_not_know():
    stored = asdict(TrainConfig())
    del stored["model"]["symmetric"]
    check_same(TrainConfig(), stored, Path("runs/x"))
    config = TrainConfig()
    config.model.symmetric = "mean"
    with pytest.raises(UserError, match=r"model\.symmetric is 'mean' but the run has 'none'"):
        check_same(config, stored, Path("runs/x"))


def test_what_may_differ_names_real_settings():
    real = {
        f"{group.name}.{item.name}"
        for group in fields(TrainConfig)
        for item in fields(getattr(TrainConfig(), group.name))
    }
    assert real >= resuming._MAY_DIFFER


def test_what_a_recipe_leaves_open_since_then_stays_as_the_run_began(images):
    """Of each resume, and of a new run from the config.yaml that it writes."""
    trained(images, "--trainer.max_epochs", "1")
    open_now = ["--optim.name", "auto", "--model.width", "auto"]
    for _ in range(2):
        longer = ["--trainer.max_epochs", "1", "--resume", "run", "--extend", "1", "--yes"]
        run_tiny(images, *open_now, *longer)
        written = yaml.safe_load(Path("run/config.yaml").read_text(encoding="utf-8"))
        assert written["optim"]["name"] == "auto"
        assert written["decided"]["settings"]["optim.name"] == "sgd"
        assert written["decided"]["settings"]["model.width"] == 0.125
        assert written["decided"]["reasons"]["optim.name"] == "as the run began"
