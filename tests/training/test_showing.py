"""Loggers get the settings and pictures, and a resumed run goes on in the same run of theirs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import write_pictures
from pytorch_lightning.loggers import MLFlowLogger
from runs import STREAMED, TINY, main_on_rank, run_tiny

import train
from moco.config import RunConfig, UserError
from moco.training import showing, tracking

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "images", [f"{i:02d}.png" for i in range(48)], _rng())
    return tmp_path / "images"


def _rng():
    return np.random.default_rng(0)


def test_tensorboard_gets_settings_views_and_neighbours(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tiny(folder, "--run.tensorboard", "true")
    found = EventAccumulator("run/tensorboard", {"images": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    tags = found.Tags()
    assert sorted(tags["images"]) == ["neighbours", "views"]
    views, near = (found.Images(name)[0] for name in ("views", "neighbours"))
    assert (views.step, near.step) == (0, 6) and views.width > 300 and near.width > 300
    assert "train/loss" in tags["scalars"]
    settings = Path("run/tensorboard/hparams.yaml").read_text(encoding="utf-8")
    assert "optim.lr: 0.01" in settings


def test_rank_0_draws_alone(folder, two_ranks, tmp_path):
    """What it streams for a picture, the others do not see: it must not wait for them."""
    pytest.importorskip("tensorboard")
    words = [*TINY, *STREAMED, "--data.root", str(folder), "--run.dir", "run"]
    words += ["--model.key_bn", "plain", "--run.tensorboard", "true"]
    (found, said), _ = two_ranks.run(main_on_rank, "train", words, str(tmp_path))
    assert found["steps"] == 6
    assert not [line for line in said if "lack" in line]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Keep wandb's files here and its server away."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return wandb


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(folder, offline, monkeypatch):
    asked, shown = [], []

    class Run:
        """Takes what the logger hands over, as wandb's own run would."""

        id, name = "x", "run"

        class config:
            @staticmethod
            def update(values, **_):
                asked.append(values["optim.lr"])

        def define_metric(self, *_, **__): ...

        def log(self, values, **_):
            shown.extend(name for name in values if name in ("views", "neighbours"))

    monkeypatch.setattr(offline, "init", lambda **given: asked.append(given["id"]) or Run())
    monkeypatch.setattr(offline, "run", None)
    run_tiny(folder, "--run.wandb", "true")
    assert shown == ["views", "neighbours"] and 0.01 in asked
    train.main(["--resume", "run/checkpoints/step_000000002.ckpt"])
    assert shown == ["views", "neighbours", "neighbours"]
    first, again = (value for value in asked if isinstance(value, str))
    assert first == again == json.loads(Path("run/loggers.json").read_text())["wandb"]
    run_tiny(folder, "--run.wandb", "true", "--trainer.max_steps", "1", run_dir="other")
    assert asked[-2] != first


class Client:
    """Takes what the logger of MLflow hands over."""

    def __init__(self):
        self.seen = []

    def log_image(self, run_id, image, artifact_file):
        self.seen.append((run_id, image.size, artifact_file))


def test_mlflow_gets_a_picture_as_a_file(monkeypatch):
    from PIL import Image

    client, logger = Client(), MLFlowLogger.__new__(MLFlowLogger)
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "r")
    showing.hand_over(logger, "views", Image.new("RGB", (8, 4)), 3)
    assert client.seen == [("r", (8, 4), "views.png")]


def test_mlflow_keeps_its_files_in_the_run_and_goes_on_in_its_run(folder, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_tiny(folder, "--run.mlflow", "true")
    first = tracking._read_ids(Path("run"))["mlflow"]
    train.main(["--resume", "run/checkpoints/step_000000002.ckpt"])
    assert tracking._read_ids(Path("run"))["mlflow"] == first
    from mlflow.tracking import MlflowClient

    run = MlflowClient(f"sqlite:///{Path('run').absolute()}/mlflow.db").get_run(first)
    assert run.data.params["optim.lr"] == "0.01" and "train/loss" in run.data.metrics
    assert sorted(path.name for path in Path("run/mlflow").rglob("*.png")) == [
        "neighbours.png",
        "views.png",
    ]


def test_mlflow_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("pytorch_lightning.loggers.mlflow._MLFLOW_AVAILABLE", False)
    with pytest.raises(UserError, match=r"run\.mlflow is true.*pip install mlflow"):
        tracking.loggers(RunConfig(mlflow=True), tmp_path, 0)


def test_a_picture_that_fails_ends_no_run(folder, said, monkeypatch):
    pytest.importorskip("tensorboard")

    def fail(*_):
        raise OSError("no room\nleft")

    monkeypatch.setattr(showing, "hand_over", fail)
    assert run_tiny(folder, "--run.tensorboard", "true")["steps"] == 6
    assert "the loggers lack a picture of views: no room left" in said
