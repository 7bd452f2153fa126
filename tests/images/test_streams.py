"""The order of sharded sets: equal streams, every image once, the same batches for any ranks."""

import pytest
import torch

from moco.images.streams import Order

COUNTS = torch.tensor([50, 70, 0, 3, 400, 110, 90, 31, 200, 64])  # 1018 images


def order(**changes):
    options = {"seed": 1, "streams": 64, "window": 8, "batch_size": 128} | changes
    return Order(COUNTS, **options)


def epoch(made, number, batch_size=128):
    return torch.stack([made.batch(number, step) for step in range(1018 // batch_size)])


def shard_of(rows):
    return torch.searchsorted(COUNTS.cumsum(0), rows, right=True)


def test_an_epoch_shows_no_image_twice_and_all_but_the_remainder():
    made = order(streams=8, batch_size=16)
    assert (made.streams, made.length) == (8, 127)
    first, second = (epoch(made, number, 16).flatten() for number in (0, 1))
    for rows in (first, second):
        assert len(rows) == len(rows.unique()) == 1018 // 16 * 16
        assert rows.min() >= 0 and rows.max() < 1018
    assert not first.equal(second) and {*first.tolist()} != {*second.tolist()}
    seen = {row for number in range(60) for row in epoch(made, number, 16).flatten().tolist()}
    assert seen == {*range(1018)}, "what an epoch leaves out, another one has"


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_number_of_ranks_sees_the_same_global_batches(world):
    whole = order()
    share = 128 // world
    for step in (0, 3, 6):
        parts = [order().batch(2, step)[r * share :][:share] for r in range(world)]
        assert torch.cat(parts).equal(whole.batch(2, step))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_takes_images_of_its_own_streams_alone(world):
    made, share = order(), 128 // world
    line = made.line(0)
    stream = line.begin // made.length
    for rank in range(world):
        own = (stream >= rank * 64 // world) & (stream < (rank + 1) * 64 // world)
        rows = epoch(made, 0)[:, rank * share : (rank + 1) * share]
        assert {*shard_of(rows.flatten()).tolist()} <= {*line.shard[own].tolist()}
        shards, first, last = made.spans(0, range(rank * share, (rank + 1) * share))
        assert {*shards.tolist()} == {*line.shard[own].tolist()}
        assert (first <= last).all() and first.min() == 0 and last.max() == made.blocks - 1


def test_a_shard_is_read_in_the_windows_that_its_span_tells():
    made = order(streams=4, window=16)
    shards, first, last = made.spans(3, range(128))
    spans = {}
    for shard, a, b in zip(shards.tolist(), first.tolist(), last.tolist(), strict=True):
        spans.setdefault(shard, set()).update(range(a, b + 1))
    for step in range(7):
        place = torch.arange(step * 32, (step + 1) * 32) // 16  # windows, the same in each stream
        read = shard_of(made.batch(3, step)).view(4, 32)
        for column, block in enumerate(place.tolist()):
            assert all(block in spans[shard] for shard in read[:, column].tolist())


def test_images_are_shuffled_within_windows_and_shards_among_one_another():
    counts = torch.full((10,), 100)
    made = Order(counts, 0, streams=1, window=50, batch_size=50)
    epochs = [torch.stack([made.batch(e, s) for s in range(20)]) for e in (0, 1)]
    for rows in epochs:
        shard = rows // 100
        assert (shard == shard[:, :1]).all(), "a window lies within a shard here"
        assert (rows.diff() < 0).any(1).all(), "and is shuffled"
        assert {*(rows.sort().values - rows.min(1, keepdim=True).values)[0].tolist()} == {
            *range(50)
        }
    firsts = [rows[::2, 0] // 100 for rows in epochs]
    assert not firsts[0].equal(firsts[1]) and firsts[0].unique().numel() == 10


def test_another_seed_is_another_order_and_the_same_one_the_same():
    assert order().batch(0, 0).equal(order().batch(0, 0))
    assert not order().batch(0, 0).equal(order(seed=2).batch(0, 0))


@pytest.mark.parametrize(
    ("asked", "batch", "streams"), [(64, 128, 64), (64, 96, 48), (64, 50, 50), (7, 13, 1)]
)
def test_streams_are_as_many_as_divide_the_batch(asked, batch, streams):
    made = order(streams=asked, batch_size=batch)
    assert made.streams == streams and len(made.batch(0, 0)) == batch


def test_a_batch_across_windows_and_any_ranks_that_divide_it():
    made = order(streams=64, window=3, batch_size=64 * 5)
    rows = torch.cat([made.batch(0, step) for step in range(3)])
    assert len(rows.unique()) == 3 * 64 * 5


def test_nothing_is_as_long_as_the_set():
    made = Order(torch.full((1000,), 1_000_000), 0, 64, 1024, 256)
    made.batch(0, 5)
    tables = [made._starts, made._place, made._bounds, *made.line(0), made._window(0, 0)]
    assert sum(table.numel() for table in tables) < 100_000
