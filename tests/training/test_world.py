"""The world is what was started: tasks of srun, attempts of torchrun, a thread of a notebook."""

from __future__ import annotations

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pictures import write_pictures
from processes import ROOT, end_group, finish, start, start_command, wait_for
from runs import STREAMED, TINY, error_line, run_tiny
from test_slurm import step

from moco.config import TrainConfig, UserError
from moco.training import run

pytestmark = [pytest.mark.usefixtures("in_tmp"), pytest.mark.timeout(400)]


@pytest.fixture
def srun():
    """Start two tasks as `sbatch -n 2` and srun do; `more` is what a task alone is given."""
    started = []

    def start_tasks(*words: str, more: tuple[str, ...] = (), script=ROOT / "train.py"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in ("0", "1"):
            told = step("2", "2", rank, rank, SLURM_JOB_NAME="bash", **place)
            own = more if rank == "1" else ()
            started.append(start(*words, *own, script=script, **told))
        return started

    yield start_tasks
    for process in started:
        end_group(process)


def test_tasks_of_srun_are_one_run_in_one_directory(images, srun):
    ends = [finish(p) for p in srun(*TINY, "--data.root", str(images), "--resume", "auto")]
    assert [code for code, _, _ in ends] == [0, 0], ends
    (directory,) = Path("runs").iterdir()
    result = json.loads(ends[0][1])
    assert result["run_dir"] == str(directory) and ends[1][1] == ""
    assert "2 cpu device(s)" in ends[0][2] and "key BatchNorm: shuffle" in ends[0][2]


def test_a_signal_to_one_task_ends_all_with_its_code(images, srun):
    """An end with 0 would tell torchrun that this machine has finished."""
    tasks = srun(
        *TINY, "--data.root", str(images), "--run.dir", "run", "--trainer.max_epochs", "99"
    )
    wait_for("run/checkpoints/last.ckpt", tasks[0])
    tasks[1].send_signal(signal.SIGTERM)
    ends = [finish(task) for task in tasks]
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert json.loads(ends[0][1])["run_dir"] == "run" and ends[1][1] == ""


TWICE = """
import os, signal
from moco import distributed
from moco.command import cli
from moco.training import run
import train
pretrain, from_first = run._pretrain, distributed.from_first
def warned(make):
    if os.environ["RANK"] == "1":
        LAST
    return from_first(make)
def stopped(*arguments):
    result = pretrain(*arguments)
    distributed.from_first = warned
    return result
run._pretrain = stopped
cli.run_main(train.main)
"""


@pytest.mark.parametrize("last", ["signal.raise_signal(signal.SIGTERM)", "os._exit(9)"])
def test_what_befalls_a_task_that_waits_after_a_signal_keeps_no_result_back(
    images, tmp_path, srun, last
):
    """It waits for rank 0, which may take long to save: SLURM sends a second signal meanwhile."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE.replace("LAST", last))
    words = ("--data.root", str(images), "--run.dir", "run", "--trainer.max_epochs", "99")
    tasks = srun(*TINY, *words, script=script)
    wait_for("run/checkpoints/last.ckpt", tasks[0])
    tasks[0].send_signal(signal.SIGUSR1)
    code, out, err = finish(tasks[0])
    assert code == 128 + signal.SIGUSR1, err
    assert json.loads(out)["run_dir"] == "run" and "Traceback" not in err
    assert finish(tasks[1])[0] == (9 if "exit" in last else code)


def test_a_plan_is_told_by_one_task(images, srun):
    ends = [finish(p) for p in srun(*TINY, "--data.root", str(images), "--run.plan", "true")]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert json.loads(ends[0][1])["plan"]["steps"] and ends[1][1] == ""
    assert not Path("runs").exists()


def test_what_is_wrong_on_one_task_is_told_once_and_ends_all(images, srun):
    """Rank 1 says nothing, also not later: it only waits to be ended, or for the others' words."""
    tasks = srun(*TINY, "--data.root", str(images), more=("--data.root", "missing"))
    code, out, err = finish(tasks[0])
    assert (code, out) == (2, "")
    assert error_line(err).startswith("error: rank 1: data.root 'missing' does")
    end_group(tasks[1])
    assert "error" not in "".join(tasks[1].communicate())
    assert not Path("runs").exists()


def test_what_one_task_lacks_is_told_by_rank_0(images, srun):
    """As where a machine has no copy of a file."""
    tasks = srun(*TINY, "--data.root", str(images), more=("--init_from", "missing.ckpt"))
    code, out, err = finish(tasks[0])
    assert (code, out) == (2, "")
    assert error_line(err).startswith("error: rank 1: ")
    assert "missing.ckpt" in error_line(err)


def test_tasks_with_other_images_are_refused(images, copied, srun):
    """A row would be one image here and another there, and a key no view of its query."""
    (copied / "47.jpg").rename(copied / "00b.jpg")
    tasks = srun(*TINY, "--data.root", str(images), more=("--data.root", str(copied)))
    code, _, err = finish(tasks[0])
    assert code == 2
    assert "are not the same on rank 0 and rank 1" in error_line(err)


def test_tasks_that_judge_other_weights_are_refused(srun, tmp_path):
    """As where the run that writes last.ckpt goes on while two ranks read it."""
    files = [
        f"{split}/{kind}/{n}.png" for split in ("train", "test") for kind in "ab" for n in "12"
    ]
    for file in files:
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
    write_pictures(tmp_path / "set", files, np.random.default_rng(0))
    few = ("--data.batch_size", "4", "--model.queue_size", "4")
    run_tiny(tmp_path / "set", *few)
    steps = [f"run/checkpoints/step_00000000{step}.ckpt" for step in (1, 2)]
    words = ("--checkpoint", steps[0], "--k", "[1]", "--accelerator", "cpu")
    tasks = srun(*words, more=("--checkpoint", steps[1]), script=ROOT / "eval_knn.py")
    code, out, err = finish(tasks[0])
    assert (code, out) == (2, "")
    assert "the weights in run/checkpoints/step_000000001.ckpt are not the" in error_line(err)


ATTEMPTS = """
import os
from torch.distributed.launcher import LaunchConfig, elastic_launch

def run_twice():
    import torch
    from moco import distributed, rendezvous
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for run in (0, 1):
        rendezvous.connect(torch.device("cpu"))
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        open(f"done{distributed.rank()}-{attempt}-{run}", "w").write(str(total.item()))
        if (attempt, run) == ("0", 1):
            torch.distributed.barrier()
            os._exit(1)  # with the group as it stands
        rendezvous.disconnect()

elastic_launch(LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, run_id="test", start_method="fork",
    rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="127.0.0.1", monitor_interval=0.1,
), run_twice)()
"""


@pytest.mark.parametrize("own_store", ["0", "1"])
def test_the_second_attempt_of_torchrun_meets(own_store):
    """In the agent's store, and in one of its own (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).

    A rank of each attempt may also train twice, as a notebook does. The ranks are forks of
    torchrun's agent, so that they need not import torch again.
    """
    Path("agent.py").write_text(ATTEMPTS)
    told = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    code, _, err = finish(start(script=Path("agent.py").resolve(), **told))
    assert code == 0, err
    done = {path.name: path.read_text() for path in Path().glob("done*")}
    places = [(rank, attempt, run) for rank in (0, 1) for attempt in (0, 1) for run in (0, 1)]
    assert done == {f"done{rank}-{attempt}-{run}": "2.0" for rank, attempt, run in places}


# Signals at the edges of a run


@pytest.fixture
def scontrol(tmp_path):
    """A stand-in, in a job of SLURM; returns the environment, which notes what it was asked."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


def test_a_warning_while_torch_is_imported_starts_the_job_again(tmp_path, scontrol):
    """Of a torch that takes for ever."""
    slow = tmp_path / "slow" / "torch" / "__init__.py"
    slow.parent.mkdir(parents=True)
    slow.write_text(f"import time\nopen({str(tmp_path / 'begun')!r}, 'w')\ntime.sleep(9999)\n")
    process = start_command(
        str(ROOT / "train.py"), "--data.dataset", "digits",
        PYTHONPATH=str(slow.parent.parent), **scontrol,
    )  # fmt: skip
    wait_for(str(tmp_path / "begun"), process)
    process.send_signal(signal.SIGUSR1)
    code, out, err = finish(process)
    assert (code, out) == (128 + signal.SIGUSR1, ""), err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


LATE = """
import signal
from moco.command import cli
from moco.training import run
import train
results = run.results
def warned(*arguments):
    signal.raise_signal(signal.SIGUSR1)
    return results(*arguments)
run.results = warned
cli.run_main(train.main)
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_warning_after_the_last_step_and_after_the_result_changes_nothing(
    images, tmp_path, scontrol
):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    words = ("--data.root", str(images), "--run.dir", "run")
    code, out, err = finish(start(*TINY, *words, script=script, **scontrol))
    assert code == 0, err
    assert json.loads(out)["steps"] == 6
    assert not (tmp_path / "asked").exists()


def test_a_signal_in_the_last_step_leaves_a_finished_run(images, monkeypatch):
    from moco.training.saving import Checkpoints

    begin = Checkpoints.on_train_batch_start

    def signalled(self, trainer, *arguments):
        begin(self, trainer, *arguments)
        if trainer.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "on_train_batch_start", signalled)
    assert "stopped_by" not in run_tiny(images, "--trainer.max_steps", "2")


# From Python


@pytest.mark.parametrize("words", [[], STREAMED], ids=["resident", "streamed"])
def test_a_thread_may_train(images, words):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_tiny, images, *words, "--trainer.max_steps", "2").result()["steps"]


def test_a_run_of_several_devices_that_nobody_has_started_is_refused(images, monkeypatch):
    config = TrainConfig()
    config.data.dataset, config.data.root, config.data.batch_size = "folder", str(images), 16
    config.model.queue_size, config.trainer.accelerator = 16, "cpu"
    config.trainer.devices = 2
    monkeypatch.setattr("moco.training.hardware.os.cpu_count", lambda: 2)
    with pytest.raises(UserError, match=r"ask for 2 devices and 1 process runs"):
        run.pretrain(config)
