"""Run directories: which run and checkpoint `--resume` means, and which recipes may go on."""

import errno
import os
import signal
import socket
import zipfile
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from moco import run_directory
from moco.config import DataConfig, TrainConfig, UserError
from moco.run_directory import (
    find_run,
    is_whole,
    last_whole,
    new_run,
    sole_run,
    write_config,
    write_names,
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(path: Path, torn: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": 1, "weights": torch.zeros(2000)}, path)
    if torn:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
    return path


def run(name: str, age: float = 0, **torn: bool) -> Path:
    """Make a run with checkpoints such as last=False (whole) or step_000000020=True (torn)."""
    folder = Path("runs") / name
    for stem, cut in (torn or {"last": False}).items():
        checkpoint(folder / "checkpoints" / f"{stem}.ckpt", cut)
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


# New runs


def test_a_new_run_is_named_after_its_recipe_or_data():
    assert new_run(TrainConfig(), "quickstart").parent == Path("runs")
    assert new_run(TrainConfig(), "quickstart").name.startswith("quickstart-20")
    config = TrainConfig(data=DataConfig(dataset="digits"))
    assert new_run(config, "").name.startswith("digits-20")
    assert not Path("runs").exists()


def test_runs_started_in_one_second_have_directories_of_their_own():
    names = [new_run(TrainConfig(), "x").name for _ in range(2)]  # in one process, and at once
    assert names[0] != names[1] and names == sorted(names)


def test_a_chosen_directory_is_taken_unless_it_holds_a_run():
    config = TrainConfig()
    config.run.dir = "mine"
    assert new_run(config, "x") == Path("mine")
    Path("mine").mkdir()
    assert new_run(config, "x") == Path("mine")
    checkpoint(Path("mine/checkpoints/last.ckpt"))
    with pytest.raises(UserError, match=r"run\.dir mine holds a run.*--resume mine"):
        new_run(config, "x")
    config.run.dir = "file"
    Path("file").write_text("x")
    with pytest.raises(UserError, match=r"run\.dir file is a file"):
        new_run(config, "x")


@pytest.mark.parametrize("link", ["out", "out/below/it"])
def test_a_link_to_nowhere_is_named_with_its_target(link):
    Path("out").symlink_to("gone")
    config = TrainConfig()
    config.run.dir = link
    with pytest.raises(UserError, match=rf"run\.dir {link}: out links to gone, which does not ex"):
        new_run(config, "x")
    with pytest.raises(UserError) as error, sole_run(Path(link), is_new=False):
        pytest.fail("there is no such directory")
    assert "(out links to gone, which does not exist): name another" in str(error.value)


@pytest.mark.parametrize(("number", "makes_room"), [("ENOSPC", True), ("EACCES", False)])
def test_only_a_full_disk_is_a_matter_of_room(monkeypatch, number, makes_room):
    def fail(*arguments, **options):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match="cannot be written") as error, sole_run(Path("x"), True):
        pytest.fail("there is no such directory")
    assert ("make room" in str(error.value)) == makes_room


# One run in a directory


@pytest.mark.parametrize("is_new", [True, False])
def test_a_directory_in_use_is_refused_by_its_owners_process_and_host(held, is_new):
    owner = rf"run directory run is in use by process {held.pid} on {socket.gethostname()}: stop"
    with pytest.raises(UserError, match=owner), sole_run(Path("run"), is_new):
        pytest.fail("two runs in one directory")


def test_a_dead_owners_directory_is_taken_over_although_its_worker_lives(held):
    os.kill(held.pid, signal.SIGKILL)
    held.wait()
    with sole_run(Path("run"), is_new=True):
        assert Path("run/.lock").read_text().split()[1] == str(os.getpid())


def test_a_run_that_has_begun_and_ended_while_another_started_is_no_place_for_it():
    run("one")
    with pytest.raises(UserError, match="holds a run already"), sole_run(Path("runs/one"), True):
        pytest.fail("two runs in one directory")


def test_where_nothing_can_be_locked_a_run_starts_and_says_so(monkeypatch, said):
    def unknown(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "lockf", unknown)
    with sole_run(Path("run"), is_new=True):
        assert [line for line in said if "run cannot be locked (Function not" in line]


# Which run goes on


def test_auto_takes_the_latest_run():
    run("b-old", age=200)
    latest = run("a-latest", age=100)
    run("c-oldest", age=300)
    assert find_run("auto", "") == (latest, latest / "checkpoints" / "last.ckpt")


def test_auto_goes_by_checkpoints_not_by_directories():
    """A run that was begun first may be the one that trained last."""
    begun_last, trained_last = run("begun-last", age=50), run("trained-last", age=100)
    newest = checkpoint(trained_last / "checkpoints" / "last.ckpt")
    os.utime(newest, (1e9 - 10, 1e9 - 10))
    os.utime(trained_last, (1e9 - 100, 1e9 - 100))
    assert find_run("auto", "") == (trained_last, newest)
    torn = checkpoint(begun_last / "checkpoints" / "step_000000030.ckpt", torn=True)
    os.utime(torn, (1e9, 1e9))
    assert find_run("auto", "") == (trained_last, newest), "a torn one is not the newest good one"
    os.utime(begun_last / "checkpoints" / "last.ckpt", (1e9 - 5, 1e9 - 5))
    assert find_run("auto", "")[0] == begun_last


def test_auto_passes_over_runs_without_a_whole_checkpoint():
    whole = run("whole", age=100)
    run("torn", age=50, last=True)
    (Path("runs") / "empty").mkdir()
    assert find_run("auto", "")[0] == whole


def test_auto_finds_nothing_where_there_is_nothing():
    assert find_run("auto", "") is None
    run("torn", last=True)
    assert find_run("auto", "") is None


def test_auto_with_a_directory_looks_there_alone():
    run("other")
    assert find_run("auto", "mine") is None
    checkpoint(Path("mine/checkpoints/last.ckpt"))
    assert find_run("auto", "mine")[0] == Path("mine")


def test_a_named_run_and_a_named_checkpoint():
    folder = run("one", step_000000010=False, step_000000020=False, last=False)
    assert find_run(str(folder), "") == (folder, folder / "checkpoints" / "last.ckpt")
    chosen = folder / "checkpoints" / "step_000000010.ckpt"
    (folder / "config.yaml").touch()
    assert find_run(str(chosen), "") == (folder, chosen)


def test_a_checkpoint_belongs_to_the_run_that_it_lies_in_and_a_copy_to_none(monkeypatch):
    folder = run("one")
    (folder / "config.yaml").touch()
    original = folder / "checkpoints" / "last.ckpt"
    Path("link.ckpt").symlink_to(original)
    assert find_run("link.ckpt", "") == (folder.resolve(), Path("link.ckpt"))
    for copy in (Path("Downloads/last.ckpt"), Path("home/checkpoints/last.ckpt")):
        copy.parent.mkdir(parents=True)
        copy.write_bytes(original.read_bytes())
        assert find_run(str(copy), "") == (None, copy)
    monkeypatch.chdir(original.parent)
    assert find_run("last.ckpt", "")[0].samefile("..")


@pytest.mark.parametrize("last", [True, None])
def test_a_torn_or_missing_checkpoint_falls_back_to_the_one_before(last):
    torn = {"step_000000009": False, "step_000000010": False, "step_000000020": True}
    folder = run("one", **torn, **({} if last is None else {"last": last}))
    expected = folder / "checkpoints" / "step_000000010.ckpt"
    assert last_whole(folder) == expected
    assert find_run(str(folder), "") == (folder, expected)


def test_a_step_written_after_last_is_taken():
    """A kill between the two writes, or a disk without room for a second copy."""
    folder = run("one", step_000000010=False, step_000000020=False, last=False)
    step = folder / "checkpoints" / "step_000000020.ckpt"
    assert last_whole(folder) == folder / "checkpoints" / "last.ckpt"
    os.utime(step, (1e9 + 9, 1e9 + 9))
    assert last_whole(folder) == step
    assert find_run("auto", str(folder)) == (folder, step)
    checkpoint(step, torn=True)
    assert last_whole(folder) == folder / "checkpoints" / "last.ckpt"


def test_steps_from_before_a_resume_further_back_are_not_taken():
    folder = run("one", step_000000030=False, step_000000040=False)
    last = checkpoint(folder / "checkpoints" / "last.ckpt")  # of step 11, written later
    assert last_whole(folder) == last


def test_what_cannot_be_resumed_is_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"--resume nowhere does not exist"):
        find_run("nowhere", "")
    folder = run("torn", last=True)
    with pytest.raises(UserError, match=r"--resume runs/torn holds no whole checkpoint"):
        find_run(str(folder), "")
    (folder / "config.yaml").touch()
    with pytest.raises(UserError, match=r"torn/checkpoints lies in a run: name the run, runs/torn"):
        find_run(str(folder / "checkpoints"), "")
    with pytest.raises(UserError, match=r"last\.ckpt is torn.*run directory"):
        find_run(str(folder / "checkpoints" / "last.ckpt"), "")


