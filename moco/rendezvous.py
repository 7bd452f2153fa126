"""How the processes of a run meet, and how they leave one another.

torchrun's variables say which processes there are; `moco.slurm` sets them for the tasks of srun.
A rank that waits for others says so after a while, and gives up in the end.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from moco.config import RunError
from moco.distributed import is_active

log = logging.getLogger("moco")
PATIENCE_S = 10.0  # before a rank says that it waits for others
GIVE_UP = timedelta(minutes=30)  # torch's own limit
_groups: list[Any] = []  # that `connect` has made
_stores: dict[tuple[str, int, int], distributed.Store] = {}  # by address, port and rank; open ones
_runs: Counter[int] = Counter()  # by rank: how often it has met the others


def connect(device: torch.device) -> None:
    """Take `device` for this process, and meet the other ranks of its run if there are any.

    Raises:
        RunError: The port is taken, or a rank did not come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or is_active():
        return
    number = int(os.environ["RANK"])
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_meet(number, world),
        rank=number,
        world_size=world,
        timeout=GIVE_UP,
        device_id=device if on_gpu else None,
    )
    _groups.append(distributed.group.WORLD)


def disconnect() -> None:
    """Leave the other ranks at the end of a run; what was built on their group is void then.

    A group that the caller had made before `connect` stays the caller's.
    """
    if is_active() and distributed.group.WORLD in _groups:
        distributed.destroy_process_group()
    _groups.clear()


def _meet(number: int, world: int) -> distributed.Store:
    """Wait until all ranks have come to one store, and say after a while which are missing."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = _Patience()
    store = _store(address, port, number, patience)
    # A second attempt of torchrun's meets in the store of the first, and a second run of this
    # process in that of the run before; the keys that are there already are void.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"moco/{attempt}/{_runs[number]}", store)
    _runs[number] += 1
    store.set(str(number), "")
    store.add("come", 1)
    while store.add("come", 0) < world:
        missing = "another rank"
        if number == 0:  # which tells it for all
            names = [str(other) for other in range(world) if not store.check([str(other)])]
            missing = f"rank {', '.join(names)} of {world}"
        patience.wait(missing, aloud=number == 0)
    return store


def _store(address: str, port: int, number: int, patience: _Patience) -> distributed.Store:
    """Open the store that the ranks share; it stays open for further runs of this process."""
    hosts = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place = address, port, number
    while place not in _stores:
        try:
            _stores[place] = distributed.TCPStore(
                address, port, None, hosts, timedelta(seconds=5), wait_for_workers=False
            )
        except (distributed.DistError, RuntimeError) as error:
            if hosts:
                reason = "is taken" if "EADDRINUSE" in str(error) else f"cannot be used ({error})"
                raise RunError(
                    f"port {port}, at which the ranks meet, {reason}: set MASTER_PORT to another "
                    "one, the same for all ranks",
                    local=True,
                ) from None
            patience.wait(f"rank 0 at {address}:{port}")
    _stores[place].set_timeout(GIVE_UP)
    return _stores[place]


class _Patience:
    """Wait for other ranks: say once, after a while, which are missing, and give up in the end."""

    def __init__(self) -> None:
        self.begun, self.told = time.monotonic(), False

    def wait(self, missing: str, aloud: bool = True) -> None:
        waited = time.monotonic() - self.begun
        if waited > GIVE_UP.total_seconds():
            raise RunError(f"{missing} did not come within {GIVE_UP}: start all ranks", local=True)
        if aloud and not self.told and waited > PATIENCE_S:
            log.warning("waiting for %s", missing)
            self.told = True
        time.sleep(0.1)
