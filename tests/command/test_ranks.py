"""Watching ranks: who has the last word when one ends, and which port they meet at.

Ranks killed for real in a whole run: tests/test_faults.py.
"""

from __future__ import annotations

import os
import socket
import time

import pytest
from processes import ROOT, finish, start_command

from moco.training import ranks

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a busy machine
PARENT = """
import subprocess, sys, time
from types import SimpleNamespace
from moco.training import ranks

class Launcher(ranks.RankLauncher):
    def _call_children_scripts(self):
        self.procs = [subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(1)"])]

environment = SimpleNamespace(
    creates_processes_externally=False, validate_settings=lambda **settings: None
)
"""
CHILD = PARENT.replace("externally=False", "externally=True")


def python(code: str, timeout: float = 280, **env: str) -> tuple[int, str, str]:
    return finish(start_command("-c", code, cwd=ROOT, **env), timeout)


def test_what_ends_all_ranks_is_told_by_rank_0_though_another_ends_first():
    """As with numbers that are not finite; rank 0 may still have to save, or to end wandb."""
    code, out, err = python(
        PARENT
        + """
def function():
    time.sleep(1.5)  # the other rank is dead by now
    raise ValueError("not finite at step 3")

try:
    Launcher(environment, 2, 1).launch(function)
except ValueError as error:
    time.sleep(2)
    print(error)
"""
    )
    assert (code, out) == (0, "not finite at step 3\n"), err
    assert "rank 1" not in err


def test_a_rank_that_waits_for_a_dead_one_is_ended():
    begin = time.monotonic()
    code, _, err = python(PARENT + "Launcher(environment, 2, 1).launch(lambda: time.sleep(99))")
    assert code == 1
    assert err.count("error: rank 1 (process") == 1 and "ended with exit code 1" in err
    assert time.monotonic() - begin < 90, "with the start of two processes"


@pytest.mark.parametrize(("wait", "word"), [(0, "done"), (99, "rank 0 died")])
def test_a_rank_outlives_rank_0_only_to_finish_what_it_is_about(tmp_path, wait, word):
    """Rank 0 may be quicker to end a good run; a rank that waits for a dead one is ended."""
    child = (
        CHILD
        + f"""
import os
parent = os.getppid()
Launcher(environment, 2, 1).launch(lambda: time.sleep({wait}))
while os.getppid() == parent:
    time.sleep(0.1)
time.sleep(1.5)
print("done", file=sys.stderr)
"""
    )
    log = tmp_path / "said"
    (tmp_path / "child.py").write_text(child)
    code, _, _ = python(
        f"""
import os, subprocess, sys, time
env = os.environ | {{"MOCO_LAUNCHER": str(os.getpid()), "PYTHONPATH": {str(ROOT)!r}}}
with open({str(log)!r}, "w") as log:
    child = [sys.executable, {str(tmp_path / "child.py")!r}]
    subprocess.Popen(child, stdout=log, stderr=log, env=env)
time.sleep(6)
"""
    )
    assert code == 0
    deadline = time.monotonic() + 200
    while (
        not {"done", "died"} & set(log.read_text().replace(",", " ").split())
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    time.sleep(0.5)
    said = log.read_text()
    assert word in said and ("done" in said) != ("rank 0 died" in said)


@pytest.fixture
def taken(monkeypatch):
    """A MASTER_PORT that is in use, in an environment that says nothing else about ranks."""
    for name in list(os.environ):
        if name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        monkeypatch.setenv("MASTER_PORT", str(busy.getsockname()[1]))
        yield os.environ["MASTER_PORT"]


def test_a_taken_port_is_replaced_where_this_process_starts_all_ranks(taken, monkeypatch):
    ranks.free_port()
    free = os.environ["MASTER_PORT"]
    assert free != taken
    ranks.free_port()
    assert os.environ["MASTER_PORT"] == free, "a free one stays"
    for odd in ("x", "99999"):
        monkeypatch.setenv("MASTER_PORT", odd)
        ranks.free_port()
        assert 0 < int(os.environ["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "told",
    [
        {"LOCAL_RANK": "1"},  # torchrun, or started by rank 0
        {"NODE_RANK": "0"},  # several machines, each started by hand
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "moco", "SLURM_PROCID": "1"},
    ],
    ids=["local", "machines", "slurm"],
)
def test_a_taken_port_stays_where_other_ranks_were_told_it(taken, monkeypatch, told):
    """It may be rank 0 that holds it: whoever replaced it would wait for the others for ever."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    ranks.free_port()
    assert os.environ["MASTER_PORT"] == taken
