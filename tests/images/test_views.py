"""Views: torchvision's operations at equal parameters, torchvision's distributions, no state."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.nn import functional
from torchvision.transforms import (
    ColorJitter,
    Compose,
    Lambda,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference
from torchvision.transforms.v2.functional import pil_to_tensor

from moco.images import crops
from moco.images.crops import crop_and_resize, cut
from moco.images.draws import (
    RECIPES,
    Colours,
    Crops,
    ViewRecipe,
    centre_crops,
    draw_colours,
    draw_crops,
    view_streams,
)
from moco.images.views import _adjust, normalise

LEAST = 1e-4  # seeds are fixed: a p-value below this is a fault, not bad luck
ALL = ViewRecipe(0.2, 0.5, 1.0, (0.4, 0.4, 0.4, 0.4), 1.0, 1.0)
CROP, COLOUR = view_streams(0, 0)
OPERATIONS = (
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
)


def images(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth shapes with noise, uint8, each image with a cast of its own."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = reference.resize(coarse, [height, width], antialias=True)
    cast = torch.rand(count, channels, 1, 1, generator=generator)
    noise = torch.randn(count, channels, height, width, generator=generator)
    return (255 * (0.6 * smooth + 0.4 * cast) + 12 * noise).clamp(0, 255).to(torch.uint8)


def floats(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return images(count, channels, size, size, seed).float() / 255


def adjust_colours(batch: torch.Tensor, colours: Colours, recipe: ViewRecipe) -> torch.Tensor:
    return torch.stack(_adjust(list(batch.clone().unbind(1)), colours, recipe), 1)


def nothing(count: int, **changes) -> Colours:
    """Parameters that change no colour, but for `changes`."""
    no = torch.zeros(count, dtype=torch.bool)
    plain = Colours(
        order=torch.arange(4).expand(count, 4),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(count, 4),
        jitter=no,
        grey=no,
        blur=no,
        sigma=torch.ones(count),
        solarise=no,
    )
    return replace(plain, **changes)


def yes(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.fixture(params=["chosen samples", "all samples, then select"])
def branch(request, monkeypatch):
    """Both ways that a step meets its samples: a CPU's, and a GPU's or a compiled graph's."""
    if request.param != "chosen samples":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


# Crop, resize, flip


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (40, 61, 16), (23, 18, 48)])
def test_crops_equal_torchvision(channels, height, width, size):
    count, generator = 24, torch.Generator().manual_seed(1)
    h = torch.randint(1, height + 1, (count,), generator=generator)
    w = torch.randint(1, width + 1, (count,), generator=generator)
    h[:2], w[:2] = torch.tensor([height, 1]), torch.tensor([width, 1])
    top = (torch.rand(count, generator=generator) * (height - h + 1)).long()
    left = (torch.rand(count, generator=generator) * (width - w + 1)).long()
    flip = torch.arange(count) % 2 == 1
    batch = images(count, channels, height, width)
    ours = crop_and_resize(batch, Crops(top, left, h, w, flip), size)
    assert ours.shape == (count, channels, size, size) and ours.dtype == torch.float32
    for i in range(count):
        box = (top[i].item(), left[i].item(), h[i].item(), w[i].item())
        theirs = reference.resized_crop(
            batch[i].float() / 255,
            *box,
            [size, size],
            interpolation=InterpolationMode.BILINEAR,
            antialias=True,
        )
        close(ours[i], reference.horizontal_flip(theirs) if flip[i] else theirs)
    close(crop_and_resize(batch.float(), Crops(top, left, h, w, flip), size), ours)


def test_evaluation_cuts_seven_eighths_of_the_short_side():
    crops = centre_crops(2, 64, 96, 32, torch.device("cpu"))
    batch = images(2, 3, 64, 96)
    expected = reference.center_crop(batch.float() / 255, [56, 56])
    expected = reference.resize(expected, [32, 32], antialias=True)
    close(crop_and_resize(batch, crops, 32), expected)


def test_evaluation_takes_small_images_whole():
    batch = images(2, 3, 20, 32)
    crops = centre_crops(2, 20, 32, 32, torch.device("cpu"))
    expected = reference.resize(batch.float() / 255, [32, 32], antialias=True)
    close(crop_and_resize(batch, crops, 32), expected)


# Colours


def draw_factors(count: int, seed: int = 0) -> torch.Tensor:
    span = torch.tensor([0.8, 0.8, 0.8, 0.5])
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
    unit = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return middle + span * (2 * unit - 1)


