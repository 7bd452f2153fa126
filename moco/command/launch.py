"""Ranks: several processes of one command line, started and watched by torchrun's library.

The process that the user called becomes the launcher. It starts the ranks, passes signals on to
them and ends with the exit code of the first rank that failed. Under torchrun and srun, which
start the ranks themselves, this room starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from moco import slurm
from moco.config import RunError, UserError
from moco.log import fitted, is_terminal

_ROLE = "moco"  # torchrun's own ranks have another role


def start_ranks(count: int, remedy: str) -> None:
    """Start `count` ranks of this command line and exit as they do; return where there is one.

    Args:
        count: Ranks on this machine.
        remedy: What the user can do when a rank was killed.

    Raises:
        SystemExit: In the launcher, always, unless a rank was killed.
        RunError: A rank was killed.
    """
    if count > 1 and "RANK" not in os.environ:
        code = _launch(count, remedy)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # also while Python shuts down
        sys.exit(code)


def end_with_launcher() -> None:
    """In a rank, watch the launcher: when it is gone, nothing else would end the rank."""
    if _is_rank():
        launcher = int(os.environ["TORCHELASTIC_RUN_ID"])
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def stop(number: int, frame: Any) -> None:
    """Answer Ctrl-C and SIGTERM until training does.

    Before the first step a run has nothing to save and ends at once, also in the middle of an
    import, in which Python may lose an exception. Other commands may have a file half written.
    """
    if number == signal.SIGINT and not slurm.restartable:
        raise KeyboardInterrupt
    with contextlib.suppress(RuntimeError):  # the signal came while a line was written
        say_stopped(number)
    os._exit(128 + number)


def end_cleanly() -> None:
    """From here on, end by SIGTERM and SIGHUP as by an error: what is open is closed."""

    def leave(number: int, frame: Any) -> NoReturn:
        say_stopped(number)
        sys.exit(128 + number)

    _handle((signal.SIGTERM, signal.SIGHUP), leave)


def _handle(numbers: tuple[int, ...], handler: Callable[[int, Any], None]) -> None:
    """Set the handler of signals, but for a hangup that nohup has had ignored."""
    for number in numbers:
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):
            signal.signal(number, handler)


def say_stopped(number: int, hint: str = "") -> None:
    """Print the last line of a command that a signal ends; a terminal has shown ^C before it."""
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    new_line = "\n" if number == signal.SIGINT and is_terminal() else ""
    say(f"{new_line}stopped by {by}{hint}")


def say(line: str) -> None:
    """Print a last line on standard error; a rank hands it to its launcher, which prints one."""
    if _is_rank():
        report = {"message": line, "timestamp": int(time.time())}  # as the library reads it
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump(report, file)
    else:
        print(fitted(line), file=sys.stderr)


def wait_for_others(seconds: float) -> None:
    """Let another rank fail first; torchrun, or srun if it is told so, then ends this one."""
    if "RANK" in os.environ:
        time.sleep(seconds)


def _is_rank() -> bool:
    """Tell whether a launcher of this room started this process."""
    return os.environ.get("ROLE_NAME") == _ROLE


def _watch(launcher: int) -> None:
    """End this process as soon as the launcher is no longer its parent."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


def _launch(count: int, remedy: str) -> int:
    """Run the ranks to their end and return the exit code."""
    if hasattr(sys, "ps1") or threading.current_thread() is not threading.main_thread():
        raise UserError(
            f"{count} devices need {count} processes, which a notebook, Python's own shell and a "
            "thread cannot start: take 1 device here, or give the command in a terminal"
        )
    with tempfile.TemporaryDirectory() as folder:
        agent = _build_agent(count, folder)
        passed_on = _pass_signals_on(agent)
        failures = agent.run().failures
        if not failures:
            return 0
        rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
        if -first.exitcode in passed_on:  # the signal came before the rank could handle it
            _end_early(-first.exitcode)
        if first.exitcode < 0:
            raise RunError(
                f"rank {rank} (process {first.pid}) was killed by signal {-first.exitcode}, so the "
                f"others are ended: {remedy}"
            )
        if os.path.isfile(first.error_file):
            say(first.message)
        return first.exitcode


def _end_early(number: int) -> NoReturn:
    """End by a signal that came before any rank could answer it."""
    if number == signal.SIGUSR1:
        slurm.start_again(number, None)
    say_stopped(number)
    sys.exit(128 + number)


def _build_agent(count: int, folder: str) -> Any:
    """Build what starts and watches the ranks; they leave their last lines in `folder`."""
    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    # The library logs and handles signals in its own way: its lines would stand beside the ranks',
    # and a rank that takes more than 30 s to save after a signal would be killed.
    logging.disable(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    name = str(os.getpid())  # which the ranks find in TORCHELASTIC_RUN_ID
    meeting = RendezvousParameters("c10d", "localhost:0", name, 1, 1, local_addr="127.0.0.1")
    words = [word.replace("$", "$$") for word in sys.orig_argv[1:]]  # the library expands $NAME
    spec = WorkerSpec(
        role=_ROLE,
        local_world_size=count,
        rdzv_handler=get_rendezvous_handler(meeting),
        entrypoint=sys.executable,
        args=tuple(words),
        max_restarts=0,
        monitor_interval=0.1,
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs(folder))


def _pass_signals_on(agent: Any) -> set[int]:
    """Hand stopping signals to all ranks, and return the set in which those are noted."""
    passed_on: set[int] = set()

    def pass_on(number: int, frame: Any) -> None:
        passed_on.add(number)
        for worker in agent.get_worker_group().workers:
            if worker.id is None:  # no rank has started yet
                _end_early(number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.id, number)

    _handle((signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1), pass_on)
    return passed_on
