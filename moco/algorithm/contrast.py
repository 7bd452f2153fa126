"""Contrast: InfoNCE and the queue of negative keys (1911.05722, sections 3.1 and 3.2).

With a queue the negatives are older keys; without one (2104.02057) they are the other keys of the
batch, and the loss stays this one.

The loss is a pure function. The queue is the only state, and every checkpoint holds its buffers.
Shapes: N queries on this device, B keys over all devices, C embedding, K queue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def info_nce(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float, own_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Score each query against its own key and the negatives.

    The own key is class 0 of a (1+K)-way softmax; equal logits cost log(1+K).

    Args:
        query: R * N x C unit vectors, the R queries of an image together, where mostly R is 1;
            the only input that needs a gradient.
        key: N x C unit vectors, of the same images as the queries.
        negatives: K x C unit vectors: queued ones, without this batch's keys; or the keys of the
            whole batch, K = B.
        temperature: Positive; 0.07 in v1, 0.2 in v2, 1 in v3 with ResNets.
        own_rows: Where the keys of this device's queries begin in `negatives`, if they are in it:
            the own key of image i, row `own_rows + i`, is left out of its queries' negatives.

    Returns:
        Mean loss in nats, and R * N x (1+K) logits already divided by the temperature; what was
        left out is minus infinity.

    Source: arXiv:1911.05722, eq. 1 and Algorithm 1; arXiv:2104.02057, Algorithm 1.
    """
    # Logits are fp32 under autocast too: in bf16, at a size of 1/temperature, they would be off by
    # several percent.
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = at_least_fp32(query), at_least_fp32(key), at_least_fp32(negatives)
        several = len(query) // len(key)  # R
        positive = (query * key.repeat_interleave(several, 0)).sum(1, keepdim=True)  # R*N 1
        negative = query @ negatives.T  # R*N K
        if own_rows is not None:
            rows = torch.arange(len(negatives), device=query.device)
            own = rows[own_rows : own_rows + len(key), None] == rows  # N K
            negative = negative.masked_fill(own.repeat_interleave(several, 0), -torch.inf)
        logits = torch.cat([positive, negative], dim=1) / temperature  # N 1+K
        labels = logits.new_zeros(len(logits), dtype=torch.long)
        return functional.cross_entropy(logits, labels), logits


def at_least_fp32(values: Tensor) -> Tensor:
    """Convert half-precision values to fp32, and leave fp64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


@torch.no_grad()
def contrast_accuracy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of queries whose own key ranks first, and among the first five.

    Args:
        logits: N x (1+K), own key first. A tie counts as found, as argmax would.
    """
    rank = (logits[:, 1:] > logits[:, :1]).sum(1)
    return (rank < 1).float().mean(), (rank < 5).float().mean()


class KeyQueue(nn.Module):
    """Hold the last K keys in a ring buffer, first in, first out (1911.05722, section 3.2).

    Attributes:
        keys: K x C unit vectors, random at the start.
        num_enqueued: int64 scalar, the keys written since the start; the next one goes to row
            `num_enqueued % K`.
    """

    keys: Tensor
    num_enqueued: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        keys = functional.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("keys", keys)
        self.register_buffer("taken", keys.clone(), persistent=False)
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.long))

    def snapshot(self) -> Tensor:
        """Return a copy of the keys, K x C, for keys are enqueued before the backward pass runs.

        Inductor's backward pass would copy them again, and see the new ones: a graph is given
        `taken`, a copy that was made before it.
        """
        return self.taken if torch.compiler.is_compiling() else self.keys.clone()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys.

        Args:
            keys: B x C unit vectors of all ranks, in rank order, any B up to K.

        Raises:
            ValueError: B is above K.
        """
        size, count = len(self.keys), len(keys)
        if count > size:
            raise ValueError(f"enqueue of {count} keys into a queue of {size}: raise queue_size")
        rows = (self.num_enqueued + torch.arange(count, device=keys.device)) % size
        self.keys.index_copy_(0, rows, keys.to(self.keys.dtype))
        self.num_enqueued.add_(count)

    def fill(self) -> Tensor:
        """Return the share of the queue that holds real keys, 0 to 1."""
        return (self.num_enqueued / len(self.keys)).clamp(max=1.0)
