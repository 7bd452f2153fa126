"""Processes that torchrun or srun has started, against what settings and machines have."""

from __future__ import annotations

import pytest

from moco import distributed
from moco.config import TrainConfig, UserError
from moco.training import hardware, settling


@pytest.fixture
def config(monkeypatch) -> TrainConfig:
    """Settings of a rank of three, of which two are on this machine of two cores."""
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = TrainConfig()
    config.trainer.accelerator = "cpu"
    return config


def test_devices_that_a_run_keeps_from_its_start_are_told_with_what_to_give(config):
    config.trainer.devices = 4
    with pytest.raises(UserError, match=r"is 4 but 2 of the .* give --trainer.devices 0"):
        hardware.choose_devices(config)


def test_more_processes_than_cores_are_not_called_a_setting(config, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes were started .* 2 CPU cores.*fewer"):
        hardware.choose_devices(config)


def test_machines_with_different_numbers_of_ranks_are_told_so(config):
    settings = settling.Settings(config)
    with pytest.raises(UserError, match=r"2 of 3 processes .* different numbers"):
        settling.decide_how(settings, 100, None)
