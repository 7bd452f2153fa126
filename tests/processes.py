"""Scripts that run in processes of their own, each in a process group that is always ended.

A script is forked from a server that has imported the libraries, so it starts at once. Like any
process it has its own memory, signals, output and exit code. What it starts itself imports anew.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT_S = 600  # the last resort against a hang, far above what a slow and busy machine needs

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytorch_lightning", "timm", "sklearn.datasets", "jsonargparse"])


class Script:
    """A running script, with the part of `subprocess.Popen` that these tests use."""

    def __init__(self, words: tuple[str, ...], cwd: Path | None, env: dict[str, str]) -> None:
        readers, writers = zip(*(FORKS.Pipe(duplex=False) for _ in range(2)), strict=True)
        arguments = (writers, words, str(cwd or Path.cwd()), env)
        self._process = FORKS.Process(target=_run, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid
        self._said = ["", ""]
        self._threads = [
            threading.Thread(target=self._read, args=item, daemon=True)
            for item in enumerate(readers)
        ]
        for writer, thread in zip(writers, self._threads, strict=True):
            writer.close()
            thread.start()

    def _read(self, number: int, reader: Any) -> None:
        with open(reader.fileno(), encoding="utf-8", closefd=False) as file:
            self._said[number] = file.read()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, str]:
        """Wait until the script and all that share its output have ended; return what they said."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(deadline - time.monotonic())
            if thread.is_alive():
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        self.wait()
        return self._said[0], self._said[1]


def _run(writers: list[Any], words: tuple[str, ...], cwd: str, env: dict[str, str]) -> None:
    """Run a script as `python SCRIPT WORDS` does; runs in the forked process."""
    forget_start_method()
    os.setsid()
    for number, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), number)
        writer.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.orig_argv = list(words), [sys.executable, *words]
    sys.path[:0] = [os.path.dirname(os.path.abspath(words[0])), str(ROOT)]
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def forget_start_method() -> None:
    """In a forked process, start further ones as a fresh Python does.

    A child of a fork server starts its own children from a server of its own, which imports all
    libraries again: each script with workers would pay for that, and no user's script works so.
    """
    multiprocessing.set_start_method(None, force=True)


def start(
    *arguments: str, script: Path | str = ROOT / "train.py", cwd: Path | None = None, **env: str
) -> Script:
    """Start a script; what it starts finds the project wherever the script lies."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    return Script((str(script), *arguments), cwd, dict(env))


def start_command(*words: str, cwd: Path | None = None, **env: str) -> subprocess.Popen:
    """Start Python anew with the given words: for what a start or its imports are to show."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def finish(process: Script | subprocess.Popen, timeout: float = LIMIT_S) -> tuple[int, str, str]:
    """Wait for a process; whatever it leaves of its group is killed."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end_group(process)
    return process.returncode, out, err


def end_group(process: Script | subprocess.Popen) -> None:
    """Kill a process and what is left of its group."""
    if process.poll() is None:
        process.kill()  # it may not have made its group yet
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(path: str, process: Script | subprocess.Popen, timeout: float = LIMIT_S) -> None:
    """Wait until a process has made a file."""
    deadline = time.monotonic() + timeout
    while not Path(path).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            end_group(process)
            raise AssertionError(f"{path} did not come: {process.communicate()[1]}")
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
