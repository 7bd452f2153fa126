"""The block shuffle and the gathers, on one process and on two real gloo ranks."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from moco import distributed
from moco.config import UserError
from moco.distributed import gather_ragged


def test_ranks_of_tests_start_processes_as_a_fresh_python_does(two_ranks):
    """From a fork server their workers would import every library again."""
    assert two_ranks.run(multiprocessing.get_start_method) == 2 * [
        multiprocessing.get_start_method()
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_key_order_deals_equal_blocks_of_every_rank_to_every_rank(world):
    count = 8
    order = distributed.key_order(3, 17, count, world)
    assert sorted(order.tolist()) == list(range(count * world))
    for receiver in order.view(world, count):
        senders = torch.bincount(receiver // count, minlength=world)
        assert senders.tolist() == [count // world] * world


def test_key_order_belongs_to_the_seed_and_the_step():
    orders = [distributed.key_order(s, t, 16, 2) for s, t in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0].equal(orders[3])
    assert not orders[0].equal(orders[1])
    assert not orders[0].equal(orders[2])


def test_no_rank_permutes_its_rows_as_any_has_done_at_another_step():
    count, world = 16, 2
    seen = set()
    for step in range(8):
        order = distributed.key_order(0, step, count, world).view(world, world, -1)
        for sender in range(world):
            seen.add(tuple((order[:, sender].flatten() % count).tolist()))
    assert len(seen) == 8 * world


def test_key_order_refuses_unequal_blocks():
    with pytest.raises(ValueError, match="9 images per device"):
        distributed.key_order(0, 0, 9, 2)


def test_one_process_shuffle_is_undone():
    rows = torch.arange(24).view(8, 3)
    order = distributed.key_order(0, 5, 8, 1)
    shuffled = distributed.exchange(rows, order)
    assert not shuffled.equal(rows)
    assert distributed.restore(shuffled, order).equal(rows)


def _shuffle_on_ranks(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = 6
    rank = distributed.rank()
    rows = (torch.arange(count * 2).view(count, 2) + 100 * rank).to(dtype)
    order = distributed.key_order(1, 9, count, 2)
    shuffled = distributed.exchange(rows, order)
    return rows, shuffled, distributed.restore(shuffled, order)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_two_ranks_shuffle_is_undone_and_mixes_the_groups(two_ranks, dtype):
    results = two_ranks.run(_shuffle_on_ranks, dtype)
    everything = torch.cat([rows for rows, _, _ in results])
    for rank, (rows, shuffled, restored) in enumerate(results):
        assert restored.equal(everything)
        own = {tuple(row) for row in rows.tolist()}
        here = {tuple(row) for row in shuffled.tolist()}
        assert len(own & here) == 3, (
            f"rank {rank} holds half of its own keys and half of the other's"
        )


def _gather_on_ranks() -> tuple[torch.Tensor, torch.Tensor]:
    rank = distributed.rank()
    leaf = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = distributed.all_gather(leaf * 2)
    assert not gathered.requires_grad
    return gathered, gather_ragged(torch.full((rank + 1, 2), rank + 5))  # not the padding's 0


def test_gather_keeps_rank_order_without_gradient(two_ranks):
    for gathered, ragged in two_ranks.run(_gather_on_ranks):
        assert gathered[:, 0].tolist() == [0, 0, 2, 2]
        assert ragged[:, 0].tolist() == [5, 6, 6]


def test_local_rows_and_world_size_are_plain_on_one_process():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.local_rows(torch.arange(4), 4).tolist() == [0, 1, 2, 3]


# Meeting and agreeing


def _make(first: bool, failing: tuple[int, ...]):
    """What a rank gets from `together` or `from_first`, where some ranks fail."""

    def make() -> str:
        if distributed.rank() in failing:
            raise UserError(f"no data on {distributed.rank()}")
        return f"of {distributed.rank()}"

    try:
        if first:
            return distributed.from_first(make)
        with distributed.together():
            made = make()
        return made
    except UserError as error:
        return error


def test_rank_0_decides_for_all(two_ranks):
    assert two_ranks.run(_make, True, (1,)) == ["of 0", "of 0"]
    assert [str(e) for e in two_ranks.run(_make, True, (0, 1))] == ["no data on 0"] * 2
    assert _make(True, ()) == "of 0" and str(_make(True, (0,))) == "no data on 0"


def test_an_error_of_one_rank_is_raised_on_all(two_ranks):
    assert two_ranks.run(_make, False, ()) == ["of 0", "of 1"]
    assert [str(e) for e in two_ranks.run(_make, False, (1,))] == ["rank 1: no data on 1"] * 2
    assert [str(e) for e in two_ranks.run(_make, False, (0, 1))] == ["no data on 0"] * 2


def _check(facts):
    try:
        distributed.check_alike(facts[distributed.rank()], "the images")
    except UserError as error:
        return str(error)


def test_what_ranks_have_found_must_be_the_same(two_ranks):
    assert two_ranks.run(_check, [{"count": 3}, {"count": 3}]) == [None, None]
    wrong = "the images are not the same on rank 0 and rank 1 (3 and 4): give all machines the same"
    assert two_ranks.run(_check, [3, 4]) == [f"{wrong} ones"] * 2
