"""Ranks: the processes of one run, started here, watched, and named when one of them dies.

Under torchrun and SLURM these start and watch; then `RankLauncher` only runs the function.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

log = logging.getLogger("moco")
STOPPED = (130, 138, 143)  # exit codes of a rank that was asked to stop
NOTICE_S, LAST_WORD_S = 3.0, 30.0
_telling = threading.Lock()


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of one process per device, which names a rank that dies.

    Lightning's own observer kills everything, this process too, without a word.
    """

    @classmethod
    def replace(cls, strategy: Any) -> None:
        """Take the place of Lightning's launcher, where there is one."""
        theirs = strategy.launcher
        if isinstance(theirs, _SubprocessScriptLauncher):
            strategy._launcher = cls(
                theirs.cluster_environment, theirs.num_processes, theirs.num_nodes
            )

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kw: Any):
        """Start and watch the other ranks, or watch rank 0, and run `function`."""
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        ended = threading.Event()
        if not self.cluster_environment.creates_processes_externally:
            os.environ["MOCO_LAUNCHER"] = str(os.getpid())
            self._call_children_scripts()
            threading.Thread(target=_watch_children, args=(self.procs, ended), daemon=True).start()
        elif (parent := int(os.environ.get("MOCO_LAUNCHER", "0"))) not in (0, os.getpid()):
            threading.Thread(target=_watch_parent, args=(parent, ended), daemon=True).start()
        try:
            return function(*args, **kw)
        finally:
            ended.set()


def _watch_children(children: list[subprocess.Popen], ended: threading.Event) -> None:
    """End this process and the other ranks when a rank has ended badly."""
    while any(child.poll() is None for child in children):
        if _dead(children):
            break
        time.sleep(0.5)
    if _dead(children):
        _leave_the_last_word(ended)
        end_if_dead(children)


def _watch_parent(parent: int, ended: threading.Event) -> None:
    """End this rank when rank 0, which started it, is gone: its collectives may wait for ever.

    It may be gone already when this rank has come as far as here.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    _leave_the_last_word(ended)
    print("error: rank 0 died, so this rank ends", file=sys.stderr, flush=True)
    os._exit(1)


def _leave_the_last_word(ended: threading.Event) -> None:
    """Wait for what this process has to say itself: what ends all ranks ends one of them first.

    It may have to save, or to end wandb. A rank that does not notice is stuck, and gets no time.
    """
    if ended.wait(NOTICE_S):
        time.sleep(LAST_WORD_S)


def _dead(children: list[subprocess.Popen]) -> tuple[int, subprocess.Popen] | None:
    """Return the first rank that has ended badly, and its process."""
    ended = ((rank, child) for rank, child in enumerate(children, 1) if child.poll())
    return next(((rank, child) for rank, child in ended if child.returncode not in STOPPED), None)


def end_if_dead(children: list[subprocess.Popen]) -> None:
    """Name the first rank that died and end all others with exit code 1."""
    found = _dead(children)
    if not found:
        return
    _telling.acquire()  # for good: the watching thread and the main one may both come here
    (rank, child), code = found, found[1].returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(
        f"error: rank {rank} (process {child.pid}) {how}, so the others are ended: go on with "
        "--resume from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    for other in children:
        other.kill()
    os._exit(1)


def free_port() -> None:
    """Replace a MASTER_PORT that is taken, where this process alone starts all ranks.

    Ranks that others start, or that run on several machines, meet at the port that all were told:
    one that replaced it would wait for ever. Without one Lightning finds a free port by itself.
    """
    wanted = os.environ.get("MASTER_PORT", "")
    told = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    if not wanted or any(name in os.environ for name in told) or SLURMEnvironment.detect():
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted)))
            return
        except (OSError, OverflowError, ValueError):
            probe.bind(("", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    log.info("MASTER_PORT %s is taken or no port: %s is used", wanted, os.environ["MASTER_PORT"])
