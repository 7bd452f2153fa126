"""SLURM's variables as srun 22.05 sets them, and what is made of them. tests/slurm.sh has SLURM."""

from __future__ import annotations

import os
import signal

import pytest

from moco import slurm
from moco.config import UserError

TORCHRUN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip
# `sbatch -n 2` in its batch script: what is asked for, and a process that is started alone.
BATCH = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "moco", "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]",
    "SLURM_TASK_PID": "1",
}  # fmt: skip


def step(tasks: str, per_node: str, rank: str = "1", local: str = "1", **more: str):
    """What srun adds in a task."""
    told = {
        "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": tasks, "SLURM_NTASKS": tasks,
        "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_PROCID": rank, "SLURM_LOCALID": local,
    }  # fmt: skip
    return BATCH | told | more


@pytest.fixture
def joined(monkeypatch):
    """Return what a process that finds these variables tells itself in torchrun's."""

    def join(told: dict[str, str]) -> dict[str, str]:
        for name in list(os.environ):
            if name in TORCHRUN or name.startswith("SLURM_"):
                monkeypatch.delenv(name)
        for name in TORCHRUN:  # so that what `join` sets is gone after the test
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        slurm.join()
        return {name: os.environ[name] for name in TORCHRUN if name in os.environ}

    return join


def test_a_task_of_srun_finds_its_place(joined):
    """Without --ntasks-per-node, which is what was asked for; a name of the job says nothing."""
    found = joined(step("2", "2") | {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS_PER_NODE": "8"})
    assert found == {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "15773",
    }  # fmt: skip


def test_tasks_on_several_nodes_find_theirs(joined):
    found = joined(step("6", "2(x3)", rank="3", local="1", SLURM_NODEID="1"))
    assert [found[name] for name in TORCHRUN[:5]] == ["3", "1", "6", "2", "1"]
    assert joined(step("2", "1(x2)", local="0"))["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n7", "n1"),
        ("gpu[03-05,9],m1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("r[2-3]n[01-04]", "r2n01"),
        ("node-1.site.org,node-2.site.org", "node-1.site.org"),
    ],
)
def test_ranks_meet_on_the_first_node(joined, nodes, first):
    assert joined(step("2", "2", SLURM_STEP_NODELIST=nodes))["MASTER_ADDR"] == first


def test_steps_of_one_job_meet_at_ports_of_their_own_unless_one_is_given(joined):
    ports = {joined(step("2", "2", SLURM_STEP_ID=n))["MASTER_PORT"] for n in ("0", "1", "2")}
    assert len(ports) == 3 and all(15000 <= int(port) < 25000 for port in ports)
    given = joined(step("2", "2", MASTER_PORT="1234", MASTER_ADDR="here"))
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("here", "1234")


ALONE = {
    "outside SLURM": {},
    "a batch script, or a shell of salloc": BATCH,
    "the only task": step("1", "1", rank="0", local="0", SLURM_NTASKS_PER_NODE="2"),
    "a shell that is one of two tasks": step("2", "2", SLURM_PTY_PORT="1"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_process_that_was_started_alone_is_alone(joined, name):
    assert joined(ALONE[name]) == {}


def test_a_command_at_a_terminal_is_a_task_all_the_same(joined):
    told = step("2", "2", SLURM_PTY_PORT="1", SLURM_TASK_PID=str(os.getpid()))
    assert joined(told)["RANK"] == "1"


def test_torchrun_in_a_task_of_srun_has_the_last_word(joined):
    told = {"RANK": "5", "WORLD_SIZE": "8"}
    assert joined(step("2", "1(x2)") | told) == told


def test_unequal_nodes_are_refused_by_rank_0_alone(joined):
    with pytest.raises(UserError, match=r"2,1 tasks.*--ntasks-per-node"):
        joined(step("3", "2,1"))
    assert os.environ["RANK"] == "1", "whose error is not printed"


# Requeueing


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A stand-in for scontrol; returns what it was asked."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "asked"
    return lambda: path.read_text() if path.exists() else ""


def test_a_warning_where_nothing_is_saved_starts_the_job_again(asked, monkeypatch):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(slurm, "restartable", False)
    slurm.start_again(signal.SIGUSR1, None)
    assert asked() == "", "an evaluation, or a run that is done"
    slurm.restartable = True
    with pytest.raises(SystemExit, match="138"):
        slurm.start_again(signal.SIGUSR1, None)
    assert asked() == "requeue 77\n"


def test_a_job_is_requeued_once_by_rank_0(asked, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        slurm.requeue()
    assert asked() == "requeue 77\n"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    slurm.requeue()
    assert asked().splitlines()[1] == "requeue 70_4"
