"""SLURM: where a process stands among the tasks that srun has started, and requeueing its job.

`join` gives the answer in torchrun's variables at the start of a command. From there on the two
launchers are one case. This room needs no torch.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from typing import Any

from moco.config import UserError

log = logging.getLogger("moco")
# Whether this process would lose training if it ended now: SLURM's warning starts the job again.
restartable = False
ANSWER_S, PATIENCE_S = 30, 35  # seconds that SLURM may take to answer, and that other ranks wait


def join() -> None:
    """Set RANK, WORLD_SIZE and what else torchrun sets, where srun has started several tasks.

    The facts are those of the step, which say what was started. Those of the job say what was asked
    for: they are also there in a batch script, in a shell, and beside the only task of a step, and
    these are processes like any other, which may start ranks themselves.

    Raises:
        UserError: The nodes run different numbers of tasks.
    """
    told = os.environ
    count = told.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in told or count == "1" or _in_shell():
        return
    told["RANK"], told["WORLD_SIZE"] = told["SLURM_PROCID"], count
    equal = re.fullmatch(r"(\d+)(\(x\d+\))?", told["SLURM_STEP_TASKS_PER_NODE"])
    if not equal:
        raise UserError(
            f"srun has started {told['SLURM_STEP_TASKS_PER_NODE']} tasks on its nodes, which must "
            "be equal numbers: give --ntasks-per-node"
        )
    told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"] = told["SLURM_LOCALID"], equal[1]
    told["GROUP_RANK"] = told["SLURM_NODEID"]
    # The first host of a list such as n[01-03,7],m1
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", told["SLURM_STEP_NODELIST"]).split(",")[0]
    told.setdefault("MASTER_ADDR", first)
    # All tasks find the same port, and steps beside each other find different ones.
    number = 10 * int(told["SLURM_JOB_ID"]) + int(told["SLURM_STEP_ID"])
    told.setdefault("MASTER_PORT", str(15000 + number % 10000))


def _in_shell() -> bool:
    """Tell whether the user has typed this command in a shell that is a task (`srun --pty`)."""
    return "SLURM_PTY_PORT" in os.environ and os.environ["SLURM_TASK_PID"] != str(os.getpid())


def answer_warnings() -> None:
    """Handle SIGUSR1, which SLURM sends ahead of a time limit, until training handles it."""
    signal.signal(signal.SIGUSR1, start_again)


def start_again(number: int, frame: Any) -> None:
    """Requeue the job and end with the signal's code; do nothing where nothing would be lost.

    Before the first step there is nothing to save, and after the last one nothing to do. Other
    ranks wait while rank 0 asks SLURM, since the end of one of them would make the launcher end it.
    """
    if restartable:
        requeue()
        if os.environ.get("RANK", "0") != "0":
            time.sleep(PATIENCE_S)
        os._exit(128 + number)


def requeue() -> None:
    """Ask SLURM to start this job again; does nothing outside a SLURM job, and on other ranks."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    if array:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job or os.environ.get("RANK", "0") != "0":
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, timeout=ANSWER_S)
        problem = done.stderr.decode(errors="replace").strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        log.warning("job %s was not requeued: %s", job, problem)
    else:
        log.info("job %s is requeued", job)
