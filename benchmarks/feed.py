"""Feeding 224 px views from JPEG files, on one core.

    python benchmarks/feed.py [--root FOLDER_OF_IMAGES] [--images 40] [--rounds N]

Claim: a worker process here hands over at least 4.5 times as many images per second as a worker
that runs the official MoCo v2 chain with Pillow.

What is compared is what a worker has to do, and that is not the same work: there it makes finished
views (decode, then twice crop, jitter, grey, blur, flip, floats, normalise); here it decodes and
cuts twice to uint8 (`moco.images.streamed.Cuts`), and the device makes the colours of whole batches
afterwards. So the table also has the whole chain on this one core, colours included
(`PretrainData.on_after_batch_transfer`): that is what the same work costs, and what feeding costs
where the device is that same core. No decoder hands images over faster than it decodes: the share
of that bound is printed too. Without `--root`, synthetic JPEGs of 0.2 megapixels and half a byte a
pixel, like photographs, are written to a temporary folder. The last line is one JSON object.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torchvision import transforms
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Row, arguments, interleave, progress, report, table
from benchmarks.views import reference_chain
from moco.config import DataConfig
from moco.images.loader import PretrainData
from moco.images.steps import Indices
from moco.images.streamed import Cuts
from moco.pixels import normalisation

TARGET = 4.5
DECODE, PIL, TENSORS = "decode alone", "PIL, finished views", "torchvision v2, finished views"
WORKER, WHOLE = "ours, worker's part: uint8 cuts", "ours, finished views on this core"
COLOUR_BATCH = 32
GRAIN, QUALITY = 14, 92  # half a byte a pixel, as photographs on the web have


def write_images(folder: Path, count: int, size: tuple[int, int] = (500, 400)) -> None:
    """Write JPEGs that cost a decoder about what photographs do: slopes, shapes and grain."""
    random = np.random.default_rng(0)
    width, height = size
    for number in range(count):
        y, x = np.mgrid[:height, :width]
        slopes = [a * x / width + b * y / height for a, b in random.uniform(0, 120, (3, 2))]
        image = Image.fromarray(np.stack(slopes, -1).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(30):
            left, top = random.uniform(0, width), random.uniform(0, height)
            box = (left, top, left + random.uniform(5, 150), top + random.uniform(5, 150))
            colour = tuple(int(c) for c in random.integers(0, 256, 3))
            random.choice([draw.ellipse, draw.rectangle])(box, fill=colour)
        image = image.filter(ImageFilter.GaussianBlur(1))
        grain = random.normal(0, GRAIN, (height, width, 1)) + random.normal(
            0, 3, (height, width, 3)
        )
        pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=QUALITY)


def ways(data: PretrainData, count: int) -> dict[str, Callable[[], Any]]:
    """Build the five ways to handle the next `count` images of the folder, each in its turn."""
    config, source = data.config, data.source
    mean, std = normalisation(config)
    size = config.image_size
    pil_chain = reference_chain(data.recipes[0], size, transforms, mean, std)
    tensor_chain = reference_chain(data.recipes[0], size, v2, mean, std)
    cuts = Cuts(data.source, data.config, data.seed)

    def over_folder(handle: Callable[[list[int], int], Any]) -> Callable[[], Any]:
        turns = itertools.count()

        def turn() -> None:
            number = next(turns)
            index = [i % len(source) for i in range(number * count, (number + 1) * count)]
            handle(index, number)

        return turn

    def pil(index: list[int], turn: int) -> None:
        for i in index:
            image = pil_loader(source.paths[i])
            pil_chain(image), pil_chain(image)

    def tensors(index: list[int], turn: int) -> None:
        for i in index:
            image = source.read(i)
            tensor_chain(image), tensor_chain(image)

    def whole(index: list[int], turn: int) -> None:
        for part in torch.tensor(index).split(COLOUR_BATCH):
            crops, _ = cuts.__getitems__((turn, part.numpy(), size))
            data.on_after_batch_transfer(Indices(turn, 0, part, crops), 0)

    return {
        DECODE: over_folder(lambda index, turn: [source.read(i) for i in index]),
        PIL: over_folder(pil),
        TENSORS: over_folder(tensors),
        WORKER: over_folder(lambda index, turn: cuts.__getitems__((turn, np.array(index), size))),
        WHOLE: over_folder(whole),
    }


def measure(root: str, options: Any) -> dict[str, Any]:
    """Let the ways take turns over the images of a folder."""
    config = DataConfig(
        "folder", root, image_size=options.size, batch_size=2, views="v2", resident="off"
    )
    data = PretrainData(config, 0, shuffle=False, symmetric=False)
    data.prepare(torch.device("cpu"))
    for index in range(len(data.source)):  # into the page cache
        Path(data.source.paths[index]).read_bytes()
    seconds = interleave(ways(data, options.images), options.rounds)
    work = options.images
    bound = Row(DECODE, seconds[DECODE], work).median
    rows = [
        Row(DECODE, seconds[DECODE], work),
        Row(PIL, seconds[PIL], work, bound=bound),
        Row(TENSORS, seconds[TENSORS], work, {PIL: None}, bound),
        Row(WORKER, seconds[WORKER], work, {PIL: TARGET}, bound),
        Row(WHOLE, seconds[WHOLE], work, {PIL: None}, bound),
    ]
    title = (
        f"Two views of {options.size} px from {len(data.source)} files, one core; "
        "what the worker's part leaves out, the device does"
    )
    return {"two_views": table(title, rows, "images/s")}


def main(argv: list[str]) -> dict[str, Any]:
    """Measure on the user's images, or on synthetic ones."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--root", default="", help="folder of images; empty: synthetic ones")
    parser.add_argument("--images", type=int, default=40, help="of one turn")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.root:
        return report("feed", measure(options.root, options), options)
    with tempfile.TemporaryDirectory() as folder:
        progress("writing synthetic images")
        write_images(Path(folder), options.images)
        return report("feed", measure(folder, options), options)


if __name__ == "__main__":
    main(sys.argv[1:])
