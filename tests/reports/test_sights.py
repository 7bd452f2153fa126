"""What a page shows of an encoder, on images whose answer is known; and what it advises."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moco.config import DataConfig, TrainConfig, UserError
from moco.images.image_source import ImageSource
from moco.reports import blindness, charts, sights
from moco.reports.advice import advise
from moco.reports.facts import Facts
from moco.reports.pictures import sprite, tiles

DATA = DataConfig(dataset="cifar10", image_size=8, mean=[0.5] * 3, std=[0.25] * 3)


class Colour(nn.Module):
    """An encoder that sees the mean of each band and its spread, and no place."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


class Red(nn.Module):
    """An encoder that sees the pixels of the first band alone."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images[:, 0].flatten(1)


def a_source(images, labels=None) -> ImageSource:
    classes = [] if labels is None else [f"class {n}" for n in range(int(labels.max()) + 1)]
    return ImageSource("set", images, [], labels, classes, 3)


@pytest.fixture(scope="module")
def two_colours():
    """Thirty reddish images, twenty bluish ones, a green one, and the first one again."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 30, (52, 3, 8, 8), generator=generator)
    images[:30, 0] += 180
    images[30:50, 2] += 180
    images[50, 1] += 220
    images[51] = images[0]
    labels = torch.tensor([0] * 30 + [1] * 20 + [2, 0])
    return a_source(images.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def sample(two_colours):
    return sights.look(Colour().eval(), two_colours, DATA, 100, seed=0)


def test_a_sample_holds_each_image_once_beside_its_nearest(sample, two_colours):
    assert sorted(sample.rows.tolist()) == list(range(52)) != sample.rows.tolist()
    cosines = sample.features @ sample.features.T
    cosines.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(sample.similarity, cosines.topk(20).values)
    assert not (sample.neighbours == torch.arange(52)[:, None]).any(), "none is its own neighbour"
    torch.testing.assert_close(sample.tiles, two_colours.images[sample.rows])
    assert sample.labels[int((sample.rows == 31).nonzero())] == "class 1"
    some = sights.look(Colour().eval(), two_colours, DATA, 10, seed=0)
    assert some.rows.tolist() == sample.rows[:10].tolist()


def test_a_slow_network_sees_fewer_images_and_enough_of_them(two_colours, monkeypatch):
    monkeypatch.setattr(sights, "SECONDS", -1.0)
    many = a_source(two_colours.images.repeat(20, 1, 1, 1))
    assert len(sights.look(Colour().eval(), many, DATA, 1000, seed=0).rows) == sights.LEAST


def test_clusters_are_the_colours_the_most_central_image_first(sample):
    found = sights.clusters(sample, seed=0)
    groups = [{int(sample.rows[place]) for place in cluster} for cluster in found]
    assert [len(group) for group in groups] == [31, 20, 1]
    assert groups[0] == {*range(30), 51} and groups[2] == {50}
    mean = sample.features[found[1]].mean(0)
    closeness = sample.features[found[1]] @ mean
    assert int(closeness.argmax()) == 0


def test_the_odd_one_is_odd_and_typical_ones_are_of_each_group(sample):
    usual, odd = sights.typical(sample, 3)
    assert int(sample.rows[odd[0]]) == 50
    neighbours = [set(sample.neighbours[place].tolist()) for place in usual]
    assert usual[1] not in neighbours[0] and len(usual) == 3


def test_twins_are_alike_in_pixels_too(sample):
    found = sights.twins(sample)
    assert {int(sample.rows[place]) for place in found[0][:2]} == {0, 51}
    other = (sample.tiles.float() * 0.5).round().to(torch.uint8)
    other[int((sample.rows == 0).nonzero())] = 255
    changed = sights.replace(sample, tiles=other)
    left = [{int(sample.rows[place]) for place in pair[:2]} for pair in sights.twins(changed)]
    assert {0, 51} not in left


def test_the_map_keeps_colours_together(sample):
    places = sights.make_map(sample, seed=0)
    assert places.shape == (52, 2) and places.min() >= 0 and places.max() <= 1
    red, blue = (
        places[[int(row) in group for row in sample.rows]] for group in (range(30), range(30, 50))
    )
    apart = np.linalg.norm(red.mean(0) - blue.mean(0))
    assert apart > 2 * max(red.std(), blue.std())
    spec = charts.make_chart_of_map(sample, places, sights.clusters(sample, seed=0))
    points = spec["data"]["values"]
    assert {point["label"] for point in points} == {"class 0", "class 1", "class 2"}
    assert {point["cluster"] for point in points} == {"cluster 01", "cluster 02", "cluster 03"}


def test_a_large_map_asks_for_its_package(sample, monkeypatch):
    monkeypatch.setattr("moco.reports.layout.MANY", 10)
    monkeypatch.setitem(__import__("sys").modules, "openTSNE", None)
    with pytest.raises(UserError, match=r"pip install openTSNE, or take --images 10"):
        sights.make_map(sample, seed=0)


def test_a_tile_is_the_image_and_a_sprite_holds_all():
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    half = torch.full((3,), 0.5)
    normal = (images / 255 - 0.5) / 0.5
    assert (tiles(normal, half, half).int() - images).abs().max() == 0
    assert tiles(normal[:, :1], half[:1], half[:1]).shape == (5, 3, 8, 8), "grey has three bands"
    assert tiles(torch.zeros(2, 5, 8, 8), torch.zeros(5), torch.ones(5), 4).shape == (2, 3, 4, 4)
    address, columns, side = sprite(images.to(torch.uint8), 64)
    assert address.startswith("data:image/webp;base64,") and (columns, side) == (3, 8)


def test_an_encoder_of_colours_is_blind_to_place_and_sees_hue(two_colours):
    found = blindness.measure(Colour().eval(), two_colours, DATA, seed=0)
    remains = {change.name: change.remains for change in found}
    assert [change.remains for change in found] == sorted(remains.values(), reverse=True)
    for name in ("mirror, left and right", "mirror, up and down", "quarter turn"):
        assert remains[name] == pytest.approx(1, abs=1e-4)
    assert remains["hue, a third of the circle"] < 0.5 > remains["negative"]
    says = blindness.sentence(found, labelled=True)
    blind, seen = says.split("Seen well: ")
    assert "mirror, left and right" in blind and "your classes may differ in it" in blind
    assert "hue, a third of the circle" in seen
    bands = a_source(torch.cat([two_colours.images] * 2, 1)[:, :5])
    data = DataConfig(**{**vars(DATA), "channels": 5, "mean": [0.5] * 5, "std": [0.25] * 5})
    names = {each.name for each in blindness.measure(Colour().eval(), bands, data, seed=0)}
    assert "without band 5" in names and not any("hue" in name for name in names)


def test_an_encoder_of_one_band_is_blind_to_the_others():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=generator).to(torch.uint8)
    found = blindness.measure(Red().eval(), a_source(images), DATA, seed=0)
    remains = {change.name: change.remains for change in found}
    assert remains["without green"] == remains["without blue"] == pytest.approx(1, abs=1e-4)
    assert remains["without red"] < 0.5 and remains["mirror, left and right"] < 0.5


