"""A run never runs code from a file, leaks a secret, or asks the network."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import torch
from runs import at, run_tiny

import train
from moco.checkpoints.read import read_state
from moco.config import UserError

pytestmark = pytest.mark.usefixtures("in_tmp")


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
    """A run connects to nothing: not for weights, not for data sets, not to report."""
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
    """At some lengths torch says Invalid argument, since it seeks to before the file's start."""
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
    if place == "--config":
        with pytest.raises(UserError):
            train.main([place, argument])
    else:  # the settings in the checkpoint stand in
        assert train.main([place, argument])["steps"] == 1
    assert not Path("pwned").exists()


def test_a_path_of_a_checkpoint_reads_no_variable(images, monkeypatch, capfd):
    monkeypatch.setenv("SECRET", "c0ffee" * 6)
    run_tiny(images, "--trainer.max_steps", "1")
    state = at(1)
    state["config"]["data"]["root"] = "$SECRET"
    torch.save(state, "alone.ckpt")
    for argument in (["--run.dir", "other"], ["--run.dir", "other", "--data.root", "$SECRET"]):
        with pytest.raises(UserError) as error:
            train.main(["--resume", "alone.ckpt", *argument])
        assert "c0ffee" not in str(error.value)


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
