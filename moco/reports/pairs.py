"""Pairs: the two views of an image that the encoder sees in an epoch.

Views are functions of (seed, epoch, image), so those of any moment of a run can be made again.
Shapes: C channels, S side of a view, T side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig, UserError
from moco.images import views
from moco.images.crops import cut
from moco.images.decode import BadImage
from moco.images.draws import centre_crops, view_recipes
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.pairs import PairedCuts, Partners
from moco.images.streamed import Cuts
from moco.pixels import normalisation
from moco.reports.pictures import tiles


@dataclass
class Pairs:
    """An image and its view pairs.

    Attributes:
        name: Of the file, or the number of the image in its set.
        image: 3 x T x T uint8, the centre as evaluation sees it.
        views: The two views of each epoch, the same; the second may be of the image's partner.
    """

    name: str
    image: Tensor
    views: list[Tensor]


def name_of(source: ImageSource, row: int) -> str:
    """Return what an image is called: the end of its path in printable letters, or its number."""
    if not source.paths:
        return f"image {row}"
    return "/".join(shown(source.paths[row]).split("/")[-2:])


def make_pairs(
    source: ImageSource,
    data: DataConfig,
    seed: int,
    epochs: Sequence[int],
    rows: Sequence[int],
    partners: Partners | None = None,
) -> list[Pairs]:
    """Make the view pairs of some images in some epochs; what cannot be read is left out.

    Args:
        source: The images of the run: a row's number decides its views.
        data: Settings, without auto.
        epochs: Counted from 0.
        partners: As of `find_partners`: chooses the image from which a second view is cut.

    Raises:
        UserError: The views are made by callables from Python.
    """
    if data.views == "own":
        raise UserError("data.views is own, callables that only Python has")
    mean, std = (torch.tensor(values) for values in normalisation(data))
    maker = views.ViewMaker(view_recipes(data), seed, data.view_side, mean, std)
    cuts, found = Cuts(source, data, seed), []
    both = cuts if partners is None else PairedCuts(cuts, partners)
    for row in rows:
        try:
            image = source.read(row)
        except BadImage:
            continue
        box = centre_crops(1, *image.shape[1:], data.image_size, image.device)
        centre = cut(image, box, data.image_size)[None] / 255
        made = []
        for epoch in epochs:
            crops, _ = both.__getitems__((epoch, np.array([row]), cuts.size))
            index = torch.tensor([row])
            places = index, index if partners is None else partners(epoch, index)
            made += [
                tiles(maker(crops[:, view], epoch, place, view, whole=False), mean, std)[0]
                for view, place in enumerate(places)
            ]
        picture = tiles(views.normalise(centre, mean, std), mean, std)[0]
        found.append(Pairs(name_of(source, row), picture, made))
    return found