def test_one_image_or_equal_ones_have_no_blindness(two_colours):
    for images in (two_colours.images[:1], two_colours.images[:1].repeat(9, 1, 1, 1)):
        assert blindness.measure(Colour().eval(), a_source(images), DATA, seed=0) == []


def a_run(rows=(), result=None, **settings) -> Facts:
    config = TrainConfig().changed({"model.queue_size": 256} | settings)
    rows = [{"step": step, **row} for step, row in enumerate(rows)]
    return Facts(SimpleNamespace(), config, config, {}, [], result or {}, rows, None)


KNN = [{"val/knn_top1": value} for value in (40.0, 55.0, 50.0)]
BETTER = {"comparison": {"is_better": True, "sentence": "", "trained": {"standard_error": 0.5}}}
FEW = {"comparison": BETTER["comparison"] | {"trained": {"standard_error": 4.0}}}


@pytest.mark.parametrize(
    "facts,words",
    [
        (a_run([{"train/spread": 0.01}]), "nearly one point"),
        (a_run([{"train/loss": 5.0, "train/chance_loss": 4.9}]), "not below that of chance"),
        (a_run([{"train/wait_share": 0.6}] * 3), "60% of the time went by waiting for images: rai"),
        (a_run(KNN), "fallen from 55.0 % at step 1 to 50.0 %: lower optim.lr"),
        (a_run([KNN[1], KNN[0]]), "40.0 % is not above the 55.0 % before the first step: "),
        (a_run(**{"model.queue_size": 4096}), "take model.queue_size"),
        (a_run(result={"comparison": {"is_better": False, "sentence": "Not better."}}), "Not bett"),
        (a_run(KNN[:2], BETTER), ""),
        (a_run(KNN, BETTER), "fallen from 55.0 % at step 1 to 50.0 %: lower optim.lr"),
        (a_run(KNN, FEW), ""),  # of 100 test images: by chance
        (a_run([KNN[1], KNN[0], KNN[2]], BETTER), ""),  # the best is before the first step
    ],
)
def test_what_is_wrong_is_said_with_the_setting_to_change(facts, words):
    found = advise(facts, 10_000)
    assert len(found) == bool(words) and words in "".join(found)
