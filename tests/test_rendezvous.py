"""Ranks meet in one store: who is missing is named, and an attempt meets its own ranks."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta

import pytest
import torch

from moco import rendezvous
from moco.config import RunError


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by waiting alone."""
    passed = [0.0]

    def sleep(seconds):
        passed[0] += 4

    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(rendezvous.time, "sleep", sleep)
    monkeypatch.setattr(rendezvous, "GIVE_UP", timedelta(seconds=30))


@pytest.fixture
def agent(monkeypatch):
    """The store of torchrun's agent, which outlives the ranks of an attempt."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_stores", {})
    monkeypatch.setattr(rendezvous, "_runs", Counter())
    return store


def test_a_rank_that_does_not_come_is_named_soon_and_once(clock, agent, said):
    with pytest.raises(RunError, match=r"rank 1 of 2 did not come"):
        rendezvous._meet(0, 2)
    assert said == ["waiting for rank 1 of 2"]


def test_rank_0_is_named_where_it_does_not_come(clock, agent, said, monkeypatch):
    def refused(*arguments, **options):
        raise torch.distributed.DistNetworkError("Connection refused")

    monkeypatch.setattr(torch.distributed, "TCPStore", refused)
    with pytest.raises(RunError, match=r"rank 0 at 127.0.0.1:\d+ did not come"):
        rendezvous._meet(1, 2)
    assert len(said) == 1 and said[0].startswith("waiting for rank 0 at 127.0.0.1:")


def test_a_second_attempt_does_not_meet_the_ranks_of_the_first(agent, monkeypatch):
    """torchrun --max-restarts keeps its store, where the dead ranks have left their addresses."""
    other = threading.Thread(target=rendezvous._meet, args=(1, 2))
    other.start()
    rendezvous._meet(0, 2)
    other.join()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(rendezvous, "GIVE_UP", timedelta(0))
    with pytest.raises(RunError, match=r"rank 1 of 2 did not come"):
        rendezvous._meet(0, 2)


def test_a_port_that_is_taken_is_told(agent, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with pytest.raises(RunError, match=r"port \d+, at which.* is taken: set MASTER_PORT"):
        rendezvous._meet(0, 2)
