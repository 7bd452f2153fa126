"""Views of 32 px on one core: ours in a batch, against torchvision image by image.

    python benchmarks/views.py [--recipes v1 v2 cifar v3] [--batch 256] [--rounds N] [--ours]

Claim: at least 5 times as many views per second as `torchvision.transforms.v2` on uint8 tensors,
one image at a time (drawn per image, as contrastive learning needs it), in every recipe. The third
way is the chain of the official code: torchvision's first transforms on PIL images. Ours is
`PretrainData.on_after_batch_transfer`, what training calls: it looks the images up, draws each
one's own parameters, crops, resizes, mirrors, changes colours and normalises. All hold the images
decoded in memory and have one thread. With `--ours` only ours are made, on a GPU compiled
and not. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Row, arguments, interleave, progress, report, table
from moco.config import DataConfig
from moco.images.draws import RECIPES, ViewRecipe
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.steps import Indices
from moco.pixels import normalisation

TARGET = 5.0
SIGMA = (0.1, 2.0)
TENSORS, PIL, OURS = "torchvision v2", "PIL", "ours"
COMPILED = "ours, compiled"


class PILBlur:
    """The official chain's blur: Pillow's own, of a sigma drawn for each image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        from PIL import ImageFilter

        sigma = float(torch.empty(()).uniform_(*SIGMA))
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def reference_chain(
    recipe: ViewRecipe, size: int, kind: Any, mean: list[float], std: list[float]
) -> Callable[[Any], Tensor]:
    """Build the chain of the papers from torchvision's parts.

    Args:
        recipe: Probabilities and strengths.
        size: Side of a view.
        kind: `torchvision.transforms` for PIL images, `torchvision.transforms.v2` for uint8
            tensors.
    """
    tensors = kind is v2
    resize = {"antialias": True} if tensors else {}
    grey = kind.RandomGrayscale(recipe.grey)
    jitter = kind.RandomApply([kind.ColorJitter(*recipe.strengths)], recipe.jitter)
    blur = v2.GaussianBlur(13, SIGMA) if tensors else PILBlur()  # 13 taps: as ours
    steps = [
        kind.RandomResizedCrop(size, (recipe.crop_min, 1.0), **resize),
        *([grey, jitter] if recipe.grey_first else [jitter, grey]),
        *([kind.RandomApply([blur], recipe.blur)] if recipe.blur else []),
        *([kind.RandomSolarize(128, recipe.solarise)] if recipe.solarise else []),
        kind.RandomHorizontalFlip(recipe.flip),
        v2.ToDtype(torch.float32, scale=True) if tensors else transforms.ToTensor(),
        kind.Normalize(mean, std),
    ]
    return kind.Compose(steps)


def ways(name: str, images: Tensor, batch: int) -> dict[str, Callable[[], Any]]:
    """Build the three ways to make two views of each image, N x 3 x S x S uint8."""
    size = images.shape[-1]
    mean, std = normalisation(DataConfig("cifar10"))
    pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    one_by_one, pil_chain = (
        [reference_chain(recipe, size, kind, mean, std) for recipe in RECIPES[name]]
        for kind in (v2, transforms)
    )
    return {
        TENSORS: lambda: torch.stack([chain(image) for image in images for chain in one_by_one]),
        PIL: lambda: torch.stack([chain(image) for image in pil_images for chain in pil_chain]),
        OURS: batched(name, images, batch, torch.device("cpu")),
    }


def batched(
    name: str, images: Tensor, batch: int, device: torch.device, backend: str = ""
) -> Callable[[], None]:
    """Build our way to make them, on a device and perhaps compiled."""
    config = DataConfig("cifar10", views=name, image_size=images.shape[-1], batch_size=batch)
    source = ImageSource("random", images, [], None, [], 3)
    data = PretrainData(config, 0, shuffle=False, symmetric=False, source=source)
    data.prepare(device, backend=backend)
    turn, places = iter(range(2**31)), torch.arange(len(images), device=device)

    def ours() -> None:
        epoch = next(turn)
        for index in places.split(batch):
            data.on_after_batch_transfer(Indices(epoch, 0, index), 0)

    return ours


def main(argv: list[str]) -> dict[str, Any]:
    """Let the ways take turns, recipe by recipe."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--images", type=int, default=256, help="of one turn, two views each")
    parser.add_argument("--batch", type=int, default=256, help="of ours")
    parser.add_argument("--ours", action="store_true", help="ours alone, plain and compiled")
    parser.add_argument("--size", type=int, default=32, help="side of images and views in pixels")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(
        0, 256, (options.images, 3, options.size, options.size), dtype=torch.uint8
    )
    results = {}
    for name in options.recipes:
        progress(f"recipe {name}")
        work = 2 * len(images)
        if options.ours:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            kinds = {OURS: ""} | ({COMPILED: "inductor"} if device.type == "cuda" else {})
            made = {k: batched(name, images, options.batch, device, b) for k, b in kinds.items()}
            seconds = interleave(made, options.rounds)
            rows = [Row(k, seconds[k], work, {OURS: None} if k != OURS else {}) for k in kinds]
            title = f"Recipe {name}: two views of {options.size} px, {device.type}"
            results[name] = table(title, rows, "views/s")
            continue
        seconds = interleave(ways(name, images, options.batch), options.rounds)
        rows = [
            Row(TENSORS, seconds[TENSORS], work),
            Row(PIL, seconds[PIL], work, {TENSORS: None}),
            Row(OURS, seconds[OURS], work, {TENSORS: TARGET, PIL: None}),
        ]
        title = f"Recipe {name}: two views of {options.size} px, one core"
        results[name] = table(title, rows, "views/s")
    return report("views", results, options)


if __name__ == "__main__":
    main(sys.argv[1:])