def special(batch: torch.Tensor) -> torch.Tensor:
    """Put hard cases for the hue in the first pixels: grey, black, white, pure and tied colours."""
    cases = [(0.5, 0.5, 0.5), (0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    cases += [(1, 1, 0), (0, 1, 1), (1, 0, 1), (0.2, 0.7, 0.7), (0.7, 0.2, 0.7)]
    batch[:, :, 0, : len(cases)] = torch.tensor(cases, dtype=torch.float32).T
    return batch


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_equals_torchvision_in_each_order(channels, branch):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    count = len(orders)
    batch = floats(count, channels, 16)
    batch = special(batch) if channels == 3 else batch
    colours = nothing(count, order=orders, factors=draw_factors(count), jitter=yes(count))
    ours = adjust_colours(batch, colours, replace(ALL, grey=0, blur=0))
    for i in range(count):
        theirs = batch[i]
        for operation in orders[i].tolist():
            theirs = OPERATIONS[operation](theirs, colours.factors[i, operation].item())
        close(ours[i], theirs)


@pytest.mark.parametrize("operation", range(4))
def test_each_operation_alone_equals_torchvision(operation, branch):
    batch = special(floats(12, 3, 16))
    factors = nothing(12).factors.clone()
    factors[:, operation] = draw_factors(12)[:, operation]
    if operation == 3:
        factors[:3, 3] = torch.tensor([-0.5, 0.5, 0.25])
    else:
        factors[:2, operation] = torch.tensor([0.0, 2.0])
    colours = nothing(12, factors=factors, jitter=yes(12))
    ours = adjust_colours(batch, colours, replace(ALL, grey=0, blur=0))
    for i in range(12):
        close(ours[i], OPERATIONS[operation](batch[i], factors[i, operation].item()))


def test_five_channels_get_brightness_and_contrast_alone(branch):
    batch = floats(6, 5, 12)
    orders = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0], [2, 1, 3, 0]] * 2)[:6]
    colours = nothing(6, order=orders, factors=draw_factors(6), jitter=yes(6))
    ours = adjust_colours(batch, colours, replace(ALL, blur=0))
    for i in range(6):
        image, (brightness, contrast) = batch[i], colours.factors[i, :2].tolist()
        for operation in orders[i].tolist():
            if operation == 0:
                image = (image * brightness).clamp(0, 1)
            if operation == 1:
                image = (contrast * image + (1 - contrast) * image.mean()).clamp(0, 1)
        close(ours[i], image)


def test_greyscale_equals_torchvision(branch):
    batch = floats(4, 3, 12)
    ours = adjust_colours(batch, nothing(4, grey=yes(4)), ALL)
    close(ours, reference.rgb_to_grayscale(batch, num_output_channels=3))


@pytest.mark.parametrize("channels", [1, 5])
def test_greyscale_leaves_what_is_not_rgb(channels, branch):
    batch = floats(4, channels, 12)
    close(adjust_colours(batch, nothing(4, grey=yes(4)), ALL), batch)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [32, 13, 7, 4])
def test_blur_equals_torchvision_with_13_taps_and_a_border_that_is_repeated(channels, size, branch):
    batch = floats(6, channels, size)
    sigma = torch.tensor([0.1, 0.4, 0.9, 1.3, 1.7, 2.0])
    ours = adjust_colours(batch, nothing(6, blur=yes(6), sigma=sigma), ALL)
    for i in range(6):
        padded = functional.pad(batch[i], (12,) * 4, mode="replicate")
        blurred = reference.gaussian_blur(padded, [13, 13], [sigma[i].item()] * 2)
        close(ours[i], blurred[:, 12:-12, 12:-12])


def test_blur_repeats_the_border_as_pil_does():
    batch, sigma = torch.zeros(1, 3, 32, 32), 1.0
    batch[:, :, 0], batch[:, :, :, -2:] = 1, 0.7  # what lies at an edge weighs most where repeated
    picture = Image.fromarray((batch[0] * 255).round().byte().permute(1, 2, 0).numpy())
    theirs = pil_to_tensor(picture.filter(ImageFilter.GaussianBlur(sigma))).float() / 255
    ours = adjust_colours(batch, nothing(1, blur=yes(1), sigma=torch.tensor([sigma])), ALL)[0]
    assert (ours - theirs).abs().mean() < 0.004  # of boxes and 8 bits; reflected it is 0.010


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_normalise_equals_torchvision(channels):
    batch = floats(3, channels, 8)
    mean, std = torch.linspace(0.3, 0.6, channels), torch.linspace(0.2, 0.4, channels)
    close(normalise(batch, mean, std), reference.normalize(batch, mean.tolist(), std.tolist()))


