"""Nearest neighbours by cosine: exact, and in bounded memory.

The bank is read in blocks, and only the best k rows for each query are kept. On a CPU faiss
searches a block; on a GPU a product and `topk` do.
Shapes: M bank rows, Q queries, D feature, k neighbours, m and q rows of a block, n candidates, W
ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco import distributed
from moco.config import UserError
from moco.evaluation.features import check_finite

BUDGET = 2**30  # bytes
_FAISS_COLUMNS = 1024  # faiss multiplies with so many bank rows at a time


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int, budget: int = BUDGET) -> tuple[Tensor, Tensor]:
    """Find the k bank features with the largest cosine to each query, exactly.

    Args:
        queries: Q x D; normalised here, block by block.
        bank: M x D; normalised here, block by block. May be a memory map.
        k: Neighbours; at most M.
        budget: Bytes of working memory beside the queries, the bank and the result.

    Returns:
        Cosines Q x k, best first, and rows of the bank Q x k int64.

    Raises:
        UserError: k is above M, or a feature is not finite.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k is {k} and the bank has {len(bank)} features: take 1 to {len(bank)}")
    # A quarter of the budget holds a block of the bank and a copy of it. Half of it holds a block
    # of queries, their products with the bank's block, and their candidates.
    columns = max(1, min(len(bank), budget // (32 * bank.shape[1])))
    products = min(columns, _FAISS_COLUMNS) if queries.device.type == "cpu" else columns
    rows = max(1, budget // (2 * (4 * products + 96 * k + 12 * bank.shape[1])))
    similarity = torch.empty(len(queries), k, device=queries.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        similarity[part], index[part] = _search(_unit(queries[part]), bank, k, columns)
    return similarity, index


@torch.no_grad()
def nearest_sharded(
    queries: Tensor, bank: Tensor, k: int, budget: int = BUDGET
) -> tuple[Tensor, Tensor]:
    """Search a bank whose rows are spread over the ranks; only k candidates per query travel.

    Args:
        queries: Q x D, the same on every rank.
        bank: This rank's rows.
        k, budget: As of `nearest`; k is at most the rows of all ranks.

    Returns:
        As of `nearest`, the same on every rank; rows are counted as `gather_ragged` stacks them.
    """
    world = distributed.world_size()
    if world == 1:
        return nearest(queries, bank, k, budget)
    counts = distributed.all_gather(torch.tensor([len(bank)], device=queries.device)).tolist()
    if k > sum(counts):
        raise UserError(f"k is {k} and the bank has {sum(counts)} features: lower k")
    own = min(k, len(bank))
    similarity = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
    index = torch.zeros_like(similarity, dtype=torch.int64)
    similarity[:, :own], index[:, :own] = nearest(queries, bank, own, budget)
    index += sum(counts[: distributed.rank()])
    found = [distributed.all_gather(t).view(world, -1, k) for t in (similarity, index)]
    similarity, index = (t.transpose(0, 1).flatten(1) for t in found)  # Q x W*k
    return _best(similarity, index, k)


def _search(queries: Tensor, bank: Tensor, k: int, columns: int) -> tuple[Tensor, Tensor]:
    """Find the best k rows of the bank for q unit queries, `columns` rows at a time."""
    find = _find_by_faiss if queries.device.type == "cpu" else _find_by_product
    similarity = queries.new_empty(len(queries), 0)
    index = similarity.long()
    for start in range(0, len(bank), columns):
        block = _unit(bank[start : start + columns].to(queries.device))
        found, rows = find(queries, block, min(k, len(block)))
        similarity = torch.cat([similarity, found], 1)
        index = torch.cat([index, rows + start], 1)
        similarity, index = _best(similarity, index, min(k, similarity.shape[1]))
    return similarity, index


def _find_by_faiss(queries: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss  # late, and never in a worker: faiss and torch each load an OpenMP runtime

    found = faiss.knn(queries.numpy(), block.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _find_by_product(queries: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (queries @ block.T).topk(k, dim=1)


def _best(similarity: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the best k of q x n candidates."""
    similarity, place = similarity.topk(k, dim=1)
    return similarity, index.gather(1, place)


def _unit(rows: Tensor) -> Tensor:
    """Scale rows to unit length; zeros stay zeros."""
    rows = rows.float()
    norm = rows.norm(dim=1, keepdim=True)
    if not norm.isfinite().all():
        check_finite(rows, "features")
    return (rows / norm.clamp(min=1e-12)).contiguous()
