"""metrics.csv survives a kill and a resume, and no logger asks the network or a person."""

import csv
import os
import socket
from pathlib import Path

import pytest

from moco.config import RunConfig, UserError
from moco.training.tracking import COLUMNS, MetricsFile, loggers


def write(path: Path, steps: list[int], resume_step: int = 0, epoch: int = 0) -> None:
    metrics = MetricsFile(path, resume_step)
    for step in steps:
        metrics.log_metrics({"epoch": epoch, "train/loss": step / 100}, step)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steps(path: Path) -> list[str]:
    return [row["step"] for row in read(path)]


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.log_metrics({"epoch": 0, "train/loss": 5.5, "val/knn_top1": 61.0}, 10)
    rows = read(path)
    assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(COLUMNS)
    assert len(rows) == 1 and set(rows[0]) == set(COLUMNS)
    assert rows[0]["step"] == "10" and float(rows[0]["train/loss"]) == 5.5
    assert rows[0]["train/lr"] == "" and float(rows[0]["val/knn_top1"]) == 61.0


def test_a_resumed_run_goes_on_and_drops_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, [10, 20, 30, 40])
    write(path, [30, 40, 50], resume_step=20, epoch=1)
    assert steps(path) == ["10", "20", "30", "40", "50"]
    assert [row["epoch"] for row in read(path)] == ["0", "0", "1", "1", "1"]
    assert float(read(path)[1]["train/loss"]) == 0.2
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_afresh(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, [10, 20])
    write(path, [1])
    assert steps(path) == ["1"]


def test_a_resume_without_a_file_starts_one(tmp_path):
    write(tmp_path / "metrics.csv", [30], resume_step=20)
    assert steps(tmp_path / "metrics.csv") == ["30"]


@pytest.mark.parametrize(
    "torn",
    [
        "",
        "2",  # of 28: the number itself is cut
        "28,",
        "20,2,0.5",  # a step that is kept, cut after a few columns
        "abc",
        ",,",
        '"28',
        "28" + "," * (len(COLUMNS) - 1),  # whole, of a later step, without a line's end
    ],
)
def test_a_torn_last_row_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    write(path, [10, 20])
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(torn)
    write(path, [30], resume_step=25)
    assert steps(path) == ["10", "20", "30"]
    assert None not in read(path)[0] and len(path.read_text().splitlines()) == 4


def test_zeros_that_a_power_cut_leaves_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, [10, 20])
    with path.open("ab") as file:
        file.write(b"\0" * 64)
    write(path, [30], resume_step=25)
    assert steps(path) == ["10", "20", "30"]


def test_csv_alone_unless_asked(tmp_path):
    found = loggers(RunConfig(), tmp_path, 0)
    assert [type(logger) for logger in found] == [MetricsFile]
    assert found[0].path == tmp_path / "metrics.csv"
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_into_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    _, board = loggers(RunConfig(tensorboard=True), tmp_path, 0)
    board.log_metrics({"train/loss": 1.0}, 1)
    board.finalize("success")
    events = [p for p in tmp_path.rglob("events.*") if p.is_file()]
    assert len(events) == 1


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    home = "lightning_fabric.loggers.tensorboard"
    monkeypatch.setattr(f"{home}._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(f"{home}._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(UserError, match=r"run\.tensorboard is true.*pip install tensorboard"):
        loggers(RunConfig(tensorboard=True), tmp_path, 0)


@pytest.fixture
def wandb_mode(tmp_path, monkeypatch):
    """Tell how wandb would be started, with an empty home and every way out closed."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what the logger sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise AssertionError("asked the network or a person")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(wandb, "login", refuse)

    def mode() -> str:
        started = []
        monkeypatch.setattr(wandb, "init", lambda **given: started.append(given))
        _, logger = loggers(RunConfig(wandb=True, wandb_project="p"), tmp_path / "run-1", 0)
        _ = logger.experiment
        assert len(started) == 1
        assert started[0]["project"] == "p" and started[0]["name"] == "run-1"
        assert started[0]["dir"] == str(tmp_path / "run-1")
        return os.environ.get("WANDB_MODE", "online")

    return mode


OFFLINE = ("offline", "dryrun")  # two names of one mode


def test_wandb_without_a_key_is_offline(wandb_mode):
    assert wandb_mode() in OFFLINE


def test_wandb_with_a_key_is_online(wandb_mode, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"


def test_wandb_finds_the_key_of_an_earlier_login(wandb_mode, tmp_path):
    entry = "machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n"
    (tmp_path / ".netrc").write_text(entry)
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode() == "online"


@pytest.mark.parametrize("content", ["machine", "machine github.com login a password b\n"])
def test_wandb_is_offline_where_the_netrc_holds_no_key(wandb_mode, tmp_path, content):
    (tmp_path / ".netrc").write_text(content)
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode() in OFFLINE


def test_wandb_stays_offline_when_told_to(wandb_mode, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode() in OFFLINE


def test_wandb_stays_disabled_when_told_to(wandb_mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
