"""Draws: torchvision's distributions of boxes and colours, recipes, and independence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from moco.config import DataConfig, UserError
from moco.images.draws import (
    RECIPES,
    Crops,
    ViewRecipe,
    draw_colours,
    draw_crops,
    view_recipes,
    view_streams,
)

LEAST = 1e-4  # seeds are fixed: a p-value below this is a fault, not bad luck
ALL = ViewRecipe(0.2, 0.5, 1.0, (0.4, 0.4, 0.4, 0.4), 1.0, 1.0)
CROP, COLOUR = view_streams(0, 0)


def same_source(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's p-value that two samples have one distribution."""
    a, b = ours.double().numpy(), theirs.double().numpy()
    return stats.ks_2samp(a, b, method="asymp").pvalue


@pytest.mark.parametrize(
    "height, width, crop_min",
    [
        (32, 32, 0.2),
        (48, 64, 0.08),
        (500, 375, 0.2),
        (60, 20, 0.2),  # only some attempts fit
        (16, 160, 0.2),  # none fits: the fallback
        (300, 20, 0.08),
        (32, 32, 1.0),
    ],
)
def test_boxes_are_distributed_as_torchvisions(height, width, crop_min):
    count = 2500
    crops = draw_crops(replace(ALL, crop_min=crop_min), CROP, 0, torch.arange(count), height, width)
    assert (crops.top >= 0).all() and (crops.top + crops.height <= height).all()
    assert (crops.left >= 0).all() and (crops.left + crops.width <= width).all()
    assert (crops.height >= 1).all() and (crops.width >= 1).all()
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    boxes = torch.tensor(
        [RandomResizedCrop.get_params(blank, [crop_min, 1], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    theirs = Crops(*boxes.T, flip=crops.flip)

    def readings(c: Crops) -> dict[str, torch.Tensor]:
        area, ratio = c.height * c.width, c.width / c.height
        room = ((c.left + 0.5) / (width - c.width + 1), (c.top + 0.5) / (height - c.height + 1))
        plain = {"top": c.top, "left": c.left, "height": c.height, "width": c.width}
        return {**plain, "area": area, "ratio": ratio, "across": room[0], "down": room[1]}

    expected = readings(theirs)
    for name, values in readings(crops).items():
        p = same_source(values, expected[name])
        assert p > LEAST, f"{name}: p {p}"


def test_the_fallback_is_torchvisions_box():
    for height, width in ((10, 1000), (1000, 10), (7, 300), (1, 50)):
        crops = draw_crops(ALL, CROP, 0, torch.arange(5), height, width)
        torch.manual_seed(0)
        blank = torch.empty(1, height, width)
        box = RandomResizedCrop.get_params(blank, [0.2, 1], [3 / 4, 4 / 3])
        for ours, theirs in zip(
            (crops.top, crops.left, crops.height, crops.width), box, strict=True
        ):
            assert ours.tolist() == [theirs] * 5


def test_flips_have_their_probability_and_stand_apart_from_the_box():
    crops = draw_crops(replace(ALL, flip=0.3), CROP, 0, torch.arange(20_000), 32, 32)
    assert stats.binomtest(int(crops.flip.sum()), 20_000, 0.3).pvalue > LEAST
    flipped, straight = crops.left[crops.flip], crops.left[~crops.flip]
    assert same_source(flipped, straight) > LEAST


@pytest.mark.parametrize(("name", "view"), [*((name, 1) for name in RECIPES), ("v3", 0)])
def test_colours_have_the_recipes_distribution(name, view):
    count, recipe = 24_000, RECIPES[name][view]
    colours = draw_colours(recipe, COLOUR, 0, torch.arange(count))
    for i, (strength, middle) in enumerate(zip(recipe.strengths, (1, 1, 1, 0), strict=True)):
        spread = stats.uniform(middle - strength, 2 * strength)
        assert stats.kstest(colours.factors[:, i].double().numpy(), spread.cdf).pvalue > LEAST
    assert stats.kstest(colours.sigma.numpy(), stats.uniform(0.1, 1.9).cdf).pvalue > LEAST
    orders, counts = colours.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and stats.chisquare(counts.numpy()).pvalue > LEAST
    for step in ("jitter", "grey", "blur", "solarise"):
        share = getattr(recipe, step)
        assert stats.binomtest(int(getattr(colours, step).sum()), count, share).pvalue > LEAST


def test_colour_parameters_are_independent():
    colours = draw_colours(RECIPES["v2"][0], COLOUR, 0, torch.arange(20_000))
    flags = [colours.jitter, colours.grey, colours.blur]
    columns = [*flags, *colours.factors.T, *colours.order.T[:1], colours.sigma]
    table = np.corrcoef(torch.stack([c.double() for c in columns]).numpy())
    np.fill_diagonal(table, 0)
    assert np.abs(table).max() < 4 / 20_000**0.5


def test_recipes_are_the_papers():
    assert RECIPES["v1"][0] == ViewRecipe(0.2, 0.5, 1.0, (0.4,) * 4, 0.2, 0.0, grey_first=True)
    assert RECIPES["v2"][0] == ViewRecipe(0.2, 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5)
    assert RECIPES["cifar"][0] == ViewRecipe(0.08, 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.0)
    assert all(RECIPES[name][0] == RECIPES[name][1] for name in ("v1", "v2", "cifar"))
    first, second = RECIPES["v3"]
    assert first == ViewRecipe(0.2, 0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1.0)
    assert second == replace(first, blur=0.1, solarise=0.2)


def test_own_probabilities_go_into_the_recipe():
    data = DataConfig(views="v2", crop_min=0.5, flip=0.0, jitter=0.1, grey=0.3, blur=0.9)
    expected = replace(RECIPES["v2"][0], crop_min=0.5, flip=0.0, jitter=0.1, grey=0.3, blur=0.9)
    assert view_recipes(data) == (expected, expected)
    assert view_recipes(DataConfig(views="v1")) == RECIPES["v1"]


def test_a_probability_of_two_values_is_one_for_each_view():
    data = DataConfig(views="v2", blur=[1.0, 0.1], solarise=[0.0, 0.2], crop_min=[0.3])
    first, second = view_recipes(data)
    assert first == replace(RECIPES["v2"][0], crop_min=0.3, blur=1.0)
    assert second == replace(RECIPES["v2"][0], crop_min=0.3, blur=0.1, solarise=0.2)


def test_greyscale_of_other_channels_is_refused():
    with pytest.raises(UserError, match=r"data\.grey is 0\.3 .*data\.channels is 5"):
        view_recipes(DataConfig(channels=5, grey=0.3))
    assert view_recipes(DataConfig(channels=5, grey=0.0))[0].grey == 0


DRAWS = {
    "crops": lambda seed, epoch, index, view: (
        draw_crops(RECIPES["v2"][0], view_streams(seed, view)[0], epoch, index, 32, 32).left
    ),
    "colours": lambda seed, epoch, index, view: draw_colours(
        RECIPES["v2"][0], view_streams(seed, view)[1], epoch, index
    ).factors[:, 0],
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"index": 1}])
def test_parameters_of_other_seeds_epochs_views_and_images_are_independent(draw, change):
    place = {"seed": 0, "epoch": 0, "index": torch.arange(5000), "view": 0}
    other = {name: place[name] + step for name, step in change.items()}
    one, two = DRAWS[draw](**place).float(), DRAWS[draw](**{**place, **other}).float()
    assert abs(stats.pearsonr(one.numpy(), two.numpy()).statistic) < 4 / 5000**0.5
