"""Images to label first: from every group one, and of a group the most typical."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from embedding import blobs
from embedding import write_features as write

from moco.command.select import main
from moco.config import UserError
from moco.reports import select as room
from moco.reports.select import typical_and_diverse

pytestmark = pytest.mark.usefixtures("in_tmp")


def sized(*sizes, width=16):
    """Return groups of several sizes around random centres, and the group of each vector."""
    rng = np.random.default_rng(1)
    group = np.arange(len(sizes)).repeat(sizes)
    middles = rng.standard_normal((len(sizes), width))
    vectors = middles[group] + 0.05 * rng.standard_normal((len(group), width))
    return vectors.astype(np.float32), group


def test_every_group_gives_one_the_largest_first():
    vectors, group = sized(10, 40, 20, 80, 5)
    chosen, cluster, _ = typical_and_diverse(write(vectors), 5, seed=0)
    assert group[chosen].tolist() == [3, 1, 2, 0, 4]
    assert len({*zip(group.tolist(), cluster.tolist(), strict=True)}) == 5


def test_the_most_typical_has_the_nearest_neighbours():
    vectors, group = sized(60, 30)
    chosen, _, typicality = typical_and_diverse(write(vectors), 2, seed=0)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, picked in enumerate(chosen):
        members = np.flatnonzero(group == number)
        distances = np.linalg.norm(units[members, None] - units[members], axis=2)
        mean = np.sort(distances, 1)[:, 1:21].mean(1)
        assert picked == members[mean.argmin()]
        np.testing.assert_allclose(typicality[members], 1 / (mean + 1e-6), rtol=1e-3)


def test_of_a_large_cluster_only_images_of_the_sample_pass_over_themselves(monkeypatch):
    monkeypatch.setattr(room, "_BANK", 30)
    vectors, _ = sized(60)
    _, _, typicality = typical_and_diverse(write(vectors), 1, seed=0)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    sample = room.some(60, 30, 0)
    distances = np.sort(np.linalg.norm(units[:, None] - units[sample], axis=2), 1)
    mean = distances[:, :20].mean(1)
    mean[sample] = distances[sample, 1:21].mean(1)
    np.testing.assert_allclose(typicality, 1 / (mean + 1e-6), rtol=1e-3)


def test_more_images_than_clusters_come_in_rounds(monkeypatch):
    monkeypatch.setattr(room, "MOST_CLUSTERS", 3)
    vectors, group = sized(30, 20, 10)
    chosen, _, _ = typical_and_diverse(write(vectors), 8, seed=0)
    assert group[chosen].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and len({*chosen}) == 8


def test_a_small_memory_chooses_the_same(monkeypatch):
    vectors, _ = sized(40, 30, 20, 10)
    features = write(vectors)
    whole = typical_and_diverse(features, 4, seed=0)
    monkeypatch.setattr(room, "_BUDGET", 4 * 16 * 45)  # two groups, or one
    for one, other in zip(whole, typical_and_diverse(features, 4, seed=0), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7])
def test_all_images_and_images_without_a_difference(count):
    same = write(np.ones((7, 8), np.float32))
    chosen, _, typicality = typical_and_diverse(same, count, seed=0)
    assert len({*chosen}) == count and np.isfinite(typicality).all()
    one, _, _ = typical_and_diverse(write(np.ones((1, 8), np.float32)), 1, seed=0)
    assert one.tolist() == [0]


def test_the_list_is_a_csv_in_order():
    write(blobs(4, 10))
    result = main(["--index", "set", "--count", "4"])
    assert result["selected"] == "set/selected.csv" and result["clusters"] == 4
    with open("set/selected.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == result["first"]
    assert [f"{int(row['id']):05d}.png" for row in rows] == result["first"]
    assert {int(row["id"]) // 10 for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "count is 0: it must be at least 1"),
        (["--count", "1000001"], "count is 1000001: it must be at most 1000000"),
        (["--count", "41"], "--count 41 is above the 40 images: lower it"),
        (["--count", "4", "--seed", "-1"], "seed is -1: it must be at least 0"),
        (["--count", "4", "--index", "absent"], "absent holds no features.parquet"),
        (["--count", "4", "--output", "features.parquet"], "a name that ends in .csv"),
        (["--count", "4", "--output", "."], "a directory: name a file"),
        (["--count", "4", "--output", "no/list.csv"], "no is no directory to write in"),
        ([], "count"),
    ],
)
def test_wrong_input(words, message):
    write(blobs(4, 10))
    with pytest.raises(UserError, match=message):
        main(["--index", "set", *words])
    assert not Path("set/selected.csv").exists()
