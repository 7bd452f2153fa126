"""Counter-based random numbers: uniform, independent, and the same for ever."""

import itertools

import pytest
import torch
from scipy import stats

from moco.random import combine, permutation, stream_id, uniform

COUNT = 40_000
INDEX = torch.arange(COUNT)
LEAST = 1e-4  # seeds are fixed: a p-value below this is a fault, not bad luck


def column(seed: int = 0, purpose: str = "crop-0", counters: torch.Tensor = INDEX) -> torch.Tensor:
    return uniform(stream_id(seed, purpose), counters, 1)[:, 0]


def p_of_pairs(a: torch.Tensor, b: torch.Tensor, bins: int = 16) -> float:
    """Chi-square of the joint histogram against independence and uniformity."""
    cells = (a * bins).long() * bins + (b * bins).long()
    return stats.chisquare(torch.bincount(cells, minlength=bins * bins).numpy()).pvalue


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("purpose", ["crop-0", "colour-1", ""])
def test_uniform_on_the_unit_interval(seed, purpose):
    numbers = uniform(stream_id(seed, purpose), INDEX, 3)
    assert numbers.shape == (COUNT, 3) and numbers.dtype == torch.float32
    assert numbers.min() >= 0 and numbers.max() < 1
    for draw in numbers.T:
        assert stats.kstest(draw.numpy(), "uniform").pvalue > LEAST
        counts = torch.bincount((draw * 256).long(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > LEAST


def test_low_bits_are_uniform_too():
    low = (column() * 2**24).long() % 256
    assert stats.chisquare(torch.bincount(low, minlength=256).numpy()).pvalue > LEAST


@pytest.mark.parametrize("bits", [16, 32, 40, 52])
def test_uniform_over_counters_that_share_their_low_bits(bits):
    draws = column(counters=torch.arange(4096) << (bits % 52))
    assert stats.kstest(draws.numpy(), "uniform").pvalue > LEAST
    assert draws.unique().numel() > 4000


OTHER = {
    "another purpose": lambda: column(purpose="colour-0"),
    "another view": lambda: column(purpose="crop-1"),
    "a purpose of the same letters": lambda: column(purpose="0-crop"),
    "another seed": lambda: column(seed=1),
    "a far seed": lambda: column(seed=1 << 40),
    "another epoch": lambda: column(counters=combine(1, INDEX)),
    "a far epoch": lambda: column(counters=combine(999, INDEX)),
    "the next index": lambda: column(counters=INDEX + 1),
    "the index after": lambda: column(counters=INDEX + 2),
    "twice the index": lambda: column(counters=INDEX * 2 + COUNT),
}


@pytest.mark.parametrize("name", OTHER)
def test_independent_of(name):
    first, other = column(), OTHER[name]()
    assert p_of_pairs(first, other) > LEAST
    assert abs(stats.pearsonr(first.numpy(), other.numpy()).statistic) < 4 / COUNT**0.5
    assert (first == other).float().mean() < 1e-3


def test_draws_of_one_counter_are_independent():
    numbers = uniform(stream_id(3, "crop-0"), INDEX, 5)
    for a, b in itertools.combinations(numbers.T, 2):
        assert p_of_pairs(a, b) > LEAST


def test_epochs_of_one_image_are_uniform():
    epochs = torch.cat([combine(epoch, torch.tensor([17])) for epoch in range(4000)])
    draws = column(counters=epochs)
    assert stats.kstest(draws.numpy(), "uniform").pvalue > LEAST
    assert p_of_pairs(draws[:-1], draws[1:], bins=8) > LEAST


def test_a_number_belongs_to_its_counter_alone():
    stream = stream_id(5, "crop-0")
    whole = uniform(stream, INDEX[:100], 6)
    picked = torch.tensor([70, 3, 99])
    assert torch.equal(uniform(stream, picked, 6), whole[picked])
    assert torch.equal(uniform(stream, INDEX[:100], 4), whole[:, :4])
    state = torch.get_rng_state()
    torch.manual_seed(12345)
    assert torch.equal(uniform(stream, INDEX[:100], 6), whole)
    torch.set_rng_state(state)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    uniform(stream_id(0, "crop-0"), INDEX[:8], 2)
    permutation(0, "order", 0, 8)
    assert torch.equal(torch.get_rng_state(), before)


PURPOSES = ("crop-0", "crop-1", "colour-0", "colour-1", "substitute", "order", "shuffle", "probe")


@pytest.mark.parametrize("seed", [0, 1, 17, 2**32 - 1])
def test_no_two_of_purpose_epoch_and_image_share_their_numbers(seed):
    """The views' draws were one stream once: view 1 had, an epoch later, the crops of view 0."""
    places = torch.cat([combine(epoch, INDEX) for epoch in range(3)])
    drawn = [uniform(stream_id(seed, purpose), places, 3).double() for purpose in PURPOSES]
    first, second, third = (torch.cat(drawn) * 2**24).long().T
    together = first << 39 | second << 15 | third >> 9  # 63 random bits each
    assert together.unique().numel() == len(together) == len(PURPOSES) * 3 * COUNT


def test_seeds_share_no_stream():
    ids = {stream_id(seed, purpose) for seed in range(5000) for purpose in PURPOSES}
    assert len(ids) == 5000 * len(PURPOSES) and all(-(2**63) <= i < 2**63 for i in ids)


def test_combine_tells_every_pair_apart():
    low = torch.tensor([0, 1, 2**20, 2**40 - 1])
    pairs = torch.cat([combine(high, low) for high in (0, 1, 2, 1000)])
    assert pairs.dtype == torch.int64 and pairs.unique().numel() == 16


@pytest.mark.parametrize("size", [0, 1, 2, 97, 5000])
def test_permutation_is_one(size):
    order = permutation(0, "order", 3, size)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(size))
    assert torch.equal(permutation(0, "order", 3, size), order)


def test_permutations_differ_by_epoch_seed_and_purpose():
    orders = [permutation(0, "order", epoch, 500) for epoch in range(5)]
    orders += [permutation(1, "order", 0, 500), permutation(0, "shuffle", 0, 500)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).float().mean() < 0.02  # 1 in 500 places agrees by chance
        assert abs(stats.spearmanr(a.numpy(), b.numpy()).statistic) < 4 / 500**0.5
    assert (orders[0] == torch.arange(500)).float().mean() < 0.02


def test_every_place_is_equally_likely():
    orders = torch.stack([permutation(0, "order", epoch, 5) for epoch in range(6000)])
    counts = torch.stack([torch.bincount(place, minlength=5) for place in orders.T])
    assert stats.chisquare(counts.flatten().numpy()).pvalue > LEAST
    whole = orders @ torch.tensor([5**k for k in range(5)])
    _, of_each = whole.unique(return_counts=True)
    assert len(of_each) == 120
    assert stats.chisquare(of_each.numpy()).pvalue > LEAST


def test_the_stream_never_changes():
    """Golden values: a change makes every old run impossible to resume, so make it on purpose."""

    def steps(seed, purpose, counters, draws):
        return (uniform(stream_id(seed, purpose), counters, draws) * 2**24).long().tolist()

    assert steps(0, "crop-0", torch.tensor([0, 1, 12345]), 4) == [
        [11279920, 14819305, 6540409, 15768365],
        [14239138, 15662251, 5601470, 3791756],
        [8302669, 7963882, 13810147, 3476575],
    ]
    assert steps(7, "colour-1", combine(3, torch.tensor([0, 1])), 3) == [
        [1525736, 3441045, 5334874],
        [2031924, 6306811, 13763674],
    ]
    assert permutation(0, "order", 0, 12).tolist() == [5, 10, 3, 8, 9, 2, 1, 7, 0, 6, 4, 11]
    assert permutation(2**31, "shuffle", 5, 12).tolist() == [2, 3, 1, 8, 4, 5, 6, 7, 0, 11, 9, 10]
