"""How long a queue may be: the share of queries that meet their own image's older key."""

from __future__ import annotations

import pytest
import torch

from moco.config import DataConfig, ModelConfig, TrainConfig, UserError
from moco.evaluation.findings import findings, own_key_share
from moco.training.shares import check_queue, check_shares


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("share_of_images", [0.125, 0.5, 1.0, 1.5, 2.5])
def test_share_of_queries_that_meet_their_own_older_key(share_of_images, symmetric):
    """Against a queue of image numbers that is filled through two epochs of other orders."""
    images, batch = 400, 20
    views = 2 if symmetric else 1
    length, met, seen = round(share_of_images * images), 0, 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        order = torch.cat([torch.randperm(images, generator=generator) for _ in range(3)])
        queue: list[int] = []
        for number, index in enumerate(order.split(batch)):
            if number >= 2 * images // batch:
                met += len(set(index.tolist()) & set(queue))
                seen += batch
            queue = [*queue, *index.tolist() * views][-length:]
    assert met / seen == pytest.approx(own_key_share(length, images * views), abs=0.03)


def settings(queue: int, symmetric: str = "none") -> TrainConfig:
    model = ModelConfig(queue_size=queue, symmetric=symmetric)
    return TrainConfig(model=model, data=DataConfig(batch_size=64))


@pytest.mark.parametrize(
    ("queue", "count", "symmetric", "warned"),
    [
        (4096, 50000, "sum", ""),
        (400, 1280, "none", ""),
        (408, 1280, "none", "5% of the queries"),
        (1024, 1257, "none", "35% of the queries"),
        (1024, 1257, "mean", "9% of the queries"),
    ],
)
def test_a_long_queue_is_warned_of_with_the_share_and_a_better_length(
    said, queue, count, symmetric, warned
):
    check_queue(settings(queue, symmetric), count)
    assert len(said) == bool(warned)
    assert all(warned in line and "would be better" in line for line in said)
    better = 152 * (1 if symmetric == "none" else 2)
    assert all(f": {better} would be" in line for line in said if count == 1257)


def test_a_queue_above_the_set_is_refused_with_the_share_and_a_length_that_is_accepted(said):
    with pytest.raises(
        UserError, match="100% of the queries would meet .*: take model.queue_size 64$"
    ):
        check_queue(settings(8192), 250)
    with pytest.raises(UserError, match="take model.queue_size 160$"):
        check_queue(settings(1281), 1280)
    check_queue(settings(160), 1280)
    assert said == []


def test_a_queue_that_can_be_no_shorter_asks_for_more_images_and_not_for_its_own_length(said):
    check_queue(settings(64), 150)
    assert len(said) == 1 and "give more images, or lower data.batch_size" in said[0]
    assert "64 would be" not in said[0]
    config = settings(64)
    found = findings({}, config.model, config.data.batch_size, 150)
    assert len(found) == 1 and found[0].endswith("with it model.queue_size")


@pytest.mark.parametrize(("batch", "count"), [(8, 1), (16, 9)])
def test_a_set_below_the_smallest_batch_is_refused_with_what_can_be_done(batch, count):
    config = TrainConfig(model=ModelConfig(queue_size=batch), data=DataConfig(batch_size=batch))
    with pytest.raises(UserError, match=f"above the {count} images?.*: give more images, 16 at"):
        check_queue(config, count)


@pytest.mark.parametrize(("queue", "better"), [(65536, 30), (0, 0)])
def test_a_batch_and_a_queue_above_the_set_are_told_together_with_values_that_work(queue, better):
    config = TrainConfig(model=ModelConfig(queue_size=queue))
    assert config.data.batch_size == 256
    with pytest.raises(UserError) as error:
        check_queue(config, 250)
    said = str(error.value)
    assert "data.batch_size 256" in said and "take data.batch_size 16" in said
    assert ("model.queue_size 65536 are above the 250" in said) == bool(queue)
    assert ("and model.queue_size 30" in said) == bool(queue)
    config.data.batch_size, config.model.queue_size = 16, better
    check_queue(config, 250)
    check_shares(config, 1, "split", "plain")
    config.data.batch_size = 256
    with pytest.raises(UserError, match="take data.batch_size 16"):  # two in a BatchNorm group
        check_queue(config, 60)
