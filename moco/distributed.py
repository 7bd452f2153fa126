"""Several processes: how they agree, how they gather rows, and the block shuffle of shuffle-BN
(1911.05722, section 3.3).

`moco.rendezvous` brings them together. Every function is the identity, or does without
communication, on one process; none needs Lightning.
Where each key is encoded is a pure function of (seed, step), so no rank has to be told.
Shapes: N images per device, W devices, B = N*W rows in rank order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from moco.config import UserError
from moco.random import permutations

T = TypeVar("T")
# torch 2.14 warns of the older name, on every rank.
_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


def world_size() -> int:
    """Return the number of processes, W."""
    return distributed.get_world_size() if is_active() else 1


def rank() -> int:
    """Return this process's number, 0 to W-1."""
    return distributed.get_rank() if is_active() else 0


def own_machine() -> tuple[int, range]:
    """Return this process's number on its machine, and the ranks of that machine."""
    local = int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0
    count = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1
    return local, range(rank() - local, rank() - local + count)


def is_active() -> bool:
    """Say whether the processes have met."""
    return distributed.is_available() and distributed.is_initialized()


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
    stream: int, step: int | Tensor, count: int, world: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Say which key stands where after the shuffle, in tensors alone: it compiles.

    Each rank permutes its rows and deals one block of count/world to every rank, so that each
    BatchNorm group of keys holds an equal share of every rank's queries. A ring shift would keep
    whole groups together, and with them the leak. On one device this is a permutation, which
    matters where the batch is split into several groups.

    Args:
        stream: Of random numbers, from `moco.random.stream_id`.
        step: Number of the batch since the start of the run.
        count: N; a multiple of `world`.
        device: Where the order is made; it is the same everywhere.

    Returns:
        B int64: place p (on rank p // N) gets the key of row `order[p]`.
    """
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
