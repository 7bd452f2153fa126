"""Cores that others use too: when a run's threads sleep sooner, and that no result changes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_end, run_tiny

from moco.training import cores

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def two_threads(monkeypatch):
    """Compute on two threads, on a machine of two cores where the user has set nothing."""
    for name in cores.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """Set the time, and how long of it the run had no core."""
    now = SimpleNamespace(time=0.0, without_core=0.0)
    monkeypatch.setattr(cores.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(cores, "seconds_without_core", lambda: now.without_core)
    return now


def pass_time(look, clock, seconds: float, share: float, device: str = "cpu") -> None:
    clock.time += seconds
    clock.without_core += share * seconds
    module = SimpleNamespace(device=torch.device(device))
    look.on_train_batch_end(SimpleNamespace(is_global_zero=True), module)


def threads() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def wait_for_the_end_of(some: set[str]) -> None:
    """Wait for threads that are about to end; the last resort against a hang is a minute."""
    deadline = time.monotonic() + 60
    while some & threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not some & threads()


@pytest.fixture
def idle(monkeypatch) -> set[str]:
    """Note the threads that come with idle ones; others of the process come and go besides."""
    made: set[str] = set()

    def noting(kind=cores.IdleThreads) -> cores.IdleThreads:
        before = threads()
        threads_of_one = kind()
        made.update(threads() - before)
        return threads_of_one

    monkeypatch.setattr(cores, "IdleThreads", noting)
    return made


def test_idle_threads_come_while_the_cores_are_shared_and_go_when_they_are_free(
    two_threads, clock, idle, said, caplog, monkeypatch
):
    caplog.set_level("INFO", "moco")
    torch.zeros(2**20).add_(1)  # the team that computes
    look = cores.SharedCores()
    pass_time(look, clock, 3, 0.05)
    assert not idle and not said
    pass_time(look, clock, 3, 0.5)
    assert len(idle) == 2  # one, and the other thread of its team
    assert len(said) == 1 and "waited 50 % of the last 3 s" in said[0]
    pass_time(look, clock, cores.FIRST_TRY_S, 0.5)
    assert len(idle) == 2 and idle <= threads() and len(said) == 1
    pass_time(look, clock, 3, 0.5)
    assert not look.idle
    monkeypatch.undo()  # the clock goes again
    wait_for_the_end_of(idle)


def test_cores_are_tried_ever_less_often_until_they_are_free(two_threads, clock, monkeypatch):
    monkeypatch.setattr(cores, "IdleThreads", lambda: SimpleNamespace(end=lambda: None))
    look = cores.SharedCores()
    stays = []
    for _ in range(6):
        pass_time(look, clock, 3, 0.5)
        begun = clock.time
        while look.idle:
            pass_time(look, clock, 10, 0.5)
        stays.append(clock.time - begun)
    assert stays == [30, 50, 90, 170, 330, 330]
    pass_time(look, clock, 3, 0.05)
    pass_time(look, clock, 3, 0.5)
    pass_time(look, clock, 30, 0.05)
    assert not look.idle


@pytest.mark.parametrize("name", cores.SET_BY_USER)
def test_what_the_user_has_set_stays_and_the_run_says_only_that_cores_are_shared(
    two_threads, clock, monkeypatch, name, said, caplog
):
    caplog.set_level("INFO", "moco")
    monkeypatch.setenv(name, "1")
    look = cores.SharedCores()
    pass_time(look, clock, 3, 0.5)
    assert not look.idle and len(said) == 1


def test_a_gpu_needs_no_idle_threads(two_threads, clock):
    look = cores.SharedCores()
    pass_time(look, clock, 3, 0.5, "cuda")
    assert not look.idle


@pytest.mark.parametrize(
    ("computing", "there", "teams"),
    [(1, 2, 0), (2, 2, 1), (2, 4, 3), (4, 8, 2), (8, 16, 2), (4, 2, 0)],
)
def test_there_are_more_threads_than_cores_by_one_at_least(monkeypatch, computing, there, teams):
    for name in cores.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: computing)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(there)))
    assert cores.teams_to_outnumber_cores() == teams
    if teams:
        assert (
            computing + teams * (computing - 1) > there >= computing + (teams - 1) * (computing - 1)
        )


def test_a_run_beside_others_ends_with_the_same_bits_and_leaves_no_thread(
    two_threads, idle, images, monkeypatch
):
    monkeypatch.setattr(cores, "SHARED", 2.0)  # more than any share
    run_tiny(images, "--trainer.max_steps", "2", run_dir="alone")
    assert not idle
    monkeypatch.setattr(cores, "WINDOW_S", 0.0)
    monkeypatch.setattr(cores, "SHARED", -1.0)
    run_tiny(images, "--trainer.max_steps", "2", run_dir="beside")
    assert idle
    wait_for_the_end_of(idle)
    assert_same_end("alone", "beside")
