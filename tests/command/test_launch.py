"""Starting ranks: what they are told, how signals reach them, and who tells why they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import finish, is_running, start, wait_for

from moco.command import cli, knn, launch, linear, train
from moco.config import RunError, TrainConfig, UserError
from moco.training import hardware

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("in_tmp")]
LIMIT_S = 200  # a launcher imports torch, which takes long on a busy machine

MAIN = """
import os, signal, time
from pathlib import Path
from processes import is_running
from moco.command import cli, launch
from moco.config import RunError, UserError

def wait_for(name):
    while not Path(name).exists():
        time.sleep(0.01)

def pid_of(rank):
    wait_for(f"ready{rank}")
    return int(Path(f"ready{rank}").read_text())

def main(argv):
    launch.start_ranks(2, "start again")
    rank = int(os.environ["RANK"])
    Path(f"starting{rank}").write_text(str(os.getpid()))
    body(rank, argv)
    return {}

def ready(rank):
    os.replace(f"starting{rank}", f"ready{rank}")
    wait_for(f"ready{1 - rank}")
"""
RUN = """
cli.run_main(main)
"""


def start_ranks(body: str, *words: str, **env: str):
    """Start two ranks that run `body`, a function of the rank and the words."""
    Path("script.py").write_text(MAIN + body + RUN)
    path = f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"
    return start(*words, script=Path("script.py").resolve(), PYTHONPATH=path, **env)


def ready_ranks(process) -> list[int]:
    """Wait until both ranks are ready; return their process ids."""
    for rank in (0, 1):
        wait_for(f"ready{rank}", process, LIMIT_S)
    return [int(Path(f"ready{rank}").read_text()) for rank in (0, 1)]


def test_ranks_are_told_what_they_need_and_rank_0s_result_is_printed():
    body = """
if "RANK" not in os.environ:
    del os.environ["OMP_NUM_THREADS"]

def body(rank, argv):
    pass

def main(argv):
    launch.start_ranks(2, "start again")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = {name: os.environ[name] for name in (*names, "OMP_NUM_THREADS")}
    return {"told": told, "argv": argv, "stopped_by": 10} if told["RANK"] == "0" else {}
"""
    words = ["--root", "a $HOME $$ ${local_rank} b"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, out, err = finish(start_ranks(body, *words, MASTER_PORT=port), LIMIT_S)
    assert (code, err) == (128 + signal.SIGUSR1, "")
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["argv"] == words
    assert result["told"].pop("MASTER_PORT") != port
    assert result["told"] == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2)),
    }  # fmt: skip


def test_a_warning_before_the_first_step_lets_rank_0_ask_for_the_job_again():
    """Rank 1, which asks nobody, must not end first: the launcher would end rank 0 as it asks."""
    program = Path("bin/scontrol")
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nsleep 2\necho "$@" >> {Path.cwd()}/asked\n')
    program.chmod(0o755)
    body = """
from moco import slurm
slurm.restartable = True

def body(rank, argv):
    ready(rank)
    while True:
        time.sleep(1)
"""
    told = {"PATH": f"{program.parent.resolve()}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    process = start_ranks(body, **told)
    ready_ranks(process)
    process.send_signal(signal.SIGUSR1)
    code, out, err = finish(process, LIMIT_S)
    assert (code, out) == (128 + signal.SIGUSR1, ""), err
    assert Path("asked").read_text() == "requeue 77\n"


def test_a_warning_while_the_launcher_shuts_down_changes_nothing(monkeypatch):
    """Python then puts the signal's own effect, death, in the place of handlers of ours."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "_launch", lambda *_: 0)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(SystemExit, match="0"):
            launch.start_ranks(2, "start again")
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_every_signal_reaches_every_rank_a_second_ctrl_c_too():
    body = """
def body(rank, argv):
    came = []
    def note(number, frame):
        if number == signal.SIGINT in came:
            raise KeyboardInterrupt
        came.append(number)
        Path(f"{rank}-{int(number)}").touch()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    ready(rank)
    while True:
        time.sleep(1)
"""
    process = start_ranks(body)
    ready_ranks(process)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        for rank in (0, 1):
            wait_for(f"{rank}-{int(number)}", process)
    process.send_signal(signal.SIGINT)
    assert finish(process, LIMIT_S) == (130, "", "stopped by Ctrl-C\n")


def test_a_signal_before_ranks_handle_it_ends_with_its_code():
    process = start_ranks("def body(rank, argv):\n    ready(rank)\n    time.sleep(999)\n")
    ready_ranks(process)
    process.send_signal(signal.SIGTERM)
    assert finish(process, LIMIT_S) == (128 + signal.SIGTERM, "", "stopped by SIGTERM\n")


def test_ranks_end_with_a_launcher_that_is_killed():
    process = start_ranks("def body(rank, argv):\n    ready(rank)\n    time.sleep(999)\n")
    ranks = ready_ranks(process)
    process.kill()
    deadline = time.monotonic() + LIMIT_S
    while any(map(is_running, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, ranks))
    finish(process)


