"""Random numbers without state: pure functions of (seed, purpose, counters).

Order, crops, colours and shuffles are drawn here, from what they belong to (the epoch, the image,
the view) and not from a generator that drifts. So a resumed run, another number of workers or of
ranks, and a worker process or the device all see the same numbers, and nothing about them needs
saving. Each number is a hash of its counter (splitmix64's finaliser, Steele et al. 2014), computed
in int64 tensor operations: no synchronisation, and it compiles.

Shapes: N counters, D draws for each.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK_53 = (1 << 53) - 1


@lru_cache
def stream_id(seed: int, purpose: str) -> int:
    """Return the stream that belongs to a seed and a purpose, a signed 64-bit integer.

    It is the same in every process. torch.compile cannot trace this function: what is compiled
    gets the number from outside.
    """
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(stream: int, counters: Tensor, draws: int) -> Tensor:
    """Draw `draws` independent numbers in [0, 1) for each counter.

    Args:
        stream: From `stream_id`: which of many independent streams of numbers is drawn from.
        counters: N int64; what they belong to, for example image indices.

    Returns:
        N x D float32 on the device of `counters`.
    """
    mixed = _words(stream, counters, draws)
    # 24 of the 53 bits: float32 holds no more below 1.
    return ((mixed & _MASK_53) >> 29).float() * (1.0 / (1 << 24))


def permutation(seed: int, purpose: str, counter: int, size: int) -> Tensor:
    """Return a permutation of 0..size-1 (int64, on the CPU) that belongs to `counter`."""
    return permutations(stream_id(seed, purpose), torch.tensor([counter]), size)[0]


def permutations(stream: int, counters: Tensor, size: int) -> Tensor:
    """Return a permutation of 0..size-1 for each counter: N x size int64, on its device."""
    return torch.argsort(_words(stream, counters, size), dim=1, stable=True)


def combine(high: int | Tensor, low: Tensor) -> Tensor:
    """Make one counter of two, such as (epoch, image index); `low` stays below 2**40."""
    return low + (high << 40)


def _words(stream: int, counters: Tensor, draws: int) -> Tensor:
    """Draw `draws` words of 64 bits for each counter: N x D int64."""
    start = _finalise(counters + stream)[:, None]
    columns = torch.arange(1, draws + 1, dtype=torch.int64, device=counters.device)
    # Adding 0 of the data keeps torch.compile from multiplying constants beyond 64 bits, which
    # Triton refuses.
    return _finalise(start + (columns + (start & 0)) * _GOLDEN)


def _finalise(x: Tensor) -> Tensor:
    """Apply splitmix64's finaliser; int64 products wrap, and the shifts are logical."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
