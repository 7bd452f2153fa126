"""Runs that resume: on two ranks, with other workers, from a torn file, twice, after kills."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from processes import ROOT, end_group, finish, start
from runs import TINY, assert_same_end, at, load, main_on_rank, run_tiny, same, trained

import train
from moco.config import UserError
from moco.run_directory import is_whole, sole_run

pytestmark = pytest.mark.usefixtures("in_tmp")

RANKS = ["--trainer.max_epochs", "1", "--model.key_bn", "shuffle"]


@pytest.mark.parametrize("resident", ["memory", "off"])
def test_two_ranks_resume_to_the_same_bits(images, two_ranks, tmp_path, resident):
    arguments = [*TINY, *RANKS, "--data.root", str(images), "--data.resident", resident]
    arguments += ["--data.num_workers", "1", "--run.dir", "whole"]
    arguments += ["--optim.schedule", "plateau"]  # which each rank's own losses steer
    two_ranks.run(main_on_rank, "train", arguments, str(tmp_path))
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy("whole/config.yaml", "run/config.yaml")
    shutil.copy("whole/checkpoints/step_000000001.ckpt", "run/checkpoints/last.ckpt")
    # Each rank had a worker before and has none now; neither that nor the stop changes a bit.
    resumed = ["--resume", "run", "--data.num_workers", "0"]
    (result, _), (other, _) = two_ranks.run(main_on_rank, "train", resumed, str(tmp_path))
    assert (result["steps"], other) == (3, {})
    assert_same_end("whole", "run")


def test_streamed_resume_with_other_numbers_of_workers(images):
    run_tiny(images, "--data.resident", "off", "--data.num_workers", "0", run_dir="whole")
    for step, count in ((2, 2), (4, 1)):
        shutil.copytree("whole", f"from{step}")
        path = f"from{step}/checkpoints/step_{step:09d}.ckpt"
        train.main(["--resume", path, "--data.num_workers", str(count)])
        assert_same_end("whole", f"from{step}")


@pytest.mark.parametrize("drop", ["drop_rate", "drop_path_rate"])
def test_networks_that_drop_at_random_resume_to_the_same_bits(images, monkeypatch, drop):
    accumulate = ["--trainer.accumulate_grad_batches", "2"]
    run_tiny(images, *accumulate, "--trainer.max_steps", "1", run_dir="plain")
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **{drop: 0.5}))
    run_tiny(images, *accumulate, run_dir="whole")
    assert not same(at(1, "whole")["state_dict"], at(1, "plain")["state_dict"]), "nothing dropped"
    shutil.copytree("whole", "run")
    train.main(["--resume", "run/checkpoints/step_000000001.ckpt"])
    assert_same_end("whole", "run")


def test_accumulated_batches_are_one_row_of_metrics(images):
    """An epoch has three batches, so a step of two and one of one."""
    run_tiny(images, "--trainer.accumulate_grad_batches", "2")
    with open("run/metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_a_torn_last_checkpoint_falls_back_to_the_one_before(images):
    trained(images, run_dir="whole")
    shutil.copytree("whole", "run")
    newest, last = Path("run/checkpoints/step_000000006.ckpt"), Path("run/checkpoints/last.ckpt")
    last.unlink()
    os.link(newest, last)  # as a run leaves them: both names are of one file
    os.truncate(last, last.stat().st_size // 2)
    assert train.main(["--resume", "run"])["steps"] == 6
    assert_same_end("whole", "run")
    assert at(6)["global_step"] == 6, "the torn file is replaced"


@pytest.mark.parametrize("config", [True, False])
def test_a_checkpoint_that_torch_cannot_read_falls_back_to_the_one_before(images, said, config):
    """Its archive's directory has a flipped bit, which no checksum covers."""
    trained(images, run_dir="whole")
    shutil.copytree("whole", "run")
    newest, last = Path("run/checkpoints/step_000000006.ckpt"), Path("run/checkpoints/last.ckpt")
    content = bytearray(newest.read_bytes())
    content[content.rindex(b"PK\6\6") + 16] ^= 2  # the number of this disk, of which there is one
    last.unlink()
    newest.write_bytes(content)
    os.link(newest, last)
    if not config:
        Path("run/config.yaml").unlink()
    assert is_whole(last)
    with pytest.raises(RuntimeError):
        load(last)
    assert train.main(["--resume", "run"])["steps"] == 6
    assert_same_end("whole", "run")
    assert any("last.ckpt cannot be read" in line and "the one before" in line for line in said)
    for path in Path("run/checkpoints").iterdir():
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"run holds no checkpoint that can be read \(not last.ckpt\)"
    ):
        train.main(["--resume", "run"])


def test_resuming_twice_from_the_end_of_an_epoch(images):
    run_tiny(images, "--trainer.max_epochs", "3", run_dir="whole")
    shutil.copytree("whole", "run")
    assert [at(step)["epoch"] for step in range(1, 10)] == [0, 0, 1, 1, 1, 2, 2, 2, 3], "whole ones"
    for step in (3, 4, 6):
        for path in Path("run/checkpoints").glob("step_*.ckpt"):
            if int(path.stem[5:]) > step:
                path.unlink()
        train.main(["--resume", f"run/checkpoints/step_{step:09d}.ckpt"])
        assert_same_end("whole", "run")
        assert at(9)["epoch"] == 3