REASONS = {
    # What ends all ranks ends one of them first; rank 0 may have to save, or to end wandb.
    "common": (
        """
def body(rank, argv):
    ready(rank)
    if rank == 0:
        wait_for("raised")
        # Nothing ends rank 0 meanwhile.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        assert signal.sigtimedwait([signal.SIGTERM], 2) is None
        Path("saved").touch()
    Path("raised").touch()
    raise RunError("not finite")
""",
        "error: not finite\n",
    ),
    "of one rank": (
        """
def body(rank, argv):
    ready(rank)
    if rank == 1:
        raise RunError("out of memory", local=True)
    while True:
        time.sleep(1)
""",
        "error: rank 1: out of memory\n",
    ),
    # The others notice it, by their connections, before the launcher does.
    "a kill": (
        """
def body(rank, argv):
    ready(rank)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    while is_running(pid_of(0)):
        pass
    raise RunError("another rank died", local=True)
""",
        "error: rank 0 (process {pid}) was killed by signal 9, so the others are ended: "
        "start again\n",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_told_once_by_who_knows_it(name):
    body, told = REASONS[name]
    process = start_ranks(body)
    pids = ready_ranks(process)
    assert finish(process, LIMIT_S) == (1, "", told.format(pid=pids[0]))
    assert not any(map(is_running, pids))
    assert Path("saved").exists() == (name == "common")


@pytest.mark.parametrize(
    ("rank", "error", "seconds"),
    [
        ("0", UserError("wrong"), []),
        ("1", UserError("wrong"), [cli.LAST_WORD_S]),
        ("0", RunError("not finite"), []),
        ("1", RunError("not finite"), [cli.LAST_WORD_S]),
        ("0", RunError("another rank died", local=True), [cli.CONSEQUENCE_S]),
        ("1", ZeroDivisionError(), [cli.CONSEQUENCE_S]),
    ],
)
def test_a_rank_waits_for_the_one_who_is_to_be_heard(monkeypatch, rank, error, seconds):
    """Under torchrun and srun too, which may end all ranks as soon as one has ended."""
    waited: list[float] = []

    def main(argv):
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        cli.run_main(main)
    assert waited == seconds


# Where nothing is started


@pytest.fixture
def no_ranks(monkeypatch):
    """No environment of ranks, and none may be started."""
    for name in list(os.environ):
        if name in ("RANK", "LOCAL_WORLD_SIZE") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)

    def refuse(count, remedy):
        raise AssertionError(f"{count} ranks are started")

    monkeypatch.setattr(launch, "_launch", refuse)


def test_nothing_is_started_where_others_start_ranks(no_ranks, monkeypatch):
    """By torchrun, or by srun, whose variables `moco.slurm` has turned into torchrun's."""
    config = TrainConfig()
    config.trainer.accelerator, config.trainer.devices = "cpu", 2
    with pytest.raises(AssertionError, match="2 ranks are started"):
        train._start_ranks(config)
    for name, value in {"RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    train._start_ranks(config)


@pytest.mark.parametrize("judge", [knn, linear])
def test_judging_on_two_devices_starts_two_ranks(no_ranks, monkeypatch, tmp_path, judge):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    file = tmp_path / "some.ckpt"
    file.touch()
    with pytest.raises(AssertionError, match="2 ranks are started"):
        judge.main(["--checkpoint", str(file), "--devices", "2", "--accelerator", "cpu"])


def test_tasks_that_slurm_was_asked_for_and_nobody_started_are_missed(no_ranks, monkeypatch, said):
    """A batch script or a shell of two tasks, without srun: one device can be had."""
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    config = TrainConfig()
    config.trainer.accelerator = "cpu"
    for name, value in {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    for devices in (0, 1):
        config.trainer.devices = devices
        train._start_ranks(config)
        assert "asked for 2 tasks" in said[-1] and "srun" in said[-1]
    config.trainer.devices = 2  # all that was asked for
    with pytest.raises(AssertionError, match="2 ranks are started"):
        train._start_ranks(config)
    assert len(said) == 2


@pytest.mark.parametrize("place", ["notebook", "thread"])
def test_what_is_no_command_line_is_not_started_again(monkeypatch, place):
    """A notebook's command line starts another kernel; no thread may handle signals."""
    if place == "notebook":
        monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
        with pytest.raises(UserError, match=r"2 devices need 2 processes.*terminal"):
            launch._launch(2, "")
        return
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match=r"2 devices need"):
        pool.submit(launch._launch, 2, "").result()


def test_several_machines_are_left_to_torchrun_and_slurm(no_ranks):
    config = TrainConfig()
    config.trainer.num_nodes = 2
    with pytest.raises(UserError, match=r"trainer.num_nodes is 2 .* torchrun or srun"):
        train._start_ranks(config)


@pytest.mark.parametrize(("gpus", "kind"), [(0, "CPU cores"), (3, "3 GPUs")])
def test_more_devices_than_there_are_start_nothing(no_ranks, monkeypatch, tmp_path, gpus, kind):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    file = tmp_path / "some.ckpt"
    file.touch()
    count = str(gpus + 1 if gpus else os.cpu_count() + 1)
    words = ["--checkpoint", str(file), "--devices"]
    with pytest.raises(UserError, match=f"devices is {count} but there are .*{kind}"):
        knn.main([*words, count])
    with pytest.raises(UserError, match="CPU cores"):
        knn.main([*words, "1000", "--accelerator", "cpu"])
    with pytest.raises(UserError, match=f"trainer.devices is {count} but there are .*{kind}"):
        train.main(["--data.dataset", "digits", "--trainer.devices", count])
