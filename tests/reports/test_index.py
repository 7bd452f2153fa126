"""The index and the file beneath it: neighbours and near-duplicates against a product by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding import blobs
from embedding import write_features as write

from moco.config import RunError, UserError
from moco.log import log_to_stderr
from moco.reports import index as rooms
from moco.reports.index import (
    build_index,
    near_duplicates,
    neighbours,
    open_features,
    open_index,
    others,
    write_index,
)
from moco.reports.mapping import project
from moco.reports.table import Features, unit

pytestmark = pytest.mark.usefixtures("in_tmp")


def test_vectors_come_back_in_blocks_and_by_their_numbers():
    vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    for dtype in (np.float32, np.float16):
        features = write(vectors.astype(dtype), group=7)
        starts, blocks = zip(*features.blocks(), strict=True)
        assert starts == tuple(np.cumsum([0, *map(len, blocks[:-1])])) and max(map(len, blocks)) < 8
        assert np.array_equal(np.concatenate(blocks), vectors.astype(dtype).astype(np.float32))
        ids = np.array([0, 15, 16, 17, 99])
        assert np.array_equal(features.take(ids), vectors.astype(dtype)[ids].astype(np.float32))
        assert features.take(ids).dtype == np.float32


def test_the_nearest_are_those_of_a_product():
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    features = write(vectors)
    similarity, found = neighbours(build_index(features), vectors[:5], 7)
    product = unit(vectors[:5]) @ unit(vectors).T
    assert np.array_equal(found, np.argsort(-product, 1, kind="stable")[:, :7])
    np.testing.assert_allclose(similarity, np.sort(product)[:, ::-1][:, :7], atol=1e-6)
    assert neighbours(build_index(features), vectors[:1], 1000)[1].shape == (1, 300)


def test_an_image_is_not_its_own_neighbour():
    vectors = blobs(10, 4)
    vectors[20:30] = vectors[20]  # equal ones
    index = build_index(write(vectors))
    similarity, found = others(index, 8, vectors[8:28], 3)
    assert found.shape == similarity.shape == (20, 3)
    assert not (found == np.arange(8, 28)[:, None]).any()
    assert {*found[0]} == {9, 10, 11}


@pytest.mark.parametrize("exact", [True, False])
def test_near_duplicates_are_listed_once_and_the_most_alike_first(monkeypatch, exact):
    vectors = blobs(200, 3)
    features = write(vectors)
    if not exact:
        monkeypatch.setattr(rooms, "EXACT", 100)
    index = build_index(features)
    assert isinstance(index, faiss.IndexFlat) == exact
    pairs = near_duplicates(features, index, 0.99)
    product = np.triu(unit(vectors) @ unit(vectors).T, 1)
    wanted = {(int(a), int(b)) for a, b in zip(*np.nonzero(product >= 0.99), strict=True)}
    assert len(wanted) > 500
    assert {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)} == wanted
    assert len(pairs.first) == len(wanted) and (np.diff(pairs.similarity) <= 0).all()
    np.testing.assert_allclose(pairs.similarity, product[pairs.first, pairs.second], atol=1e-5)


def test_where_all_are_equal_each_is_in_the_list_which_stays_short():
    features = write(np.ones((200, 8), np.float32))
    pairs = near_duplicates(features, build_index(features), 1.0)
    assert {*pairs.first, *pairs.second} == {*range(200)}
    assert len(pairs.first) <= 200 * rooms.PARTNERS and pairs.similarity.max() <= 1


def test_one_image_has_no_duplicate():
    features = write(np.ones((1, 8), np.float32))
    assert len(near_duplicates(features, build_index(features), 0.1).first) == 0


@pytest.mark.parametrize("exact", [True, False])
def test_an_index_is_written_beside_its_features_and_faiss_reads_it(monkeypatch, exact):
    if not exact:
        monkeypatch.setattr(rooms, "EXACT", 100)
    vectors = blobs(200, 3)
    features = write(vectors)
    path = write_index(features)
    plain = faiss.read_index(str(path))
    assert plain.ntotal == 600 and plain.metric_type == faiss.METRIC_INNER_PRODUCT
    assert exact or plain.nprobe == rooms.LOOKED_INTO
    query = unit(vectors[7:8])
    for found in (plain.search(query, 3), neighbours(open_index(features), vectors[7:8], 3)):
        assert {*found[1][0]} == {6, 7, 8} and found[0][0, 0] == pytest.approx(1, abs=1e-5)


def test_an_index_that_does_not_fit_or_is_damaged_is_one_line():
    features = write(blobs(10, 3))
    path = write_index(features)
    fewer = write(blobs(9, 3))
    with pytest.raises(RunError, match="is of other features than the file beside it"):
        open_index(fewer)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="features.faiss is damaged"):
        open_index(features)


def test_without_an_index_one_is_built_for_once(said):
    log_to_stderr()
    features = write(blobs(10, 3))
    assert open_index(features).ntotal == 30 and not Path("set/features.faiss").exists()
    assert any("an index is built for this once" in line for line in said)


def test_what_is_no_file_of_features_is_one_line():
    with pytest.raises(UserError, match="absent holds no features.parquet"):
        Features("absent")
    Path("set").mkdir()
    Path("set/features.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="was not written by `moco embed`"):
        Features("set")
    pq.write_table(pa.table({"id": [1], "vector": [[1.0]]}), "set/features.parquet")
    with pytest.raises(UserError, match="was not written by `moco embed`"):
        Features("set")
    write(blobs(3, 3), "maps", shape=[4, 2, 2])
    with pytest.raises(UserError, match=r"holds maps of the shape \[4, 2, 2\]"):
        open_features("maps")


def test_a_map_keeps_neighbours_together_and_is_the_same_each_time():
    blocks = write(blobs(4, 12)).blocks
    points = project(blocks, 48)
    assert points.dtype == np.float32 and np.array_equal(points, project(blocks, 48))
    middles = points.reshape(4, 12, 2).mean(1)
    nearest = np.linalg.norm(points[:, None] - middles, axis=2).argmin(1)
    assert np.array_equal(nearest, np.arange(4).repeat(12))


def test_a_large_map_is_made_by_opentsne(monkeypatch):
    pytest.importorskip("openTSNE")
    monkeypatch.setattr("moco.reports.layout.MANY", 100)
    points = project(write(blobs(6, 20)).blocks, 120)
    middles = points.reshape(6, 20, 2).mean(1)
    nearest = np.linalg.norm(points[:, None] - middles, axis=2).argmin(1)
    assert (nearest == np.arange(6).repeat(20)).mean() > 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_map_of_a_few_images(count):
    points = project(write(blobs(count, 1)).blocks, count)
    assert points.shape == (count, 2) and np.isfinite(points).all()
    assert len(np.unique(points, axis=0)) == count


def test_a_map_of_many_images_asks_for_its_package(monkeypatch):
    monkeypatch.setattr("moco.reports.layout.MANY", 10)
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    rows = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    with pytest.raises(UserError, match="20 images needs openTSNE: .*, or leave out --map"):
        project(lambda: [(0, rows)], 20)