def test_a_short_torture():
    """Kill three times at random moments; `make torture` kills thirty times and more."""
    words = ["--kills", "3", "--epochs", "3"]
    code, out, err = finish(start(*words, script=ROOT / "tests/torture.py"))
    assert code == 0, err
    assert out.startswith("3 kills")


def test_old_checkpoints_are_pruned(images):
    run_tiny(images, "--run.keep_checkpoints", "2")
    kept = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert kept == ["last.ckpt", "step_000000005.ckpt", "step_000000006.ckpt"]


@pytest.mark.parametrize("damage", ["missing", "cut", "shorter", "binary"])
def test_a_missing_or_damaged_config_is_made_anew_from_the_checkpoint(images, damage, said):
    trained(images, "--trainer.max_epochs", "1", run_dir="whole")
    shutil.copytree("whole", "run")
    path = Path("run/config.yaml")
    content = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        half = content[: len(content) // 2].rpartition("\n")[0]
        damaged = {"binary": b"\xff\x00\x01", "cut": b"model: {back", "shorter": half.encode()}
        path.write_bytes(damaged[damage])
    for later in ("step_000000003", "last"):
        Path(f"run/checkpoints/{later}.ckpt").unlink()
    assert train.main(["--resume", "run"])["steps"] == 3
    assert_same_end("whole", "run")
    assert len([line for line in said if "run/config.yaml is missing or damaged" in line]) == 1
    assert yaml.safe_load(path.read_text())["model"] == yaml.safe_load(content)["model"]


@pytest.mark.parametrize("chosen", [[], ["--run.dir", "mine"]])
def test_a_copied_checkpoint_goes_on_in_a_directory_of_its_own(images, chosen, said):
    """By its own settings, but for the directory that they name."""
    trained(images, "--trainer.max_epochs", "1", run_dir="whole")
    home = Path("home/Downloads")
    home.mkdir(parents=True)
    shutil.copy("whole/checkpoints/step_000000002.ckpt", home / "last.ckpt")
    result = train.main(["--resume", "home/Downloads/last.ckpt", *chosen])
    run_dir = Path(result["run_dir"])
    assert run_dir == Path("mine") if chosen else run_dir.parent == Path("runs")
    assert any(line.endswith(f"the run goes on in {run_dir}") for line in said)
    assert_same_end("whole", result["run_dir"])
    assert [str(path) for path in Path("home").rglob("*")] == [str(home), str(home / "last.ckpt")]
    assert train.main(["--resume", str(run_dir)])["steps"] == 3


def test_a_run_goes_on_where_it_lies_and_says_so_to_who_names_another_place(images):
    trained(images, "--trainer.max_steps", "1")
    with pytest.raises(UserError, match=r"run.dir is other but --resume goes on .* in run: leave"):
        train.main(["--resume", "run", "--run.dir", "other"])
    assert not Path("other").exists()
    assert train.main(["--resume", "run/checkpoints/last.ckpt", "--run.dir", "./run"])["steps"] == 1


def test_a_relative_root_of_a_checkpoint_says_whence_it_came(copied, monkeypatch):
    run_tiny(copied.name, "--trainer.max_epochs", "1")
    monkeypatch.chdir("run")
    with pytest.raises(UserError, match=r"'images' came from the checkpoint .* not in .*/run: it"):
        train.main(["--resume", "."])
    assert train.main(["--resume", ".", "--data.root", str(copied)])["steps"] == 3


def test_a_resume_beside_the_live_run_is_refused_and_changes_nothing(images, request):
    trained(images, "--trainer.max_epochs", "1")
    Path("run/checkpoints/step_000000003.ckpt").unlink()
    Path("run/checkpoints/last.ckpt").unlink()  # step 2 is the newest now
    owner = request.getfixturevalue("held")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*.*")}
    with pytest.raises(UserError, match=f"run is in use by process {owner.pid} on "):
        train.main(["--resume", "run"])
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*.*")}
    end_group(owner)
    assert train.main(["--resume", "run"])["steps"] == 3


def test_auto_goes_on_with_a_run_that_was_moved(images):
    """Its config.yaml names the directory of before, where there is no run any more."""
    trained(images, "--trainer.max_epochs", "1")
    Path("run/checkpoints/step_000000003.ckpt").unlink()
    Path("run/checkpoints/last.ckpt").unlink()
    Path("runs").mkdir()
    Path("run").rename("runs/moved")
    result = train.main(["--resume", "auto"])
    assert (result["run_dir"], result["steps"]) == ("runs/moved", 3)
    assert not Path("run").exists()


@pytest.mark.parametrize("moment", ["importing", "locking"])
def test_auto_goes_on_with_what_is_first_saved_while_it_starts(images, monkeypatch, moment):
    """As where rank 0 outlives its launcher until its first checkpoint is written."""
    trained(images, "--trainer.max_epochs", "1", run_dir="whole")
    shutil.copytree("whole", "before", ignore=shutil.ignore_patterns("last*", "*2.ckpt", "*3.ckpt"))
    config = Path("before/config.yaml")
    config.write_text(config.read_text().replace("dir: whole", "dir: run"))

    def save(*words):
        shutil.copytree("before", "run")

    def lock(run_dir, is_new):
        save()
        return sole_run(run_dir, is_new)

    where, what = {
        "importing": ("moco.command.train.start_ranks", save),
        "locking": ("moco.training.run.sole_run", lock),
    }[moment]
    monkeypatch.setattr(where, what)
    result = run_tiny(images, "--trainer.max_epochs", "1", "--resume", "auto")
    assert (result["run_dir"], result["steps"]) == ("run", 3)
    assert_same_end("whole", "run")
    rows = Path("run/metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == list("123")


def test_a_resumed_run_goes_on_from_what_the_process_before_saved_last(images, monkeypatch, said):
    """It may still save, and prune older checkpoints, until its lock is free."""
    trained(images)
    folder = Path("run/checkpoints")
    (folder / "last.ckpt").unlink()
    for step in (4, 5, 6):
        (folder / f"step_{step:09d}.ckpt").rename(f"later{step}")

    @contextlib.contextmanager
    def freed(run_dir, is_new):
        for step in (1, 2, 3):
            (folder / f"step_{step:09d}.ckpt").unlink(missing_ok=True)
        Path("later5").rename(folder / "step_000000005.ckpt")
        yield

    monkeypatch.setattr("moco.training.run.sole_run", freed)
    assert train.main(["--resume", "run"])["steps"] == 6
    rows = Path("run/metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == list("123456")
    assert not (folder / "step_000000004.ckpt").exists(), "step 4 was repeated"


def test_another_data_set_is_refused(copied):
    run_tiny(copied)
    (copied / "47.jpg").unlink()
    with pytest.raises(UserError, match=r"the data set holds 47 images, the run has 48"):
        train.main(["--resume", "run"])
    (copied / "other.jpg").write_bytes((copied / "00.jpg").read_bytes())
    with pytest.raises(UserError, match=r"48 images as the run has, but others"):
        train.main(["--resume", "run"])


def test_a_run_of_another_version_goes_on_and_says_that_it_is_not_exact(images, said):
    trained(images)
    state = load("run/checkpoints/step_000000003.ckpt")
    assert state.pop("version") == 2
    torch.save(state, "old.ckpt")
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").mkdir()
    Path("old.ckpt").rename("run/checkpoints/last.ckpt")
    assert train.main(["--resume", "run"])["steps"] == 6
    assert load("run/checkpoints/last.ckpt")["version"] == 2
    (line,) = [line for line in said if "version" in line]
    assert "begun by version 1" in line and "not exactly" in line and "\n" not in line
    before = len(said)
    train.main(["--resume", "run"])
    assert not any("version" in line for line in said[before:])


def test_settings_of_a_run_name_no_place_to_write(images, tmp_path):
    """A run that someone sent goes on where it lies, whatever directory its settings name."""
    trained(images, "--trainer.max_epochs", "1")
    Path("run").rename("sent")
    elsewhere, config = tmp_path / "elsewhere", Path("sent/config.yaml")
    config.write_text(config.read_text().replace("dir: run", f"dir: {elsewhere}"))
    state = load("sent/checkpoints/step_000000002.ckpt")
    state["config"]["run"]["dir"] = str(elsewhere)
    shutil.rmtree("sent/checkpoints")
    Path("sent/checkpoints").mkdir()
    torch.save(state, "sent/checkpoints/last.ckpt")
    assert train.main(["--resume", "sent"])["steps"] == 3
    assert load("sent/checkpoints/last.ckpt")["global_step"] == 3
    assert f"dir: {elsewhere}" in config.read_text()
    assert not elsewhere.exists() and not Path("run").exists()


def test_a_run_of_an_older_version_goes_on_without_the_settings_that_are_gone(images, said):
    """A checkpoint and a config.yaml that know `run.skip_nonfinite`, which was a setting once."""
    trained(images, run_dir="whole")
    shutil.copytree("whole", "run")
    state = at(2, "run")
    state["config"]["run"]["skip_nonfinite"] = 0
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").mkdir()
    torch.save(state, "run/checkpoints/last.ckpt")
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    stored["run"]["skip_nonfinite"] = 0
    Path("run/config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=r"unknown setting run\.skip_nonfinite"):
        train.main(["--config", "run/config.yaml", "--run.dir", "other"])
    assert train.main(["--resume", "run"])["steps"] == 6
    assert_same_end("whole", "run")
    assert len([line for line in said if "run.skip_nonfinite" in line]) == 1
    assert "skip_nonfinite" not in Path("run/config.yaml").read_text()