def test_only_the_masked_samples_change(branch):
    batch = floats(8, 3, 16)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()
    factors = draw_factors(8)
    recipe = replace(ALL, solarise=1.0)
    steps = ("grey", "blur", "solarise")
    for changes in ({"jitter": mask, "factors": factors}, *({step: mask} for step in steps)):
        ours = adjust_colours(batch, nothing(8, **changes), recipe)
        torch.testing.assert_close(ours[~mask], batch[~mask], atol=1e-7, rtol=0)
        assert ((ours - batch)[mask].abs().amax((1, 2, 3)) > 1e-3).all()
        alone = {name: value[mask] for name, value in vars(nothing(8, **changes)).items()}
        close(ours[mask], adjust_colours(batch[mask], Colours(**alone), recipe))


def test_the_input_is_left_as_it_was(branch):
    batch = floats(4, 3, 16)
    before = batch.clone()
    mask = torch.tensor([1, 0, 1, 1]).bool()
    changes = {"jitter": mask, "grey": mask, "blur": mask, "factors": draw_factors(4)}
    adjust_colours(batch, nothing(4, **changes), ALL)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_both_branches_give_the_same_views(recipe, channels, monkeypatch):
    batch = images(40, channels, 32, 32)
    views = [make(batch, torch.arange(40), RECIPES[recipe][1], 24)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    views.append(make(batch, torch.arange(40), RECIPES[recipe][1], 24))
    close(*views)


@pytest.mark.parametrize("first", [True, False])
def test_greyscale_stands_where_the_recipe_says(first):
    batch = floats(3, 3, 12)
    factors = torch.tensor([[1.3, 0.8, 1.2, 0.2]]).expand(3, 4)
    colours = nothing(3, factors=factors, jitter=yes(3), grey=yes(3))
    ours = adjust_colours(batch, colours, replace(ALL, blur=0, grey_first=first))
    theirs = reference.rgb_to_grayscale(batch, 3) if first else batch
    for operation, factor in zip(OPERATIONS, (1.3, 0.8, 1.2, 0.2), strict=True):
        theirs = operation(theirs, factor)
    close(ours, theirs if first else reference.rgb_to_grayscale(theirs, 3))


# A view belongs to (seed, epoch, index, view) alone


def make(batch, index, recipe, size, *, seed=0, epoch=0, view=0):
    crop, colour = view_streams(seed, view)
    boxes = draw_crops(recipe, crop, epoch, index, *batch.shape[2:])
    cut = crop_and_resize(batch, boxes, size)
    colours = draw_colours(recipe, colour, epoch, index)
    return adjust_colours(cut, colours, recipe)


def test_a_view_does_not_depend_on_its_batch():
    batch, index = images(32, 3, 40, 40), torch.arange(100, 132)
    whole = make(batch, index, RECIPES["v2"][0], 24)
    for rows in ([5], [31, 0, 17], list(range(31, -1, -1))):
        part = make(batch[rows], index[rows], RECIPES["v2"][0], 24)
        torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_other_seeds_epochs_and_views_look_different(change):
    batch, index = images(16, 3, 32, 32), torch.arange(16)
    one, other = (make(batch, index, RECIPES["v2"][0], 24, **c) for c in ({}, change))
    assert ((one - other).abs().mean((1, 2, 3)) > 1e-3).all()
    assert torch.equal(one, make(batch, index, RECIPES["v2"][0], 24))


def test_neighbours_in_the_data_set_look_different():
    batch = images(1, 3, 32, 32).expand(16, 3, 32, 32)
    views = make(batch, torch.arange(16), RECIPES["v2"][0], 24)
    for a, b in itertools.combinations(views, 2):
        assert (a - b).abs().mean() > 1e-3


def test_solarisation_equals_pils_on_every_level():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    colours = nothing(1, solarise=yes(1))
    ours = adjust_colours(levels.float() / 255, colours, replace(ALL, solarise=1.0))
    theirs = ImageOps.solarize(Image.fromarray(levels[0].permute(1, 2, 0).numpy()))
    close(ours[0], ToTensor()(theirs))


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize("height, width, size", [(40, 50, 24), (20, 24, 32), (100, 80, 16)])
def test_bicubic_is_pils_where_it_overshoots_too(kind, height, width, size):
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    values = values if kind == "noise" else (values > 127).astype(np.uint8) * 255
    box = [torch.tensor([side]) for side in (3, 2, height - 5, width - 7)]
    crops = Crops(*box, torch.tensor([False]))
    part = Image.fromarray(values[3 : height - 2, 2 : width - 5])
    expected = np.asarray(part.resize((size, size), Image.BICUBIC)).transpose(2, 0, 1)
    image = torch.from_numpy(values).permute(2, 0, 1)
    resident = crop_and_resize(image[None], crops, size, "bicubic")[0].numpy() * 255
    streamed = cut(image, crops, size, 0, "bicubic").numpy()
    for found in (resident, streamed):
        assert np.abs(found.astype(float) - expected).max() < 1.7  # PIL rounds twice


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_box_of_the_wanted_size_is_cut_as_it_is(interpolation, flip):
    image = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).permute(2, 0, 1)
    box = [torch.tensor([side]) for side in (3, 5, 16, 16)]
    found = cut(image, Crops(*box, torch.tensor([flip])), 16, 0, interpolation)
    part = image[:, 3:19, 5:21]
    assert torch.equal(found, part.flip(2) if flip else part)
    resized = functional.interpolate(part[None], (16, 16), mode=interpolation, antialias=True)[0]
    assert torch.equal(part, resized)  # which is what the longer way gives


