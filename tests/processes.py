"""Scripts run from the outside: started in a process group of their own, which is always ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(
    *arguments: str, script: Path = ROOT / "train.py", cwd: Path | None = None, **env: str
) -> subprocess.Popen:
    """Start a script; one that a test wrote elsewhere finds the project as those inside do."""
    path = {} if script.is_relative_to(ROOT) else {"PYTHONPATH": str(ROOT)}
    return start_command(str(script), *arguments, cwd=cwd, **path | env)


def start_command(*words: str, cwd: Path | None = None, **env: str) -> subprocess.Popen:
    """Start Python with the given words."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def finish(process: subprocess.Popen, timeout: float = 60) -> tuple[int, str, str]:
    """Wait for a process; whatever it leaves of its group is killed."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end_group(process)
    return process.returncode, out, err


def end_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process's group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def wait_for(path: str, process: subprocess.Popen, timeout: float = 60) -> None:
    """Wait until a process has made a file."""
    deadline = time.monotonic() + timeout
    while not Path(path).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            end_group(process)
            pytest.fail(f"{path} did not come: {process.communicate()[1]}")
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
