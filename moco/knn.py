"""kNN: how good is an encoder, without training anything (1805.01978, section 3.4; the official CIFAR demo).

Features of a labelled bank vote on the labels of queries. Every score belongs to a layer, a k and a temperature.
The search is exact and takes bounded memory: the bank is read in blocks, and only the best k are kept.
Shapes: M bank images, Q queries, D feature, k neighbours, L classes, m and q rows of a block, W ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moco import distributed
from moco.config import UserError

Backend = Literal["auto", "faiss", "matmul", "bf16"]
BUDGET = 2**30  # bytes
_TINY = 1e-12


@torch.no_grad()
def extract_features(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Run a network in eval mode over batches of images.

    Args:
        network: Images to N x D features; its training mode is put back afterwards.
        batches: Images and labels, as `LabelledData.batches` yields them.

    Returns:
        Features M x D float32, not normalised, and labels M, of this rank's share.

    Raises:
        UserError: There is no batch, or a feature is not finite.
    """
    training = {module: module.training for module in network.modules()}
    network.eval()
    features, labels = [], []
    for images, target in batches:
        features.append(network(images).float())
        labels.append(target)
    for module, mode in training.items():
        module.training = mode
    if not features:
        raise UserError("there are no images to take features of: check data.root")
    check_finite(features := torch.cat(features), "the encoder's features")
    return features, torch.cat(labels)