def test_is_whole():
    whole = checkpoint(Path("a.ckpt"))
    assert is_whole(whole)
    content = whole.read_bytes()
    for cut in (0, 1, 100, len(content) // 2, len(content) - 1):
        Path("cut.ckpt").write_bytes(content[:cut])
        assert not is_whole(Path("cut.ckpt")), cut
    middle = content.index(bytes(4000)) + 2000  # of the weights, zeros here
    Path("hole.ckpt").write_bytes(content[:middle] + b"\xff" * 512 + content[middle + 512 :])
    assert torch.load("hole.ckpt", weights_only=True)["weights"].any(), "torch does not notice"
    assert not is_whole(Path("hole.ckpt"))
    with zipfile.ZipFile("other.ckpt", "w") as archive:
        archive.writestr("notes.txt", "an archive, but no checkpoint")
    assert not is_whole(Path("other.ckpt"))
    Path("text.ckpt").write_text("no archive")
    assert not is_whole(Path("text.ckpt"))
    assert not is_whole(Path("missing.ckpt")) and not is_whole(Path("."))
    Path("dead-link.ckpt").symlink_to("gone")
    assert not is_whole(Path("dead-link.ckpt"))


# What is kept of the settings


def test_config_is_written_whole_and_reads_back():
    config = TrainConfig(data=DataConfig(root="a: b # c", mean=[0.1, 0.2, 0.3], crop_min=0.08))
    Path("runs/new").mkdir(parents=True)
    for precision in ("32-true", "bf16-mixed"):
        write_config(config, {"precision": precision}, Path("runs/new"))
    assert [p.name for p in Path("runs/new").iterdir()] == ["config.yaml"]
    stored = yaml.safe_load(Path("runs/new/config.yaml").read_text(encoding="utf-8"))
    assert TrainConfig.from_dict(stored) == config
    assert stored == {**asdict(config), "decided": {"precision": "bf16-mixed"}}


def test_the_names_of_images_set_aside_are_written_whole(monkeypatch):
    run = Path("run")
    run.mkdir()
    write_names(run, ["a.png", "\udcff b.png"])
    assert (run / "held_out.txt").read_bytes() == b"a.png\n\xff b.png\n"
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
    with pytest.raises(UserError, match="run cannot be written .No space left.*make room"):
        write_names(run, ["c.png"])
    assert (run / "held_out.txt").read_bytes() == b"a.png\n\xff b.png\n"
    assert [path.name for path in run.iterdir()] == ["held_out.txt"]


def test_a_directory_in_which_nothing_came_to_lie_is_removed_and_no_other():
    Path("runs").mkdir()
    with sole_run(Path("runs/deep/one"), is_new=True):
        assert Path("runs/deep/one/.lock").exists()
    assert Path("runs").exists() and not Path("runs/deep").exists()
    Path("made").mkdir()
    with sole_run(Path("made"), is_new=True):
        pass
    assert Path("made").exists()
    with sole_run(Path("kept"), is_new=True):
        Path("kept/bad_files.txt").touch()
    assert Path("kept/.lock").exists()
