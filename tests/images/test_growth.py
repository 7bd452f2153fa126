"""Views that grow: their size is a function of the step, for resident and for streamed images."""

from __future__ import annotations

import pytest
import torch

from moco.config import DataConfig
from moco.images.growth import growth
from moco.images.loader import PretrainData
from moco.images.steps import StepLoader


@pytest.mark.parametrize(
    ("first", "last", "unit", "sizes"),
    [
        (0, 32, 1, (32,)),
        (16, 32, 1, (16, 24, 32)),
        (112, 224, 16, (112, 160, 224)),
        (14, 42, 14, (14, 28, 42)),
        (16, 32, 16, (16, 32)),
        (31, 32, 1, (31, 32)),
    ],
)
def test_sizes_are_few_and_multiples(first, last, unit, sizes):
    config = DataConfig(image_size=last, image_size_start=first, image_size_share=0.5)
    grown = growth(config, 100, unit)
    assert grown.sizes == sizes and all(size % unit == 0 for size in grown.sizes)
    assert grown.starts == {1: (0,), 2: (0, 50), 3: (0, 25, 50)}[len(sizes)]
    assert [grown.size(step) for step in (0, 24, 99)] == [sizes[0], sizes[0], last]


def test_the_cost_is_the_mean_area():
    config = DataConfig(image_size=32, image_size_start=16, image_size_share=0.5)
    grown = growth(config, 100, 1)
    assert grown.work(0, 100) == sum(grown.size(step) ** 2 for step in range(100)) / 32**2
    assert growth(DataConfig(image_size=32), 100, 1).work(0, 100) == 100
    assert grown.in_words() == "16 px, 24 px from step 25, 32 px from step 50"
    config = DataConfig(image_size=32, image_size_start=16, image_size_end=24, image_size_share=0.5)
    assert growth(config, 100, 1).in_words() == "16 px, 20 px from step 25, 24 px from step 50"
    assert growth(DataConfig(image_size=32, image_size_end=24), 100, 1).in_words() == "24 px"


@pytest.mark.parametrize("resident", ["memory", "off"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_views_have_the_size_of_their_step(images, resident, symmetric):
    config = DataConfig(
        root=str(images), image_size=16, image_size_start=8, image_size_share=0.5, batch_size=8,
        num_workers=0, resident=resident,
    )  # fmt: skip
    data = PretrainData(config, seed=3, shuffle=True, symmetric=symmetric)
    data.prepare(torch.device("cpu"))
    data.accumulate, data.growth = 4, growth(config, 8, 1)  # two steps an epoch, of 4 and 2 batches

    def sizes(position: int) -> list[int]:
        found = []
        for indices in StepLoader(data, lambda: position):
            batch = data.on_after_batch_transfer(indices, 0)
            assert len({view.shape for view in [*batch.query_views, *batch.key_views]}) == 1
            found.append(batch.query_views[0].shape[-1])
        return found

    assert [sizes(6 * epoch) for epoch in range(4)] == [[8] * 6, [12] * 6, [16] * 6, [16] * 6]
    assert sizes(4) == [8, 8]
    data.growth = growth(config, 7, 1)
    assert sizes(0) == [8] * 6 and sizes(6) == [12] * 6 and sizes(12) == [16] * 6
    data.growth = growth(config, 4, 1)
    assert sizes(0) == [8] * 4 + [12] * 2
