"""kNN and the search behind it: against NumPy, against each other, in bounded memory."""

import weakref

import faiss
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco import distributed
from moco.config import UserError
from moco.evaluation import search
from moco.evaluation.features import extract_features
from moco.evaluation.knn import few_shot_accuracy, knn_predict, vote
from moco.evaluation.search import nearest, nearest_sharded

WAYS = ("faiss", "product")  # the way of a CPU and the way of a GPU


def take(way, monkeypatch):
    """Search on this CPU in the way of a GPU, if that is asked for."""
    if way == "product":
        monkeypatch.setattr(search, "_find_by_faiss", search._find_by_product)
        monkeypatch.setattr(search, "_FAISS_COLUMNS", 2**62)


def clustered(count, dim=32, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    return (noise + 0.5 * centres[labels] + 0.5).relu(), labels


def reference_predict(queries, bank, labels, classes, k, temperature):
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    predictions = []
    for query in queries:
        similarity = bank @ query
        votes = np.zeros(classes)
        for row in np.argsort(-similarity)[:k]:
            votes[labels[row]] += np.exp(similarity[row] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k,temperature", [(1, 0.1), (20, 0.07), (200, 0.5)])
def test_predictions_equal_a_loop_in_numpy(way, k, temperature, monkeypatch):
    take(way, monkeypatch)
    bank, labels = clustered(1500)
    queries, _ = clustered(60, seed=1)
    expected = reference_predict(
        queries.double().numpy(), bank.double().numpy(), labels.numpy(), 5, k, temperature
    )
    found = knn_predict(queries, bank, labels, 5, k, temperature)
    assert found.tolist() == expected.tolist()


def test_a_tiny_temperature_does_not_overflow():
    bank, labels = clustered(100)
    queries, _ = clustered(10, seed=1)
    nearest_label = knn_predict(queries, bank, labels, 5, 1)
    assert knn_predict(queries, bank, labels, 5, 20, 1e-4).tolist() == nearest_label.tolist()


def check_exact(found, queries, bank, k):
    """Compare with fp64: the cosines in their order, and that each row has its cosine, once."""
    similarity, index = found
    queries, bank = (normalize(rows.double(), dim=1) for rows in (queries, bank))
    cosines = queries @ bank.T
    assert torch.allclose(similarity.double(), cosines.topk(k, dim=1)[0], atol=1e-6)
    assert torch.allclose(similarity.double(), cosines.gather(1, index), atol=1e-6)
    assert all(len(row.unique()) == k for row in index)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [2**16, 2**20, 2**30])
@pytest.mark.parametrize("k", [1, 50, 300])
def test_every_search_and_budget_is_exact(way, budget, k, monkeypatch):
    take(way, monkeypatch)
    bank, _ = clustered(1003, dim=24)
    queries, _ = clustered(41, dim=24, seed=1)
    check_exact(nearest(queries, bank, k, budget), queries, bank, k)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [2**17, 2**30])
def test_equal_and_nearly_equal_rows_are_all_found(way, budget, monkeypatch):
    take(way, monkeypatch)
    once, _ = clustered(300, dim=24)
    bank = torch.cat([once, 3 * once, once + 1e-4 * torch.randn(300, 24), torch.zeros(2, 24)])
    queries = torch.cat([once[:20], torch.ones(2, 24), torch.zeros(1, 24)])
    for k in (3, 7, 902):  # 902 is the whole bank
        similarity, index = nearest(queries, bank, k, budget)
        check_exact((similarity, index), queries, bank, k)
        if k == 3:
            assert (index[:20] % 300 == torch.arange(20)[:, None]).all()


def test_faiss_and_the_product_find_the_same_neighbours(monkeypatch):
    bank, _ = clustered(4003, dim=24)
    queries, _ = clustered(101, dim=24, seed=1)
    by_faiss = nearest(queries, bank, 200)
    take("product", monkeypatch)
    by_product = nearest(queries, bank, 200)
    assert torch.allclose(by_faiss[0], by_product[0], atol=1e-6)
    # Neighbours may change places only where their cosines differ by rounding.
    moved = by_faiss[1] != by_product[1]
    gaps = by_faiss[0].diff(dim=1).abs()
    gaps = torch.minimum(
        torch.nn.functional.pad(gaps, (1, 0), value=1), torch.nn.functional.pad(gaps, (0, 1))
    )
    assert moved.float().mean() < 0.01 and (gaps[moved] < 1e-6).all()


def test_several_k_at_once_equal_one_at_a_time():
    bank, labels = clustered(400)
    queries, _ = clustered(30, seed=1)
    similarity, index = nearest(queries, bank, 100)
    votes = vote(similarity, labels[index], 5, [100, 1, 20], 0.1)
    for k in (1, 20, 100):
        assert torch.equal(votes[k].argmax(1), knn_predict(queries, bank, labels, 5, k, 0.1))


