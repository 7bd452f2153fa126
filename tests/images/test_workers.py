"""Worker processes that die, hang or find no shared memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from processes import finish, start
from runs import STREAMED, TINY, assert_same_end, error_line, load, run_tiny
from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

import train
from moco.checks import check_ranges
from moco.config import DataConfig, RunError, UserError
from moco.images import workers
from moco.images.workers import as_it_is, worker_loader
from moco.training import run

pytestmark = pytest.mark.usefixtures("in_tmp")


class KillWorker(pl.Callback):
    """Kill a worker of the run once a step has been trained."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            workers = trainer.datamodule.loader._workers._iterator._workers
            os.kill(workers[0].pid, self.number)
            workers[0].join(5 if self.number == signal.SIGKILL else 0)


def test_a_worker_that_is_left_in_the_middle_tells_no_traceback(monkeypatch, capsys):
    """Python's thread that hands tensors over meets a main process that is gone."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    workers._set_up(0)
    handed = []
    ident = resource_sharer._resource_sharer.register(lambda *to: handed.append(to), handed.clear)
    with socket.socket(socket.AF_UNIX) as main:
        main.connect(ident[0])
    resource_sharer._resource_sharer.get_connection(ident).close()
    resource_sharer.stop()  # it waits for the thread, which has met the first one before
    assert capsys.readouterr().err == ""
    sys.excepthook(ZeroDivisionError, ZeroDivisionError("a bug of ours"), None)
    assert "a bug of ours" in capsys.readouterr().err


class LeftOver:
    """Part of a cycle, as a finished run's loader is; notes the process that removes it."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Path(f"removed-{os.getpid()}").touch()


class Collecting(Dataset):
    """Looks for garbage as it reads."""

    def __getitems__(self, batch):
        gc.collect()
        return batch


def test_workers_leave_the_main_process_s_garbage_alone():
    """Or a second run of one process prints torch's assertion for each old loader and worker."""
    gc.disable()
    try:
        LeftOver()
        loader = worker_loader(
            Collecting(), DataConfig(num_workers=1), sampler=range(4), batch_size=2,
            collate_fn=as_it_is,
        )  # fmt: skip
        assert list(loader) == [[0, 1], [2, 3]]
        assert list(Path().glob("removed-*")) == []
    finally:
        gc.enable()
        gc.collect()
    assert Path(f"removed-{os.getpid()}").exists()


def test_a_killed_worker_ends_the_run_with_its_state_saved(images, with_callback):
    arguments = [*STREAMED, "--run.checkpoint_every", "100", "--trainer.max_epochs", "4"]
    run_tiny(images, *arguments, run_dir="whole")
    with pytest.MonkeyPatch.context() as patch:
        killer = KillWorker(4, signal.SIGKILL)
        patch.setattr(run, "pretrain", partial(run.pretrain, callbacks=[killer]))
        with pytest.raises(
            RunError, match=r"worker process \(\d+, one of 2 .* killed by signal 9"
        ) as e:
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


def die_slowly() -> None:
    """Close the pipes first and die after: a kernel does so too, at once mostly."""
    os.closerange(3, 256)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_whose_pipes_close_before_it_has_died_is_named_by_its_death():
    worker = multiprocessing.get_context("fork").Process(target=die_slowly)
    worker.start()
    error = workers._worker_error(ConnectionResetError("by peer"), [worker], late=False)
    assert "shared memory is exhausted" in str(error)


FULL_SHARED_MEMORY = """
import ctypes, os, subprocess, sys, time
from moco.command import cli
import train
assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS: mounts of its own
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", "/dev/shm"], check=True)
if os.fork() == 0:
    for number in (1, 2):
        os.close(number)  # so that who reads the run's words waits for the run alone
    while not os.path.exists("run/checkpoints/last.ckpt"):
        time.sleep(0.05)
    with open("/dev/shm/ballast", "wb", buffering=0) as file:
        while True:  # also what batches give back
            try:
                file.write(bytes(4096))
            except OSError:
                time.sleep(0.001)
cli.run_main(train.main)
"""


def test_shared_memory_that_fills_up_ends_the_run_in_one_line(images, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no right to a mount namespace of its own")
    script = tmp_path / "full.py"
    script.write_text(FULL_SHARED_MEMORY)
    process = start(
        *TINY, *STREAMED, "--data.root", str(images), "--run.dir", "run",
        "--trainer.max_epochs", "5000", "--data.batch_size", "48", "--model.queue_size", "48",
        script=script,
    )  # fmt: skip
    code, _, err = finish(process)
    assert code == 1, err
    assert "shared memory is exhausted" in error_line(err)
    assert load("run/checkpoints/last.ckpt")["global_step"] >= 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_workers_death_interrupts_nothing_between_batches(number):
    """torch's own handler would raise in the middle of a step."""
    signal.signal(signal.SIGCHLD, before := signal.SIG_DFL)  # a test before may have left torch's
    loader = torch.utils.data.DataLoader([1, 2, 3], num_workers=1, persistent_workers=True)
    iterator = workers.fetched(loader, 60)
    next(iterator)
    assert signal.getsignal(signal.SIGCHLD) is before
    (worker,) = loader._iterator._workers
    os.kill(worker.pid, number)
    worker.join(60)
    assert worker.exitcode == -number, "and nothing was raised here"
    with pytest.raises(RunError):
        list(iterator)


def test_the_handler_of_an_earlier_loader_goes_too(monkeypatch):
    """torch sets it once in a process, for whichever DataLoader comes first."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        list(torch.utils.data.DataLoader([1, 2], num_workers=1))
        assert signal.getsignal(signal.SIGCHLD).__module__ == signal_handling.__name__
        assert len(list(workers.fetched(torch.utils.data.DataLoader([1], num_workers=1), 60))) == 1
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def test_a_child_that_ends_is_not_taken_for_a_worker():
    iterator = workers.fetched(torch.utils.data.DataLoader([1, 2, 3], num_workers=1), 60)
    next(iterator)
    subprocess.run(["false"])
    assert len(list(iterator)) == 2


def test_workers_of_an_epoch_before_that_hang_are_waited_for_only_so_long():
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert len(list(workers.fetched(loader, 60))) == 2
    os.kill(loader._iterator._workers[0].pid, signal.SIGSTOP)
    with pytest.raises(RunError, match="no worker delivered a batch"):
        list(workers.fetched(loader, 0.5))


def test_a_timeout_that_no_timer_takes_is_refused():
    with pytest.raises(UserError, match=r"worker_timeout is 1000000000000\.0: .* at most 604800"):
        check_ranges(DataConfig(worker_timeout=1e12), "data.")


def test_workers_that_would_not_fit_into_shared_memory_are_refused(images, monkeypatch):
    one = 5 * 16 * 2 * 3 * 16 * 16  # prefetched batches of one worker
    monkeypatch.setattr(workers, "free_shared_memory", lambda: one + 1)
    with pytest.raises(UserError, match=r"data.num_workers is 2: .* MiB free: set it to 1"):
        run_tiny(images, *STREAMED)
    config = DataConfig(image_size=16, batch_size=16, num_workers=-1)
    assert workers.fitting_workers(config, 8, 1, 1) == 1


def test_workers_are_as_many_as_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    config = DataConfig(root="x", num_workers=-1, batch_size=2, image_size=8)
    assert workers.worker_count(config) == 3