# The whole chain against PIL's


def pil_chain(recipe: ViewRecipe, size: int) -> Compose:

    def blur(image: Image.Image) -> Image.Image:
        radius = torch.empty(1).uniform_(0.1, 2.0).item()
        return image.filter(ImageFilter.GaussianBlur(radius))

    steps = [
        RandomApply([ColorJitter(*recipe.strengths)], recipe.jitter),
        RandomGrayscale(recipe.grey),
    ]
    steps = steps[::-1] if recipe.grey_first else steps
    cut = RandomResizedCrop(size, scale=(recipe.crop_min, 1))
    steps = [cut, *steps, RandomApply([Lambda(blur)], recipe.blur)]
    steps += [RandomApply([Lambda(ImageOps.solarize)], recipe.solarise), RandomHorizontalFlip()]
    return Compose([*steps, ToTensor()])


def statistics(views: torch.Tensor) -> dict[str, torch.Tensor]:
    """Numbers per view that move with crop, flip, each jitter, greyscale and blur."""
    mean, std = views.mean((2, 3)), views.std((2, 3))
    half = views.shape[3] // 2
    found = {f"mean of {c}": mean[:, i] for i, c in enumerate(("red", "green", "blue"))}
    found |= {f"std of {c}": std[:, i] for i, c in enumerate(("red", "green", "blue"))}
    found["colourfulness"] = (views.amax(1) - views.amin(1)).mean((1, 2))
    found["is grey"] = (found["colourfulness"] < 0.004).float()
    found["roughness"] = (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3))
    found["left over right"] = (views[..., :half] - views[..., half:]).mean((1, 2, 3))
    found["top over bottom"] = (views[:, :, :half] - views[:, :, half:]).mean((1, 2, 3))
    found["red over blue"] = mean[:, 0] - mean[:, 2]
    return found


@pytest.mark.parametrize(("name", "view"), [*((name, 1) for name in RECIPES), ("v3", 0)])
def test_faithful_to_the_pil_chain_in_distribution(name, view):
    """The means and the spreads of what a view looks like agree; PIL rounds to 8 bits between."""
    count, size, recipe = 600, 32, RECIPES[name][view]
    image = images(1, 3, 56, 72, seed=5)[0]
    torch.manual_seed(0)
    chain, picture = pil_chain(recipe, size), Image.fromarray(image.permute(1, 2, 0).numpy())
    theirs = statistics(torch.stack([chain(picture) for _ in range(count)]))
    batch = image.expand(count, *image.shape)
    ours = statistics(make(batch, torch.arange(count), recipe, size))
    for what, values in ours.items():
        expected = theirs[what]
        error = ((values.var() + expected.var()) / count).sqrt()
        assert abs(values.mean() - expected.mean()) < 4.5 * error + 0.002, what
        assert abs(values.std() - expected.std()) < 0.2 * expected.std() + 0.002, what


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_half_precision_are_those_of_float32_to_a_third_of_a_level(
    interpolation, monkeypatch
):
    """As on a GPU."""
    given = images(16, 3, 40, 48)
    boxes = draw_crops(ALL, CROP, 0, torch.arange(16), 40, 48)
    made = []
    for kind in (torch.float32, torch.float16):
        monkeypatch.setattr(crops, "_precision", lambda device, kind=kind: kind)
        made.append(crop_and_resize(given, boxes, 32, interpolation))
    apart = (made[1] - made[0]).abs().max() * 255
    assert made[1].dtype == torch.float32 and 0 < apart < 0.34
