"""How runs are ended from outside: SLURM, a killed rank, a taken port, memory."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from processes import finish, is_running, start, wait_for
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
        PATH=f"{scontrol.parent}:{os.environ['PATH']}", SLURM_JOB_ID="77",
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


@pytest.fixture
def taken_port():
    """A port that is in use."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield str(taken.getsockname()[1])


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank to process id of what a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    told = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    return {
        int(word.removeprefix("RANK=")): int(pid)
        for pid, words in told.items()
        for word in words
        if word.startswith("RANK=")
    }


@pytest.mark.timeout(400)
def test_a_killed_rank_ends_the_others_by_name(images, taken_port):
    """And MASTER_PORT, which is taken, does not matter where the ranks find a port themselves."""
    process = start(
        *TINY, "--data.root", str(images), "--run.dir", "run", "--trainer.max_epochs", "5000",
        "--trainer.devices", "2", MASTER_PORT=taken_port,
    )  # fmt: skip
    wait_for("run/checkpoints/last.ckpt", process, 200)
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    code, out, err = finish(process, 150)
    assert (code, out) == (1, "")
    assert error_line(err) == (
        f"error: rank 1 (process {ranks[1]}) was killed by signal 9, so the others are ended: "
        "go on with --resume from the last checkpoint"
    )
    assert not any(map(is_running, ranks.values()))


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
