"""A disk that fills up leaves whole files, and the run goes on or says why it ends."""

from __future__ import annotations

import csv
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from runs import assert_same_end, load, run_tiny

import train
from moco.config import RunError
from moco.training.tracking import MetricsFile
from moco.training.writing import AtomicCheckpointIO

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of 3 MiB to be filled; skip the test where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs; the test with RLIMIT_FSIZE takes its place")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class FillDisk(pl.Callback):
    """Fill a disk after one step and make room after another."""

    def __init__(self, path: Path, full: int, free: int) -> None:
        self.path, self.full, self.free = path, full, free

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.strategy.checkpoint_io.wait()
        self.act(trainer.global_step)

    def act(self, step: int) -> None:
        if step == self.full:
            with self.path.open("wb", buffering=0) as file:
                while shutil.disk_usage(self.path.parent).free:
                    file.write(bytes(4096))
        if step == self.free:
            self.path.unlink()


def test_a_full_disk_keeps_the_old_checkpoint_says_so_and_goes_on(
    images, small_disk, with_callback, said
):
    with_callback(FillDisk(small_disk / "ballast", 2, 4))
    where = str(small_disk / "run")
    result = run_tiny(images, "--run.keep_checkpoints", "1", run_dir=where)
    assert result["steps"] == 6
    assert "step_000000003.ckpt was not written, the one before stays" in " ".join(said)
    assert f"the disk of {where}/checkpoints is full" in " ".join(said)
    run_tiny(images, run_dir="roomy")
    assert_same_end("roomy", where)
    steps = [line.split(",")[0] for line in Path(where, "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "1", "2", "3", "4", "5", "6"]


def test_rows_of_metrics_wait_for_room(small_disk, said):
    metrics = MetricsFile(small_disk / "metrics.csv")
    metrics.log_metrics({"epoch": 0}, -1)
    FillDisk(small_disk / "ballast", 0, 9).act(0)
    for step in range(400):
        metrics.log_metrics({"epoch": 0, "train/loss": step / 7}, step)
    assert [line for line in said if "metrics.csv waits to be written: No space" in line]
    with (small_disk / "metrics.csv").open() as file:
        assert all(None not in row for row in csv.DictReader(file)), "no torn row"
    (small_disk / "ballast").unlink()
    metrics.log_metrics({"epoch": 1}, 400)
    with (small_disk / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(-1, 401))
    assert [float(row["train/loss"]) for row in rows[1:-1]] == [n / 7 for n in range(400)]


def test_a_disk_full_to_the_end_exits_with_1_and_resumes(images, small_disk, with_callback):
    with_callback(FillDisk(small_disk / "ballast", 2, 99))
    where = str(small_disk / "run")
    with pytest.raises(RunError, match="the last checkpoint could not be written: make room"):
        run_tiny(images, "--run.keep_checkpoints", "1", run_dir=where)
    assert load(f"{where}/checkpoints/last.ckpt")["global_step"] == 2
    (small_disk / "ballast").unlink()
    assert train.main(["--resume", where])["steps"] == 6


def test_a_disk_without_room_for_any_checkpoint_says_to_start_again(
    images, small_disk, with_callback, said
):
    with_callback(FillDisk(small_disk / "ballast", 1, 99))
    where = str(small_disk / "run")
    with pytest.raises(RunError, match="no checkpoint could be written: .* and start again"):
        run_tiny(images, "--run.checkpoint_every", "6", run_dir=where)
    assert "step_000000006.ckpt was not written, and there is none before it" in " ".join(said)


@pytest.fixture
def file_limit():
    """Let no file of this process grow beyond so many bytes, which needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_row_of_metrics_is_written_whole_or_not_at_all(tmp_path, file_limit):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.log_metrics({"epoch": 0}, 0)
    size = path.stat().st_size
    file_limit(size + 7)  # within the next row
    metrics.log_metrics({"epoch": 1, "train/loss": 2.5}, 1)
    assert path.stat().st_size == size
    file_limit(None)
    metrics.log_metrics({"epoch": 2}, 2)
    with path.open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_checkpoint_in_the_place_of_another_is_whole_or_not_there(tmp_path, file_limit, said):
    io, path, written = AtomicCheckpointIO(), tmp_path / "last.ckpt", []
    io.save_checkpoint({"weight": torch.zeros(9)}, path, written.append)
    io.wait()
    before = path.read_bytes()
    file_limit(4096)
    io.save_checkpoint({"weight": torch.zeros(9000)}, path, written.append)
    io.wait()
    assert path.read_bytes() == before and len(said) == 1 and written == [path]
    with pytest.raises((OSError, RuntimeError)):  # another callback's, which waits for it
        io.save_checkpoint({"weight": torch.zeros(9000)}, path)
    assert path.read_bytes() == before and len(said) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(images, file_limit, said):
    run_tiny(images)
    for path in Path("run/checkpoints").iterdir():
        if path.name != "step_000000002.ckpt":
            path.unlink()
    before = Path("run/checkpoints/step_000000002.ckpt").read_bytes()
    file_limit(len(before) // 2)
    with pytest.raises(RunError, match="could not be written"):
        train.main(["--resume", "run"])
    file_limit(None)
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_000000002.ckpt"]
    assert Path("run/checkpoints/step_000000002.ckpt").read_bytes() == before
    assert any("step_000000003.ckpt was not written" in line for line in said)
    assert not list(Path("run").rglob(".*.tmp"))
