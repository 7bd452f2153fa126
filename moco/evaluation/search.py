"""Nearest neighbours by cosine: exact, and in bounded memory.

The bank is read in blocks, and only the best k are kept. On a CPU faiss searches, or bf16 products
choose candidates for float32 products; on a GPU a product in float32. The answers are the same.
Shapes: M bank rows, Q queries, D feature, k neighbours, m and q rows of a block, n columns, W
ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from moco import distributed
from moco.config import UserError
from moco.evaluation.features import check_finite

Backend = Literal["auto", "faiss", "matmul", "bf16"]
BUDGET = 2**30  # bytes
_TINY = 1e-12
# The best k of a block for some unit queries: their scores and rows.
Find = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def nearest(
    queries: Tensor, bank: Tensor, k: int, backend: Backend = "auto", budget: int = BUDGET
) -> tuple[Tensor, Tensor]:
    """Find the k bank features with the largest cosine to each query, exactly.

    Args:
        queries: Q x D float32; normalised here, block by block.
        bank: M x D float32; normalised here, block by block. May be a memory map.
        k: Neighbours; at most M.
        backend: `faiss` (CPU), `matmul` (any device), `bf16`: a CPU's bf16 product chooses
            candidates, float32 products decide, and a query whose bound does not prove its answer
            is searched in float32. `auto`: bf16 on a CPU that multiplies it natively, faiss on
            another, matmul on a GPU.
        budget: Bytes of working memory beside the queries, the bank and the result.

    Returns:
        Cosines Q x k, best first, and rows of the bank Q x k int64.

    Raises:
        UserError: k is above M, faiss is asked for on a GPU, or a feature is not finite.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k is {k} and the bank has {len(bank)} features: take 1 to {len(bank)}")
    if backend == "auto":
        backend = _choose_backend(queries, bank)
    if backend == "bf16" and not _is_plain(queries, bank):
        raise UserError(
            "backend bf16 needs a contiguous float32 bank on a CPU: take matmul or auto"
        )
    if backend != "matmul" and queries.device.type != "cpu":
        raise UserError(f"backend {backend} works on a CPU only: take matmul or auto")
    search = {"faiss": _search_faiss, "matmul": _search_product, "bf16": _search_bf16}[backend]
    similarity = torch.empty(len(queries), k, device=queries.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for part in _spans(len(queries), budget // (4 * 64 * (k + 64))):
        similarity[part], index[part] = search(queries[part], bank, k, budget)
    return similarity, index


@torch.no_grad()
def nearest_sharded(
    queries: Tensor, bank: Tensor, k: int, backend: Backend = "auto", budget: int = BUDGET
) -> tuple[Tensor, Tensor]:
    """Search a bank whose rows are spread over the ranks; only k candidates per query travel.

    Args:
        queries: Q x D, the same on every rank.
        bank: This rank's rows.
        k, backend, budget: As of `nearest`; k is at most the rows of all ranks.

    Returns:
        As of `nearest`, the same on every rank; rows are counted as `gather_ragged` stacks them.
    """
    world = distributed.world_size()
    if world == 1:
        return nearest(queries, bank, k, backend, budget)
    count = torch.tensor([len(bank)], device=queries.device)
    counts = distributed.all_gather(count).tolist()
    if k > sum(counts):
        raise UserError(f"k is {k} and the bank has {sum(counts)} features: lower k")
    own = min(k, len(bank))
    similarity = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
    index = torch.zeros_like(similarity, dtype=torch.int64)
    similarity[:, :own], index[:, :own] = nearest(queries, bank, own, backend, budget)
    index += sum(counts[: distributed.rank()])
    found = [distributed.all_gather(t).view(world, -1, k) for t in (similarity, index)]
    similarity, index = (t.transpose(0, 1).flatten(1) for t in found)  # Q x W*k
    similarity, place = similarity.topk(k, dim=1)
    return similarity, index.gather(1, place)


def _choose_backend(queries: Tensor, bank: Tensor) -> Backend:
    if queries.device.type != "cpu":
        return "matmul"
    native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native and _is_plain(queries, bank) else "faiss"


def _is_plain(queries: Tensor, bank: Tensor) -> bool:
    """Tell whether `_products` can read the bank as it is."""
    return queries.device.type == "cpu" and bank.dtype == torch.float32 and bank.is_contiguous()


def _spans(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, max(1, rows)):
        yield slice(start, min(count, start + max(1, rows)))


def _search_faiss(queries: Tensor, bank: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
    import faiss  # after torch, and never in a worker: both bring an OpenMP

    def find(rows: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = faiss.knn(rows.numpy(), block.numpy(), k, faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return _search_float32(queries, bank, k, budget, find, 4096)


def _search_product(queries: Tensor, bank: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
    def find(rows: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return _top(rows @ block.T, k)

    return _search_float32(queries, bank, k, budget, find)


def _search_float32(
    queries: Tensor, bank: Tensor, k: int, budget: int, find: Find, rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Find a few more than k, and on a CPU let `_rescore` decide, so that ways and blocks agree."""
    if not _is_plain(queries, bank):
        return _scan(queries, bank, k, budget, _unit, find, rows)
    index = _scan(queries, bank, min(k + 16, len(bank)), budget, _unit, find, rows)[1]
    return _rescore(queries, bank, index, k, budget)


def _search_bf16(queries: Tensor, bank: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
    """Choose candidates by bf16 products, prove that none was missed, or search anew in float32."""
    kept = min(
        k + k // 2 + 64, len(bank)
    )  # room for the error of a product, or few answers are proved
    rounded = _Rounded(bank)

    def find(rows: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return _top(rows.bfloat16() @ block.T, k)

    score, index = _scan(queries, bank, kept, budget, rounded.block, find)
    shift, slack = rounded.bounds(queries, score)
    # Of the candidates too, those this far below the k-th cannot come before it.
    index[score.float() < (score[:, k - 1].float() - 2 * slack)[:, None]] = -1
    similarity, index = _rescore(queries, bank, index, k, budget)
    proved = similarity[:, -1] - shift >= score[:, -1].float() + slack
    again = (~proved).nonzero()[:, 0]
    if kept < len(bank) and len(again):
        similarity[again], index[again] = _search_product(queries[again], bank, k, budget)
    return similarity, index


def _rescore(
    queries: Tensor, bank: Tensor, index: Tensor, k: int, budget: int
) -> tuple[Tensor, Tensor]:
    """Compute the cosines of candidates (-1 is none) in float32, always alike; keep the best k."""
    norm = torch.cat([bank[some].norm(dim=1) for some in _spans(len(bank), 4096)]).clamp(min=_TINY)
    similarity = torch.empty(len(queries), k)
    best = torch.empty(len(queries), k, dtype=torch.int64)
    for part in _spans(len(queries), budget // (8 * (40 * index.shape[1] + 16 * bank.shape[1]))):
        candidates = index[part].sort(1)[0]  # equal cosines: the earlier row; and memory in order
        exact = _products(_unit(queries[part]), bank, candidates) / norm[candidates]
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        similarity[part], best[part] = exact[:, :k], candidates.gather(1, order[:, :k])
    return similarity, best


class _Rounded:
    """Blocks of a bank in bf16, and how far products with them may be off.

    The bank is centred: a shift is the same for all neighbours of a query, and shorter vectors
    round less. Cauchy-Schwarz: with q', b' the rounded vectors, q.b and q'.b' differ by |q - q'|
    |b| + |q'| |b - b'| at most.

    Attributes:
        centre: D, near the bank's mean; any vector would be right.
        length, error: The largest |b| and |b - b'| so far.
    """

    def __init__(self, bank: Tensor) -> None:
        self.centre = _unit(bank[:: max(1, len(bank) // 4096)]).mean(0)
        self.length = self.error = 0.0

    def block(self, rows: Tensor) -> Tensor:
        """Round m x D rows; called in the order of the bank."""
        rounded = torch.empty(rows.shape, dtype=torch.bfloat16)
        for part in _spans(len(rows), 2048):
            exact = _unit(rows[part]).sub_(self.centre)
            rounded[part] = exact
            self.length = max(self.length, exact.norm(dim=1).max().item())
            self.error = max(self.error, (exact - rounded[part]).norm(dim=1).max().item())
        return rounded

    def bounds(self, queries: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Tell how a query's bf16 products relate to its cosines.

        Args:
            queries: Q x D.
            score: Q x n products, best first.

        Returns:
            Q what the centre takes from each cosine, and Q how far a product may be off besides.
        """
        shifts, slacks = [], []
        for part in _spans(len(queries), 2048):
            unit = _unit(queries[part])
            query = unit.bfloat16().float()
            slack = (unit - query).norm(dim=1) * self.length + query.norm(dim=1) * self.error
            largest = score[part][:, [0, -1]].float().abs().amax(1)
            slacks.append(slack + largest * 1.01 * 2**-8 + 1e-6)  # products are rounded too
            shifts.append(unit @ self.centre)
        return torch.cat(shifts), torch.cat(slacks)


def _products(queries: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Multiply each of q queries with its own rows of the bank, without copying these: q x n.

    Where `index` is -1 the product is minus infinity.
    """
    used = index >= 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
    columns = index[used]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state.*")
        pattern = torch.sparse_csr_tensor(
            starts,
            columns,
            torch.zeros(len(columns)),
            (len(index), len(bank)),
            check_invariants=False,
        )
    products = torch.full(index.shape, -torch.inf)
    products[used] = torch.sparse.sampled_addmm(pattern, queries, bank.T, beta=0.0).values()
    return products


def _scan(
    queries: Tensor,
    bank: Tensor,
    k: int,
    budget: int,
    prepare: Callable[[Tensor], Tensor],
    find: Find,
    rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Go through the bank block by block and keep the best k.

    A quarter of the budget is for a block of the bank, a sixth for its products with some queries;
    the rest is for the lists and for what the libraries copy.

    Args:
        prepare: Makes a block of raw bank rows ready.
        rows: Queries at a time; 0: as many as their products with a block have room.
            faiss keeps no products and is four times slower on few queries.
    """
    columns = max(1, min(len(bank), budget // (32 * bank.shape[1])))
    per_row = 4 * columns + 20 * k * (_group_size(columns, k) + 1) + 8 * bank.shape[1]
    rows = rows or max(1, min(256, budget // (6 * per_row)))
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), columns):
        block = prepare(bank[start : start + columns].to(queries.device))
        width = min(k, len(block))
        parts = [find(_unit(queries[part]), block, width) for part in _spans(len(queries), rows)]
        score, index = (torch.cat(column) for column in zip(*parts, strict=True))
        best = _merge(best, (score, index + start), k)
    return best


def _merge(best: tuple[Tensor, Tensor] | None, more: tuple[Tensor, Tensor], k: int) -> Any:
    """Keep the best k of two lists of scores and rows."""
    if best is None:
        return more
    score, index = (torch.cat(pair, 1) for pair in zip(best, more, strict=True))
    score, place = score.topk(min(k, score.shape[1]), dim=1)
    return score, index.gather(1, place)


def _unit(rows: Tensor) -> Tensor:
    """Scale rows to unit length; zeros stay zeros."""
    rows = rows.float()
    norm = rows.norm(dim=1, keepdim=True)
    if not norm.isfinite().all():
        check_finite(rows, "features")
    return rows / norm.clamp(min=_TINY)


def _group_size(columns: int, k: int) -> int:
    """Choose g so that columns/g maxima and k groups of g are about as many."""
    return max(1, round((columns / k) ** 0.5))


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the k largest of each row, as `topk`; on a CPU in two levels.

    Columns are dealt to n groups. The k groups with the largest maxima hold the k largest values:
    any other value has k maxima that are no smaller. So 50,000 columns shrink to 3,000 maxima and
    as many candidates.
    """
    group = _group_size(scores.shape[1], k)
    n = scores.shape[1] // group
    if scores.device.type != "cpu" or group < 3:
        return scores.topk(k, dim=1)
    maxima = scores[:, : n * group].view(len(scores), group, n).amax(1)
    groups = maxima.topk(k, dim=1, sorted=False)[1]
    column = (groups[:, :, None] + n * torch.arange(group)).flatten(1)
    rest = torch.arange(n * group, scores.shape[1]).expand(len(scores), -1)
    column = torch.cat([column, rest], 1)
    best, place = scores.gather(1, column).topk(k, dim=1)
    return best, column.gather(1, place)