def check_finite(features: Tensor, name: str) -> None:
    """Raise UserError when rows of N x D features hold NaN or infinity."""
    bad = sum(int((~part.isfinite().all(1)).sum()) for part in features.split(2**16))
    if bad:
        raise UserError(
            f"{name} hold NaN or infinity in {bad} of {len(features)} rows: take a checkpoint from "
            "before the run diverged, and check data.mean and data.std"
        )


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    backend: Backend = "auto",
    budget: int = BUDGET,
) -> Tensor:
    """Predict a class for each query by the weighted vote of its k nearest bank features.

    Args:
        queries: Q x D; normalised here.
        bank: M x D; normalised here.
        labels: M int64.
        num_classes: L.
        k: Neighbours; at most M.
        temperature: Each votes exp(cosine / temperature).
        backend, budget: As of `nearest`; the answers do not depend on them.

    Returns:
        Q int64 classes.

    Raises:
        UserError: k is above M, or a feature is not finite.

    Source: arXiv:1805.01978, section 3.4.
    """
    similarity, index = nearest(queries, bank, k, backend, budget)
    rows = max(1, budget // (16 * (num_classes + k)))
    predictions = [
        vote(s, labels[i], num_classes, [k], temperature)[k].argmax(1)
        for s, i in zip(similarity.split(rows), index.split(rows), strict=True)
    ]
    return torch.cat(predictions)


def vote(
    similarity: Tensor, classes: Tensor, num_classes: int, ks: list[int], temperature: float
) -> dict[int, Tensor]:
    """Count the votes of the first k neighbours, for several k at once.

    Args:
        similarity: Q x max(ks) cosines, best first.
        classes: Q x max(ks), the neighbours' labels.
        num_classes: L.
        ks: Numbers of neighbours.
        temperature: Each votes exp(cosine / temperature).

    Returns:
        k to Q x L votes, relative to one of the nearest neighbour.
    """
    # Less the best, so that small temperatures do not overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weight.new_zeros(len(weight), num_classes)
    result, done = {}, 0
    for k in sorted(set(ks)):
        votes = votes.scatter_add(1, classes[:, done:k], weight[:, done:k])
        result[k], done = votes, k
    return result


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
            candidates, float32 products decide, and a query whose bound does not prove its answer is
            searched in float32. `auto`: bf16 on a CPU that multiplies it natively, faiss on another,
            matmul on a GPU.
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


def few_shot_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    targets: Tensor,
    shots: int,
    draws: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """Classify by the nearest class mean of a few labelled images.

    Args:
        bank, queries: M x D and Q x D features; normalised here.
        labels, targets: Their classes, M and Q.
        shots: Labelled images per class; every class of the bank needs as many.
        draws: Random choices of these images to average over.

    Returns:
        Mean and standard deviation over the draws, in percent.

    Raises:
        UserError: A class has fewer than `shots` images.

    Source: prototypes as in arXiv:1703.05175, on frozen, normalised features.
    """
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    members = [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
    smallest = min(len(m) for m in members)
    if smallest < shots:
        raise UserError(f"shots {shots} is above the {smallest} images of the smallest class")
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        picks = [
            m[torch.randperm(len(m), generator=generator)[:shots].to(m.device)] for m in members
        ]
        means = normalize(torch.stack([bank[p].mean(0) for p in picks]), dim=1)
        scores.append(((queries @ means.T).argmax(1) == targets).float().mean())
    scores = 100 * torch.stack(scores)
    return scores.mean().item(), scores.std().item()


def broadcast_buffers(network: nn.Module) -> None:
    """Give all ranks rank 0's BatchNorm statistics, the ones that a checkpoint holds."""
    if distributed.world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


def gather_ragged(rows: Tensor) -> Tensor:
    """Stack the rows of all ranks, whose counts may differ, in rank order."""
    if distributed.world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = distributed.all_gather(count).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = distributed.all_gather(padded).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


# The searches


def _choose_backend(queries: Tensor, bank: Tensor) -> Backend:
    if queries.device.type != "cpu":
        return "matmul"
    plain = bank.dtype == torch.float32 and bank.is_contiguous()
    return "bf16" if plain and torch.cpu._is_avx512_bf16_supported() else "faiss"


def _spans(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, max(1, rows)):
        yield slice(start, min(count, start + max(1, rows)))


def _search_faiss(queries: Tensor, bank: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
    import faiss  # after torch, and never in a worker: both bring an OpenMP

    def find(rows: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = faiss.knn(rows.numpy(), block.numpy(), k, faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return _scan(queries, bank, k, budget, _unit, find)


def _search_product(queries: Tensor, bank: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
    return _scan(queries, bank, k, budget, _unit, lambda rows, block, k: _top(rows @ block.T, k))


def _search_bf16(queries: Tensor, bank: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
    """Choose candidates by bf16 products, decide by float32 products, prove each answer or redo it."""
    kept = min(2 * k + 64, len(bank))
    rounded = _Rounded(bank)
    score, index = _scan(
        queries,
        bank,
        kept,
        budget,
        rounded.block,
        lambda rows, block, k: _top(rows.bfloat16() @ block.T, k),
    )
    similarity = torch.empty(len(queries), k)
    proved = torch.empty(len(queries), dtype=torch.bool)
    for part in _spans(len(queries), budget // (8 * (40 * kept + 16 * bank.shape[1]))):
        unit = _unit(queries[part])
        exact = _products(unit, bank, index[part]) / rounded.norm[index[part]]
        exact, place = exact.topk(k, dim=1)
        similarity[part] = exact
        proved[part] = rounded.proves(unit, exact[:, -1], score[part, -1].float())
        index[part, :k] = index[part].gather(1, place)
    again = (~proved).nonzero()[:, 0]
    if kept < len(bank) and len(again):
        found = _search_product(queries[again], bank, k, budget)
        similarity[again], index[again, :k] = found
    return similarity, index[:, :k]


class _Rounded:
    """Blocks of a bank in bf16, and how far products with them may be off.

    The bank is centred: a shift is the same for all neighbours of a query, and shorter vectors round less.
    Cauchy-Schwarz: with q', b' the rounded vectors, q.b and q'.b' differ by |q - q'| |b| + |q'| |b - b'| at most.

    Attributes:
        centre: D, near the bank's mean; any vector would be right.
        norm: M, lengths of the bank's rows as they are.
        length, error: The largest |b| and |b - b'| so far.
    """

    def __init__(self, bank: Tensor) -> None:
        self.centre = _unit(bank[:: max(1, len(bank) // 4096)]).mean(0)
        self.norm = torch.empty(0)
        self.length = self.error = 0.0

    def block(self, rows: Tensor) -> Tensor:
        """Round m x D rows; called in the order of the bank."""
        rounded = torch.empty(rows.shape, dtype=torch.bfloat16)
        for part in _spans(len(rows), 2048):
            exact = _unit(rows[part]).sub_(self.centre)
            rounded[part] = exact
            self.length = max(self.length, exact.norm(dim=1).max().item())
            self.error = max(self.error, (exact - rounded[part]).norm(dim=1).max().item())
        self.norm = torch.cat([self.norm, rows.norm(dim=1).clamp(min=_TINY)])
        return rounded

    def proves(self, unit: Tensor, last: Tensor, cut: Tensor) -> Tensor:
        """Tell whether no row left out can come before the k-th.

        Args:
            unit: q x D queries.
            last: q, cosine of the k-th neighbour found.
            cut: q, bf16 product of the last candidate: those left out have no larger one.
        """
        query = unit.bfloat16().float()
        slack = (unit - query).norm(dim=1) * self.length + query.norm(dim=1) * self.error
        slack += cut.abs() * 1.01 * 2**-8 + 1e-6  # the product is rounded to bf16 too
        return last - unit @ self.centre >= cut + slack


def _products(queries: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Multiply each of q queries with its own n rows of the bank, without copying these: q x n."""
    count, width = index.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state.*")
        pattern = torch.sparse_csr_tensor(
            torch.arange(count + 1) * width,
            index.flatten(),
            torch.zeros(count * width),
            (count, len(bank)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, queries, bank.T, beta=0.0).values().view(index.shape)


def _scan(
    queries: Tensor,
    bank: Tensor,
    k: int,
    budget: int,
    prepare: Callable[[Tensor], Tensor],
    find: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Go through the bank block by block and keep the best k.

    Half the budget is for a block of the bank, a quarter for its products with some queries.

    Args:
        prepare: Makes a block of raw bank rows ready.
        find: The best k of a block for some unit queries.
    """
    columns = max(1, min(len(bank), budget // (2 * 8 * bank.shape[1])))
    per_row = 4 * columns + 20 * k * (_group_size(columns, k) + 1) + 8 * bank.shape[1]
    rows = max(1, min(1024, budget // (4 * per_row)))
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

    Columns are dealt to n groups. The k groups with the largest maxima hold the k largest values: any other
    value has k maxima that are no smaller. So 50,000 columns shrink to 3,000 maxima and as many candidates.
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
