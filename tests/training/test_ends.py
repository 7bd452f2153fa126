"""How runs are ended from outside: SLURM, a killed rank, a taken port, memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from processes import finish, start, wait_for
from runs import TINY, error_line, load, run_tiny

from moco.algorithm import pretrain
from moco.config import RunError
from moco.training import explain

pytestmark = pytest.mark.usefixtures("in_tmp")


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


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in found.split()]


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
