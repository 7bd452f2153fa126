"""Faults, each provoked for real: what the run does, what it says, and how it exits.

docs/faults.md is the table of these tests.
"""

from __future__ import annotations

import csv
import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pictures import write_pictures
from processes import ROOT, finish, start, wait_for
from pytorch_lightning.strategies import DDPStrategy

import train
from moco.algorithm import pretrain
from moco.checkpoints.files import read_state
from moco.config import DataConfig, RunError, UserError
from moco.images import workers
from moco.images.bad_files import BadFiles
from moco.images.loader import PretrainData, StepLoader
from moco.images.sources import ImageSource
from moco.training import explain, guard, run
from moco.training.guard import NonFiniteGuard
from moco.training.saving import AtomicCheckpointIO
from moco.training.tracking import MetricsFile

TINY = [
    *("--model.backbone", "resnet10t", "--model.stem", "cifar", "--model.width", "0.125"),
    *("--model.embedding_dim", "16", "--model.queue_size", "40", "--model.bn_splits", "2"),
    *("--data.dataset", "folder", "--data.image_size", "16", "--data.batch_size", "16"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--optim.lr", "0.01"),
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--run.knn_every", "0"),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "99"),
]
PARTS = ("state_dict", "optimizer_states", "plateau", "epoch_loss", "global_step")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """48 colour images of 20 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    write_pictures(root, [f"{i:02d}.jpg" for i in range(48)], rng)
    return root


@pytest.fixture
def copied(images, tmp_path):
    """A copy of the images, to be damaged."""
    return shutil.copytree(images, tmp_path / "images")


def run_tiny(root, *arguments: str, run_dir: str = "run") -> dict:
    return train.main([*TINY, "--data.root", str(root), "--run.dir", run_dir, *arguments])


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in found.split()]


def error_line(err: str) -> str:
    """The one line that tells the error; there is no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err, err
    return lines[0]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def at(step: int, run_dir: str = "run") -> dict:
    return load(f"{run_dir}/checkpoints/step_{step:09d}.ckpt")


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(first: str, second: str) -> None:
    a, b = load(f"{first}/checkpoints/last.ckpt"), load(f"{second}/checkpoints/last.ckpt")
    assert [part for part in PARTS if not same(a[part], b[part])] == []


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, dict | list | torch.Tensor) for t in tensors(v)]


@pytest.fixture
def said():
    """The lines that a run says."""

    class Keep(logging.Handler):
        def emit(self, record) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    handler, logger = Keep(), logging.getLogger("moco")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# Numbers


@pytest.fixture
def nan_at(monkeypatch):
    """Make the loss of the given calls NaN."""

    def make(*numbers: int) -> None:
        calls, info_nce = [], pretrain.info_nce

        def bad(*arguments):
            calls.append(1)
            loss, logits = info_nce(*arguments)
            return (loss * float("nan") if len(calls) in numbers else loss), logits

        monkeypatch.setattr(pretrain, "info_nce", bad)

    return make


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_left_out_changes_neither_weights_nor_optimiser(images, nan_at, optimizer):
    nan_at(1, 4)
    result = run_tiny(images, "--run.skip_nonfinite", "2", "--optim.name", optimizer)
    assert result["steps"] == 6
    state = at(6)
    assert all(t.isfinite().all() for part in PARTS[:2] for t in tensors(state[part]))
    before, after = at(3), at(4)
    assert same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    moved = [k for k, v in after["state_dict"].items() if not v.equal(before["state_dict"][k])]
    assert any(name.startswith("queue.") for name in moved)
    assert not [n for n in moved if n.startswith("query_encoder") and "num_batches" not in n]
    assert not [n for n in moved if n.endswith(("running_mean", "running_var"))]


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint(images, nan_at):
    nan_at(4)
    with pytest.raises(RunError) as error:
        run_tiny(images)
    text = str(error.value)
    assert "not finite at step 4 (lr 0.005)" in text
    assert f"last good checkpoint is {Path('run/checkpoints/last.ckpt')}" in text
    assert "--run.skip_nonfinite" in text
    assert load("run/checkpoints/last.ckpt")["global_step"] == 3
    result = train.main(["--resume", "run"])  # the fault was passing: the run goes on
    assert result["steps"] == 6


