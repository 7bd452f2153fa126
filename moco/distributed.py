"""Several processes: how they meet and agree, how they gather rows, and the block shuffle of
shuffle-BN (1911.05722, section 3.3).

torchrun's variables say which processes there are; `moco.slurm` sets them for the tasks of srun.
Every function is the identity, or does without communication, on one process; none needs Lightning.
Where each key is encoded is a pure function of (seed, step), so no rank has to be told.
Shapes: N images per device, W devices, B = N*W rows in rank order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from moco.config import RunError, UserError
from moco.random import permutations, stream_id

log = logging.getLogger("moco")
T = TypeVar("T")
_groups: list[Any] = []  # that `connect` has made
PATIENCE_S = 10.0  # before a rank says that it waits for others
GIVE_UP = timedelta(minutes=30)  # torch's own limit
_stores: dict[tuple[str, int, int], distributed.Store] = {}  # by address, port and rank; open ones
_runs: Counter[int] = Counter()  # by rank: how often it has met the others
# torch 2.14 warns of the older name, on every rank.
_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


def world_size() -> int:
    """Return the number of processes, W."""
    return distributed.get_world_size() if _active() else 1


def rank() -> int:
    """Return this process's number, 0 to W-1."""
    return distributed.get_rank() if _active() else 0


def own_machine() -> tuple[int, range]:
    """Return this process's number on its machine, and the ranks of that machine."""
    local = int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0
    count = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1
    return local, range(rank() - local, rank() - local + count)


def _active() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def connect(device: torch.device) -> None:
    """Take `device` for this process, and meet the other ranks of its run if there are any.

    Raises:
        RunError: The port is taken, or a rank did not come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or _active():
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
    if _active() and distributed.group.WORLD in _groups:
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


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise a block's ValueError on all ranks, so that none waits for the one that raised it.

    Every rank comes here; ranks do not wait for each other within the block.
    """
    error = None
    try:
        yield
    except ValueError as raised:
        error = raised
    if world_size() > 1:
        errors: list[ValueError | None] = [None] * world_size()
        distributed.all_gather_object(errors, error)
        number, error = next(((n, e) for n, e in enumerate(errors) if e), (0, None))
        if number and error:
            error.args = (f"rank {number}: {error}",)
    if error:
        raise error


def from_first(make: Callable[[], T]) -> T:
    """Return on all ranks what rank 0 makes; what it raises is raised on all."""
    made: list[T | None] = [None]
    with together():
        made = [make() if rank() == 0 else None]
    if world_size() > 1:
        distributed.broadcast_object_list(made)
    return cast(T, made[0])


def check_alike(fact: Any, name: str) -> None:
    """Raise UserError on all ranks unless all of them have found the same fact.

    Args:
        fact: What this rank has found, in plain values.
        name: Of what it tells about.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, fact)
    other = next((number for number, each in enumerate(found) if each != found[0]), 0)
    if other:
        raise UserError(
            f"{name} are not the same on rank 0 and rank {other} ({found[0]} and {found[other]}): "
            "give all machines the same ones"
        )


@torch.no_grad()
def all_gather(rows: Tensor) -> Tensor:
    """Stack the N x ... rows of all ranks to B x ..., in rank order; carries no gradient."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(len(rows) * world_size(), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous())
    return gathered


def local_rows(rows: Tensor, count: int) -> Tensor:
    """Return this rank's `count` rows of B x ... rows in rank order."""
    return rows[rank() * count : (rank() + 1) * count]


def key_order(
    seed: int, step: int, count: int, world: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Say which key stands where after the shuffle.

    Each rank permutes its rows and deals one block of count/world to every rank, so that each
    BatchNorm group of keys holds an equal share of every rank's queries. A ring shift would keep
    whole groups together, and with them the leak. On one device this is a permutation, which
    matters where the batch is split into several groups.

    Args:
        seed: The run's seed.
        step: Number of the batch since the start of the run.
        count: N; a multiple of `world`.
        world: W.
        device: Where the order is made; it is the same everywhere.

    Returns:
        B int64: place p (on rank p // N) gets the key of row `order[p]`.
    """
    return block_shuffle(stream_id(seed, "shuffle"), step, count, world, device)


def block_shuffle(
    stream: int, step: int | Tensor, count: int, world: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Compute `key_order`, from a stream of random numbers and in tensors alone: it compiles."""
    if count % world:
        raise ValueError(f"{count} images per device do not split into {world} equal blocks")
    senders = torch.arange(world, device=device)
    local = permutations(stream, senders + step * world, count)  # sender, row
    order = (local + senders[:, None] * count).view(world, world, count // world)
    return order.transpose(0, 1).flatten()  # receiver, sender, row


def exchange(rows: Tensor, order: Tensor) -> Tensor:
    """Send each row to the place that `order` gives it; every rank receives N rows.

    Args:
        rows: N x ... of this rank, any type; uint8 moves the fewest bytes.
        order: B int64, from `key_order`.
    """
    count, world = len(rows), world_size()
    if world == 1:
        return rows[order.to(rows.device)]
    mine = order.view(world, world, -1)[:, rank()].flatten() % count  # receiver, row
    sent = rows[mine.to(rows.device)].contiguous()
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, sent)
    return received


def restore(keys: Tensor, order: Tensor | None) -> Tensor:
    """Gather the encoded keys of all ranks and put them back in the order of the queries.

    One gather serves both the unshuffle and the queue.

    Args:
        keys: N x C of this rank, in shuffled places.
        order: What `key_order` gave, or None if the keys were not shuffled.

    Returns:
        B x C in rank order: row i belongs to query i of the global batch.
    """
    gathered = all_gather(keys)
    if order is None:
        return gathered
    restored = torch.empty_like(gathered)
    restored[order.to(keys.device)] = gathered
    return restored


def broadcast_buffers(network: nn.Module) -> None:
    """Give all ranks rank 0's BatchNorm statistics, the ones that a checkpoint holds."""
    if world_size() > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, 0)


def gather_ragged(rows: Tensor) -> Tensor:
    """Stack the rows of all ranks, whose counts may differ, in rank order."""
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = all_gather(count).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = all_gather(padded).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
