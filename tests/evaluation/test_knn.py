"""kNN and the search behind it: against NumPy, against each other, in bounded memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moco import distributed
from moco.config import UserError
from moco.evaluation import search
from moco.evaluation.features import extract_features
from moco.evaluation.knn import few_shot_accuracy, knn_predict, vote
from moco.evaluation.search import nearest, nearest_sharded

ROOT = Path(__file__).parents[2]
BACKENDS = ("faiss", "matmul", "bf16")


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k,temperature", [(1, 0.1), (20, 0.07), (200, 0.5)])
def test_predictions_equal_a_loop_in_numpy(backend, k, temperature):
    bank, labels = clustered(1500)
    queries, _ = clustered(60, seed=1)
    expected = reference_predict(
        queries.double().numpy(), bank.double().numpy(), labels.numpy(), 5, k, temperature
    )
    found = knn_predict(queries, bank, labels, 5, k, temperature, backend)
    assert found.tolist() == expected.tolist()


def test_a_tiny_temperature_does_not_overflow():
    bank, labels = clustered(100)
    queries, _ = clustered(10, seed=1)
    nearest_label = knn_predict(queries, bank, labels, 5, 1)
    assert knn_predict(queries, bank, labels, 5, 20, 1e-4).tolist() == nearest_label.tolist()


@pytest.mark.parametrize("budget", [2**18, 2**20, 2**30])
@pytest.mark.parametrize("k", [1, 50, 300])
def test_all_searches_and_budgets_agree(budget, k):
    bank, _ = clustered(4003, dim=24)
    queries, _ = clustered(101, dim=24, seed=1)
    similarity, index = nearest(queries, bank, k, "matmul")
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (queries, bank)]
    expected = (unit[0].double() @ unit[1].double().T).topk(k, dim=1)[0]
    assert torch.allclose(similarity.double(), expected, atol=1e-6)
    for backend in BACKENDS:
        again, place = nearest(queries, bank, k, backend, budget)
        assert torch.equal(again, similarity), backend
        assert torch.equal(place, index), backend


def test_bf16_searches_again_what_it_cannot_prove(monkeypatch):
    # Nearly equal rows: bf16 cannot order them, so float32 has to.
    generator = torch.Generator().manual_seed(0)
    bank = 1 + 1e-4 * torch.randn(3000, 16, generator=generator)
    queries = 1 + 1e-4 * torch.randn(40, 16, generator=generator)
    redone = []
    search_product = search._search_product
    monkeypatch.setattr(
        search,
        "_search_product",
        lambda q, *rest: redone.append(len(q)) or search_product(q, *rest),
    )
    similarity, _ = nearest(queries, bank, 10, "bf16")
    assert redone and redone[0] > 0
    assert torch.equal(similarity, nearest(queries, bank, 10, "matmul")[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns,k", [(50, 3), (997, 7), (5000, 40), (64, 64)])
def test_two_level_top_equals_topk(columns, k, kind):
    scores = torch.randn(9, columns, generator=torch.Generator().manual_seed(k)).to(kind)
    values, place = search._top(scores, k)
    assert torch.equal(values, scores.topk(k, dim=1)[0])
    assert torch.equal(scores.gather(1, place), values)


def test_several_k_at_once_equal_one_at_a_time():
    bank, labels = clustered(400)
    queries, _ = clustered(30, seed=1)
    similarity, index = nearest(queries, bank, 100)
    votes = vote(similarity, labels[index], 5, [100, 1, 20], 0.1)
    for k in (1, 20, 100):
        assert torch.equal(votes[k].argmax(1), knn_predict(queries, bank, labels, 5, k, 0.1))


def test_k_above_the_bank_and_nan_are_errors():
    bank, labels = clustered(30)
    with pytest.raises(UserError, match="30"):
        knn_predict(bank, bank, labels, 5, 31)
    bank[3, 4] = float("nan")
    for backend in BACKENDS:
        with pytest.raises(UserError, match="1 of 30"):
            knn_predict(bank.nan_to_num(), bank, labels, 5, 3, backend=backend)
    with pytest.raises(UserError, match="NaN"):
        extract_features(nn.Identity(), [(bank, labels)])


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
    unit = torch.nn.functional.normalize(bank, dim=1)
    means = torch.stack([unit[labels == c].mean(0) for c in range(3)])
    unit_queries = torch.nn.functional.normalize(queries, dim=1)
    cosines = unit_queries @ torch.nn.functional.normalize(means, dim=1).T
    expected = 100 * (cosines.argmax(1) == targets).float().mean().item()
    mean, std = few_shot_accuracy(bank, labels, queries, targets, smallest, 3)
    assert mean == pytest.approx(expected) and std == pytest.approx(0, abs=1e-5)
    assert few_shot_accuracy(bank, labels, queries, targets, 1)[1] > 0
    with pytest.raises(UserError, match="smallest class"):
        few_shot_accuracy(bank, labels, queries, targets, smallest + 1)


def search_share(bank, queries, k):
    share = bank[:7] if distributed.rank() == 0 else bank[7:]
    return nearest_sharded(queries, share, k, "matmul")


def test_a_bank_over_two_ranks_gives_the_same_neighbours(two_ranks):
    bank, _ = clustered(300)
    queries, _ = clustered(20, seed=1)
    expected = nearest(queries, bank, 30, "matmul")
    for similarity, index in two_ranks.run(search_share, bank, queries, 30):  # rank 0 has 7 rows
        assert torch.equal(similarity, expected[0]) and torch.equal(index, expected[1])


MEASURE = """
import re, sys, torch
from pathlib import Path
from moco.evaluation.search import nearest
def status(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+)", text)[1])
torch.set_num_threads(1)
backend, budget = sys.argv[1], int(sys.argv[2])
bank, queries = torch.empty(200_000, 64).normal_(), torch.randn(500, 64)
nearest(queries[:8], bank[:1000], 10, backend, budget)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
similarity, index = nearest(queries, bank, 200, backend, budget)
print((status("VmHWM") - before) * 1024 - similarity.nbytes - index.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_stays_under_the_budget(backend):
    budget = 64 * 2**20  # one product of all is 400 MB
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, str(budget)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < budget