def test_the_count_of_steps_left_out_survives_a_resume(images, nan_at):
    nan_at(2, 4)
    with pytest.raises(RunError, match="step 4"):
        run_tiny(images, "--run.skip_nonfinite", "1")
    nan_at(1)
    with pytest.raises(RunError, match="step 4"):
        train.main(["--resume", "run"])


def test_weights_that_overflow_reach_no_checkpoint(images):
    with pytest.raises(RunError, match="not finite"):
        run_tiny(images, "--optim.lr", "1e20", "--optim.weight_decay", "1e30")
    for path in Path("run").rglob("*.ckpt"):
        assert all(t.isfinite().all() for t in tensors(load(path)["state_dict"]))


def _guarded_on_rank(allowed: int, bad_rank: int, what: str):
    """Train four steps on two ranks; at the third, one rank's images or loss are not finite."""
    from test_pretrain import MODEL, _as_rank, make_batches, make_module, make_views

    rank, world = _as_rank()
    module = make_module(MODEL)
    batches = make_batches(make_views(16, steps=4), world, rank, True, False)
    if rank == bad_rank and what == "images":
        batches[2].query_views[0][0] = float("nan")
        batches[2].key_views[0][0] = float("nan")
    info_nce, calls, states = pretrain.info_nce, [], []

    def infinite(*arguments):  # by a constant, so that the gradients stay finite
        calls.append(1)
        loss, logits = info_nce(*arguments)
        return loss + (float("inf") if len(calls) == 3 else 0), logits

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            states.append({k: v.numpy().copy() for k, v in module.state_dict().items()})

    module.steps_per_epoch = module.total_steps = 4
    guard = NonFiniteGuard(allowed, Path("none"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=DDPStrategy(broadcast_buffers=False),
        max_epochs=1, logger=False, callbacks=[guard, Keep()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    if rank == bad_rank and what == "loss":
        pretrain.info_nce = infinite
    try:
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    except RunError as error:
        return str(error), states
    finally:
        pretrain.info_nce = info_nce
    return "", states


@pytest.mark.parametrize(("allowed", "what"), [(0, "images"), (1, "images"), (1, "loss")])
def test_all_ranks_leave_out_what_is_bad_on_one(two_ranks, allowed, what):
    (said_0, states_0), (said_1, states_1) = two_ranks.run(_guarded_on_rank, allowed, 1, what)
    assert said_0 == said_1
    assert ("not finite at step 3" in said_0) == (allowed == 0)
    for states in (states_0, states_1):
        for name in states[0]:
            if allowed and "num_batches" not in name:
                assert np.isfinite(states[-1][name]).all(), name
            if allowed and name.startswith("query_encoder") and "num_batches" not in name:
                assert (states[1][name] == states[2][name]).all(), name
                weight = name.endswith("weight")
                assert not weight or (states[3][name] != states[2][name]).any()


# Images


def damage(folder: Path) -> dict[str, str]:
    """Break five files in five ways; return what each is called in the end."""
    first = (folder / "00.jpg").read_bytes()
    (folder / "00.jpg").write_bytes(first[: len(first) // 2])
    (folder / "01.jpg").write_bytes(b"")
    (folder / "02.jpg").write_text("no image")
    (folder / "03.jpg").unlink()
    (folder / "03.jpg").symlink_to("nowhere.jpg")
    bomb = (folder / "04.jpg").read_bytes()
    place = bomb.index(b"\xff\xc0") + 5  # height and width in the frame header
    (folder / "04.jpg").write_bytes(bomb[:place] + b"\xff\xff\xff\xff" + bomb[place + 4 :])
    return {
        "00.jpg": "cannot be decoded", "01.jpg": "is empty", "02.jpg": "is no image",
        "03.jpg": "No such file", "04.jpg": "limit of 178956970 pixels",
    }  # fmt: skip


@pytest.mark.parametrize("resident", ["memory", "off"])
def test_bad_files_are_left_out_counted_and_named(copied, resident):
    reasons = damage(copied)
    arguments = ["--data.resident", resident, "--data.num_workers", "0"]
    # The 43 others fill two batches of an epoch if resident; streamed, others stand in.
    result = run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.11")
    assert result["steps"] == (6 if resident == "off" else 4)
    lines = dict(line.split("\t") for line in Path("run/bad_files.txt").read_text().splitlines())
    assert {Path(path).name for path in lines} == set(reasons)
    for path, reason in lines.items():
        assert reasons[Path(path).name] in reason
    with pytest.raises(UserError, match=r"of 48 images.*max_bad_fraction \(now 0\)"):
        run_tiny(copied, *arguments, run_dir="strict")


def crops_of(root, position: int = 0, **changes) -> list[torch.Tensor]:
    config = DataConfig(
        root=str(root), image_size=16, batch_size=16, resident="off", max_bad_fraction=1,
        **{"num_workers": 0} | changes,
    )  # fmt: skip
    data = PretrainData(config, seed=3, shuffle=False, symmetric=False)
    data.prepare(torch.device("cpu"))
    try:
        loader = StepLoader(data, lambda: position)
        return [batch.crops for batch in loader]
    finally:
        loader.close()


def _crops_on_rank(root: str) -> list[np.ndarray]:
    return [crops.numpy() for crops in crops_of(root)]


def test_what_stands_in_for_a_bad_file_depends_on_no_worker_and_no_rank(
    copied, two_ranks, tmp_path
):
    whole = crops_of(copied)
    damage(copied)
    alone = crops_of(copied)
    places = [
        (i, j) for i, (a, b) in enumerate(zip(whole, alone, strict=True))
        for j in range(16) if not a[j].equal(b[j])
    ]  # fmt: skip
    assert len(places) == 5, "five bad files change five rows and no others"
    assert all(map(torch.Tensor.equal, alone, crops_of(copied, num_workers=2)))
    first, second = two_ranks.run(_crops_on_rank, str(copied))
    for a, b, c in zip(alone, first, second, strict=True):
        assert (a.numpy() == np.concatenate([b, c])).all()


class DeleteAfter(pl.Callback):
    """Delete files once a step has been trained."""

    def __init__(self, step: int, paths: list[Path]) -> None:
        self.step, self.paths = step, paths

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            for path in self.paths:
                path.unlink()


@pytest.fixture
def with_callback(monkeypatch):
    """Add a callback to the next run, behind its own."""

    def add(callback: pl.Callback) -> None:
        trainer = run._Run.trainer
        monkeypatch.setattr(
            run._Run, "trainer", lambda self, found, step: trainer(self, [*found, callback], step)
        )

    return add


def test_files_deleted_during_training(copied, with_callback):
    gone = sorted(copied.iterdir())[:4]
    with_callback(DeleteAfter(3, gone))
    arguments = ["--data.resident", "off", "--data.num_workers", "0"]
    assert run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.1")["steps"] == 6
    named = Path("run/bad_files.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in named} == {str(path) for path in gone}


def test_a_bad_file_is_named_once_however_often_the_run_is_resumed(copied):
    reasons = damage(copied)
    arguments = ["--data.resident", "off", "--data.num_workers", "0"]
    run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.2")
    train.main(["--resume", "run/checkpoints/step_000000001.ckpt"])
    named = Path("run/bad_files.txt").read_text().splitlines()
    assert len(named) == len(reasons)


def _bad_on_rank(paths: list[str], most: float, report: str) -> tuple[list[str], str]:
    """Meet one bad file on each rank and another on both; return what is logged and raised."""
    rank, lines = torch.distributed.get_rank(), []
    bad = BadFiles(ImageSource("set", None, paths, None, [], 3, 255), most, report)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("moco").addHandler(handler)
    try:
        bad.agree()
        bad.note([(rank, "is empty"), (2, "is no image")])
        assert not lines, "nothing is said before all have met"
        bad.agree()
        bad.agree()
        return lines, ""
    except UserError as error:
        return lines, str(error)
    finally:
        logging.getLogger("moco").removeHandler(handler)


def test_ranks_count_bad_files_together_and_name_each_once(two_ranks, tmp_path):
    paths, report = [f"{i}.jpg" for i in range(10)], tmp_path / "bad_files.txt"
    (first, _), (second, _) = two_ranks.run(_bad_on_rank, paths, 0.3, str(report))
    assert len(first) == 1 and "3 of 10 images of set cannot be read" in first[0]
    assert second == []
    named = [line.split("\t")[0] for line in report.read_text().splitlines()]
    assert sorted(named) == ["0.jpg", "1.jpg", "2.jpg"]
    (_, said_0), (_, said_1) = two_ranks.run(_bad_on_rank, paths, 0.2, str(report))
    assert "3 of 10" in said_0 and "3 of 10" in said_1, "all ranks stop"
    assert len(report.read_text().splitlines()) == 3


def test_too_many_deleted_files_stop_the_run_with_its_state_saved(copied, with_callback):
    gone = sorted(copied.iterdir())
    with_callback(DeleteAfter(3, gone[1:]))
    arguments = ["--data.resident", "off", "--data.num_workers", "0"]
    arguments += ["--run.checkpoint_every", "100"]
    with pytest.raises(UserError, match=r"of 48 images.*mend them and go on with --resume"):
        run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.1")
    assert load("run/checkpoints/last.ckpt")["global_step"] == 3


# Worker processes

STREAMED = ["--data.resident", "off", "--data.num_workers", "2"]


class KillWorker(pl.Callback):
    """Kill a worker of the run once a step has been trained."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            workers = trainer.datamodule.loader._workers._iterator._workers
            os.kill(workers[0].pid, self.number)
            workers[0].join(5 if self.number == signal.SIGKILL else 0)


def test_a_killed_worker_ends_the_run_with_its_state_saved(images, with_callback):
    arguments = [*STREAMED, "--run.checkpoint_every", "100", "--trainer.max_epochs", "4"]
    run_tiny(images, *arguments, run_dir="whole")
    with pytest.MonkeyPatch.context() as patch:
        trainer = run._Run.trainer
        killer = KillWorker(4, signal.SIGKILL)
        patch.setattr(run._Run, "trainer", lambda s, found, n: trainer(s, [*found, killer], n))
        with pytest.raises(RunError, match=r"worker process \d+ of 2 .* killed by signal 9") as e:
            run_tiny(images, *arguments)
    assert "data.num_workers" in str(e.value)
    step = load("run/checkpoints/last.ckpt")["global_step"]
    assert 4 <= step < 12, "saved after the step in which the worker died"
    assert train.main(["--resume", "run"])["steps"] == 12
    assert_same_end("whole", "run")


def test_a_hung_worker_does_not_hold_the_run_for_ever(images, with_callback):
    with_callback(KillWorker(1, signal.SIGSTOP))
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"no worker delivered a batch within data.worker_timeout"):
        run_tiny(images, *STREAMED, "--data.worker_timeout", "1", "--trainer.max_epochs", "20")
    assert time.monotonic() - begin < 60
    assert load("run/checkpoints/last.ckpt")["global_step"] >= 1


def test_a_worker_out_of_shared_memory_says_so_with_the_state_saved(images, with_callback):
    """It dies of SIGBUS, as where it writes to a page that /dev/shm has no room for."""
    with_callback(KillWorker(2, signal.SIGBUS))
    with pytest.raises(RunError, match=r"shared memory is exhausted .*data.num_workers.*shm-size"):
        run_tiny(images, *STREAMED, "--trainer.max_epochs", "20")
    assert load("run/checkpoints/last.ckpt")["global_step"] >= 2


FULL_SHARED_MEMORY = """
import os, shutil, subprocess, sys, threading, time
def fill():
    while not os.path.exists("run/checkpoints/last.ckpt"):
        time.sleep(0.05)
    with open("/dev/shm/ballast", "wb", buffering=0) as file:
        while True:  # also what batches give back
            try:
                file.write(bytes(4096))
            except OSError:
                time.sleep(0.001)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", "/dev/shm"], check=True)
threading.Thread(target=fill, daemon=True).start()
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""


def test_shared_memory_that_fills_up_ends_the_run_in_one_line(images, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no right to a mount namespace of its own")
    script = tmp_path / "full.py"
    script.write_text(FULL_SHARED_MEMORY)
    process = subprocess.Popen(
        ["unshare", "-m", sys.executable, str(script), str(ROOT / "train.py"), *TINY, *STREAMED,
         "--data.root", str(images), "--run.dir", "run", "--trainer.max_epochs", "5000",
         "--data.batch_size", "48", "--model.queue_size", "48"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    code, _, err = finish(process, timeout=100)
    assert code == 1, err
    assert "shared memory is exhausted" in error_line(err)
    assert load("run/checkpoints/last.ckpt")["global_step"] >= 1


def test_a_child_that_ends_is_not_taken_for_a_late_worker(images):
    """A signal of another child's end, while a batch is awaited in good time."""
    iterator = workers.fetched(torch.utils.data.DataLoader([1, 2, 3], num_workers=1), 60)
    next(iterator)
    workers._Fetching.now = True
    workers._when_fetching(signal.SIGCHLD, None)
    workers._Fetching.deadline = 0
    with pytest.raises(RuntimeError, match="timed out"):
        workers._when_fetching(signal.SIGCHLD, None)
    workers._Fetching.now = False
    workers._when_fetching(signal.SIGCHLD, None)
    assert len(list(iterator)) == 2


def test_workers_that_would_not_fit_into_shared_memory_are_refused(images, monkeypatch):
    one = 5 * 16 * 2 * 3 * 16 * 16  # prefetched batches of one worker
    monkeypatch.setattr(workers, "free_shared_memory", lambda: one + 1)
    with pytest.raises(UserError, match=r"data.num_workers is 2: .* MiB free: set it to 1"):
        run_tiny(images, *STREAMED)
    config = DataConfig(image_size=16, batch_size=16, num_workers=-1)
    assert workers.fitting_workers(config, 8, 1, 1) == 1


# Resuming: ranks, workers, a torn file

RANKS = ["--trainer.max_epochs", "1", "--model.key_bn", "shuffle"]


def _main_on_rank(arguments: list[str], folder: str) -> dict:
    """Run train.py's main on each rank, as under torchrun."""
    from test_pretrain import _as_rank

    _as_rank()
    os.chdir(folder)
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    return train.main(arguments)


@pytest.mark.parametrize("resident", ["memory", "off"])
def test_two_ranks_resume_to_the_same_bits(images, two_ranks, tmp_path, resident):
    arguments = [*TINY, *RANKS, "--data.root", str(images), "--data.resident", resident]
    arguments += ["--data.num_workers", "1", "--run.dir", "whole"]
    two_ranks.run(_main_on_rank, arguments, str(tmp_path))
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy("whole/config.yaml", "run/config.yaml")
    shutil.copy("whole/checkpoints/step_000000001.ckpt", "run/checkpoints/last.ckpt")
    # A worker each before, none now: neither workers nor the stop leave a trace.
    resumed = ["--resume", "run", "--data.num_workers", "0"]
    result, other = two_ranks.run(_main_on_rank, resumed, str(tmp_path))
    assert (result["steps"], other) == (3, {})
    assert_same_end("whole", "run")


def test_streamed_resume_with_other_numbers_of_workers(images):
    run_tiny(images, "--data.resident", "off", "--data.num_workers", "0", run_dir="whole")
    for step, count in ((2, 2), (4, 1)):
        shutil.copytree("whole", f"from{step}")
        path = f"from{step}/checkpoints/step_{step:09d}.ckpt"
        train.main(["--resume", path, "--data.num_workers", str(count)])
        assert_same_end("whole", f"from{step}")


def test_a_torn_last_checkpoint_falls_back_to_the_one_before(images):
    run_tiny(images, run_dir="whole")
    shutil.copytree("whole", "run")
    newest, last = Path("run/checkpoints/step_000000006.ckpt"), Path("run/checkpoints/last.ckpt")
    last.unlink()
    os.link(newest, last)  # as the run leaves them: one file, two names, torn together
    os.truncate(last, last.stat().st_size // 2)
    assert train.main(["--resume", "run"])["steps"] == 6
    assert_same_end("whole", "run")
    assert at(6)["global_step"] == 6, "the torn file is replaced"


def test_resuming_twice_from_the_end_of_an_epoch(images):
    run_tiny(images, "--trainer.max_epochs", "3", run_dir="whole")
    shutil.copytree("whole", "run")
    for step in (3, 4, 6):
        for path in Path("run/checkpoints").glob("step_*.ckpt"):
            if int(path.stem[5:]) > step:
                path.unlink()
        train.main(["--resume", f"run/checkpoints/step_{step:09d}.ckpt"])
        assert_same_end("whole", "run")


def test_a_short_torture():
    """Five kills at random moments; `make torture` takes thirty and more."""
    words = ["--kills", "5", "--epochs", "6"]
    code, out, err = finish(start(*words, script=ROOT / "tests/torture.py"), timeout=115)
    assert code == 0, err
    assert out.startswith("5 kills")


def test_old_checkpoints_are_pruned(images):
    run_tiny(images, "--run.keep_checkpoints", "2")
    kept = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert kept == ["last.ckpt", "step_000000005.ckpt", "step_000000006.ckpt"]


@pytest.mark.parametrize("damage", ["missing", "cut", "shorter", "binary"])
def test_a_missing_or_damaged_config_is_one_line(images, damage):
    run_tiny(images, "--trainer.max_steps", "1")
    path = Path("run/config.yaml")
    content = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        half = content[: len(content) // 2].rpartition("\n")[0]
        damaged = {"binary": b"\xff\x00\x01", "cut": b"model: {back", "shorter": half.encode()}
        path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"run/config.yaml is (missing|damaged): put it back"):
        train.main(["--resume", "run"])
    Path("mine.yaml").write_text(content)
    assert train.main(["--resume", "run", "--config", "mine.yaml"])["steps"] == 1


def test_another_data_set_is_refused(copied):
    run_tiny(copied)
    (copied / "47.jpg").unlink()
    with pytest.raises(UserError, match=r"the data set holds 47 images, the run has 48"):
        train.main(["--resume", "run"])
    (copied / "other.jpg").write_bytes((copied / "00.jpg").read_bytes())
    with pytest.raises(UserError, match=r"48 images as the run has, but others"):
        train.main(["--resume", "run"])


# Disk


@pytest.fixture
def small_disk(tmp_path):
    """A real full file system: a tmpfs of 3 MiB; where mounting is not allowed, skip."""
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
        if trainer.global_step == self.full:
            with self.path.open("wb", buffering=0) as file:
                while shutil.disk_usage(self.path.parent).free:
                    file.write(bytes(4096))
        if trainer.global_step == self.free:
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
    FillDisk(small_disk / "ballast", 0, 9).on_train_batch_end(SimpleNamespace(global_step=0))
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


@pytest.fixture
def file_limit():
    """Let no file of this process grow beyond so many bytes, a full disk without rights."""
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
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"weight": torch.zeros(9)}, path)
    before = path.read_bytes()
    file_limit(4096)
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


# Signals, SLURM, ranks, ports


def test_slurm_warning_saves_and_requeues(images, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    process = start(
        *TINY, "--data.root", str(images), "--run.dir", "run", "--trainer.max_epochs", "5000",
        PATH=f"{scontrol.parent}:{os.environ['PATH']}", SLURM_JOB_ID="77", SLURM_NTASKS="1",
        SLURM_JOB_NAME="moco", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS_PER_NODE="1",
        SLURM_NODEID="0", SLURM_NODELIST="localhost",
    )  # fmt: skip
    wait_for("run/checkpoints/last.ckpt", process)
    process.send_signal(signal.SIGUSR1)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGUSR1, err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert "job 77 is requeued" in err
    stopped = json.loads(out.splitlines()[-1])
    assert load("run/checkpoints/last.ckpt")["global_step"] == stopped["steps"]
    assert not list(Path(".").rglob("hpc_ckpt*")), "Lightning's own requeueing stays out"


def port_in_use() -> socket.socket:
    taken = socket.socket()
    taken.bind(("", 0))
    taken.listen()
    return taken


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_by_name(images, victim):
    with port_in_use() as taken:  # and the port that was asked for is not free
        process = start(
            *TINY, "--data.root", str(images), "--run.dir", "run", "--trainer.max_epochs", "5000",
            "--trainer.devices", "2", MASTER_PORT=str(taken.getsockname()[1]),
        )  # fmt: skip
        wait_for("run/checkpoints/last.ckpt", process)
    other = next(pid for pid in children(process.pid) if "train.py" in command_of(pid))
    os.kill([process.pid, other][victim], signal.SIGKILL)
    begin = time.monotonic()
    while is_running(other) and time.monotonic() < begin + 60:
        time.sleep(0.1)
    assert not is_running(other), "the other rank still runs"
    code, _, err = finish(process)
    assert code == (-9, 1)[victim]
    assert "MASTER_PORT" in err and "is taken" in err
    if victim == 1:
        assert f"rank 1 (process {other}) was killed by signal 9" in error_line(err)
    else:
        assert "rank 0 died" in err or "another rank died" in err


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(300)
def test_a_taken_port_that_must_stay_is_one_line(images):
    """Of several machines none may choose another on its own."""
    with port_in_use() as taken:
        process = start(
            *TINY, "--data.root", str(images), "--run.dir", "run", "--trainer.devices", "2",
            MASTER_PORT=str(taken.getsockname()[1]), NODE_RANK="0", MASTER_ADDR="127.0.0.1",
        )  # fmt: skip
        code, _, err = finish(process, timeout=280)
    assert code == 1
    assert "the ranks meet is taken: set MASTER_PORT" in err and "Traceback" not in err


# Warnings and memory


def test_collapse_is_a_warning_with_causes_after_a_while(said):
    fake = SimpleNamespace(wants_metrics=True, global_step=7, is_global_zero=True)
    watch = guard.Watch(BadFiles(None, 0, None))
    low, high = torch.tensor(0.01), torch.tensor(0.9)
    for spread in [low] * (guard.COLLAPSED_READINGS - 1) + [high]:
        fake.metrics = {"train/spread": spread}
        watch.on_train_batch_end(fake, fake)
    assert not said, "shortly low is no collapse"
    fake.metrics = {"train/spread": low}
    for _ in range(guard.COLLAPSED_READINGS - 1):
        watch.on_train_batch_end(fake, fake)
    assert not said, "a reading above starts the count anew"
    for _ in range(guard.COLLAPSED_READINGS):
        watch.on_train_batch_end(fake, fake)
    assert len(said) == 1, "said once"
    for cause in ("optim.lr", "model.key_momentum", "model.temperature", "data.crop_min"):
        assert cause in said[0]


def test_out_of_memory_names_the_batch_that_would_fit(images, monkeypatch):
    """A device of 1000 bytes; a step takes 100 and 20 per image, so 40 images fit in 90 %."""

    def peak(trainer, module, count, data):
        return 100 + 20 * count

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(explain, "peak_memory", peak)
    monkeypatch.setattr(explain, "device_memory", lambda device: 1000)
    monkeypatch.setattr(pretrain.MoCo, "training_step", out_of_memory)
    with pytest.raises(RunError, match=r"data.batch_size 48.*about 40 would fit"):
        run_tiny(images, "--data.batch_size", "48", "--model.queue_size", "48")


# Security


def test_no_secret_reaches_what_a_run_writes_or_says(images, monkeypatch, capfd):
    secret = "c0ffee" * 6
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    run_tiny(images, "--trainer.max_steps", "2")
    monkeypatch.delenv("WANDB_API_KEY")
    for path in Path("run").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
    said = capfd.readouterr()
    assert secret not in said.out + said.err


def test_no_network_is_asked_for(images, monkeypatch):
    """Not for weights, nor data sets, nor to report: whoever tries to connect fails the test."""
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert run_tiny(images, "--trainer.max_steps", "2")["steps"] == 2
    with pytest.raises(UserError, match="is an address: download the file"):
        run_tiny(images, "--init_from", "https://example.org/r50.pth", run_dir="other")
    assert tried == []


def test_a_file_cut_to_any_length_is_called_damaged(tmp_path):
    """At some lengths torch says Invalid argument, for it seeks to before the file's start."""
    path = tmp_path / "whole.ckpt"
    torch.save({f"layer{i}.weight": torch.zeros(64, 64) for i in range(60)}, path)
    content, invalid = path.read_bytes(), 0
    for length in (*range(2, 40), *range(40, len(content), len(content) // 300), len(content) - 1):
        path.write_bytes(content[:length])
        try:
            torch.load(path, weights_only=True)
        except OSError as error:
            invalid += error.errno == errno.EINVAL
        except Exception:
            pass
        with pytest.raises(UserError, match="is damaged or cut short"):
            read_state(path)
    assert invalid, "torch has changed: the case is not met any more"


def test_settings_of_a_run_name_no_place_to_write(images, tmp_path):
    """A run that was sent by someone is gone on with where it lies, whatever its settings say."""
    run_tiny(images, "--trainer.max_epochs", "1")
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


@pytest.mark.parametrize("place", ["--config", "--resume"])
def test_a_yaml_runs_no_code(images, place):
    code = "model:\n  backbone: !!python/object/apply:os.mkdir [pwned]\n"
    if place == "--config":
        Path("bad.yaml").write_text(code)
        argument = "bad.yaml"
    else:
        run_tiny(images, "--trainer.max_steps", "1")
        Path("run/config.yaml").write_text(code)
        argument = "run"
    with pytest.raises(UserError):
        train.main([place, argument])
    assert not Path("pwned").exists()


class Pwned:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_checkpoint_runs_no_code(images, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run_tiny(images, "--trainer.max_steps", "1")
    for content in (Pwned(), {**at(1), "more": Pwned()}):
        torch.save(content, "run/checkpoints/last.ckpt")
        with pytest.raises(UserError, match="last.ckpt"):
            train.main(["--resume", "run"])
        assert not Path("pwned").exists()