@pytest.mark.parametrize("way", WAYS)
def test_k_above_the_bank_and_nan_are_errors(way, monkeypatch):
    take(way, monkeypatch)
    bank, labels = clustered(30)
    with pytest.raises(UserError, match="30"):
        knn_predict(bank, bank, labels, 5, 31)
    bank[3, 4] = float("nan")
    with pytest.raises(UserError, match="1 of 30"):
        knn_predict(bank.nan_to_num(), bank, labels, 5, 3)
    with pytest.raises(UserError, match="NaN"):
        extract_features(nn.Identity(), [(bank, labels)])


def _refused_on_rank(first: float, second: float, empty: bool) -> str:
    """Take features of which the second rank's may not be finite, or be none at all."""
    rank = distributed.rank()
    images = torch.full((3, 2), second if rank else first)
    batches = [] if empty and rank else [(images, torch.arange(3))]
    try:
        extract_features(nn.Identity(), batches)
    except UserError as error:
        return str(error)
    return f"gathered {distributed.gather_ragged(images).sum():g}"


def test_what_one_rank_cannot_take_features_of_is_refused_on_all(two_ranks):
    assert two_ranks.run(_refused_on_rank, 1.0, 2.0, False) == ["gathered 18", "gathered 18"]
    for bad, words in (
        ((1.0, float("nan"), False), "3 of 3 rows"),
        ((1.0, 1.0, True), "no images"),
    ):
        first, second = two_ranks.run(_refused_on_rank, *bad)
        assert words in first and first == second


def test_extraction_puts_the_training_mode_back_and_leaves_batch_norm():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5)))
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(10, 4)
    features, labels = extract_features(network, [(images, torch.arange(10))])
    assert network.training and not network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(features, network.eval()(images)) and labels.tolist() == list(range(10))


def test_few_shots_of_everything_equal_the_class_means():
    bank, labels = clustered(60, classes=3)
    smallest = int(torch.bincount(labels).min())
    keep = torch.cat([(labels == c).nonzero()[:smallest, 0] for c in range(3)])
    bank, labels = bank[keep], labels[keep]
    queries, targets = clustered(200, classes=3, seed=1)
    unit = normalize(bank, dim=1)
    means = torch.stack([unit[labels == c].mean(0) for c in range(3)])
    unit_queries = normalize(queries, dim=1)
    cosines = unit_queries @ normalize(means, dim=1).T
    expected = 100 * (cosines.argmax(1) == targets).float().mean().item()
    mean, std = few_shot_accuracy(bank, labels, queries, targets, smallest, 3)
    assert mean == pytest.approx(expected) and std == pytest.approx(0, abs=1e-5)
    assert few_shot_accuracy(bank, labels, queries, targets, 1)[1] > 0
    with pytest.raises(UserError, match="smallest class"):
        few_shot_accuracy(bank, labels, queries, targets, smallest + 1)


def search_share(bank, queries, k):
    share = bank[:7] if distributed.rank() == 0 else bank[7:]
    return nearest_sharded(queries, share, k)


def test_a_bank_over_two_ranks_gives_the_same_neighbours(two_ranks):
    bank, _ = clustered(300)
    queries, _ = clustered(20, seed=1)
    expected = nearest(queries, bank, 30)
    for similarity, index in two_ranks.run(search_share, bank, queries, 30):  # rank 0 has 7 rows
        assert torch.equal(index, expected[1])
        # faiss 1.10 adds up the products of 7 rows in another order than those of 300
        torch.testing.assert_close(similarity, expected[0], rtol=0, atol=1e-6)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operators make, as long as they live.

    Attributes:
        most: Largest sum of the bytes of tensors that lived at one time.
    """

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.names, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known or not size:
            return
        if place not in self.names:
            self.names[place] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.names[place] += 1
        weakref.finalize(tensor, self.remove, place, size)

    def remove(self, place, size):
        self.names[place] -= 1
        if not self.names[place]:
            del self.names[place]
            self.now -= size


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(100_000, 64), (20_000, 512)])
def test_memory_stays_under_the_budget(way, shape, monkeypatch):
    take(way, monkeypatch)
    budget, k = 16 * 2**20, 200  # one product of all is 200 MB or 40 MB
    bank, queries = torch.randn(shape), torch.randn(500, shape[1])
    live = LiveBytes(bank, queries)
    faiss_knn = faiss.knn

    def knn(rows, block, k, **options):
        found = faiss_knn(rows, block, k, **options)
        # Besides its result faiss holds products with 1024 rows and, for each query, 2k and up to
        # 15 candidates of 12 bytes.
        inside = 4 * len(rows) * min(1024, len(block)) + 12 * len(rows) * (2 * k + 15)
        live.most = max(live.most, live.now + inside + found[0].nbytes + found[1].nbytes)
        return found

    monkeypatch.setattr(faiss, "knn", knn)
    with live:
        similarity, index = nearest(queries, bank, k, budget)
    taken = live.most - similarity.nbytes - index.nbytes
    assert budget / 8 < taken < budget
    assert live.now == similarity.nbytes + index.nbytes  # nothing else is left


def test_counted_memory_is_that_of_the_tensors_that_live():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        first.add_(1).view(10, 100)
        second = first + 1
        del first
        third = second * 2
    assert live.most == 8000 and live.now == second.nbytes + third.nbytes
