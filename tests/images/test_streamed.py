"""Streamed images: large JPEGs are decoded no larger than their two cuts need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig, TrainConfig
from moco.images.decode import decode, decode_reduced
from moco.images.sources import open_source
from moco.images.streamed import Cuts

SIZE = 32


def photograph(path, width: int, height: int, **how) -> None:
    """Write a smooth picture with some grain, as JPEG."""
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    grain = rng.normal(0, 4, (height, width, 1))
    picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    picture.convert(how.pop("mode", "RGB")).save(path, quality=92, **how)


@pytest.fixture
def photographs(tmp_path):
    """Photographs of several sizes and kinds, large and small for views of 32 pixels."""
    sizes = [(401, 307), (640, 480), (60, 50), (257, 1031)]
    for number, (width, height) in enumerate(sizes):
        photograph(tmp_path / f"{number}.jpg", width, height)
    photograph(tmp_path / "4.jpg", 500, 400, mode="L")
    photograph(tmp_path / "5.jpg", 500, 400, mode="CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(tmp_path / "6.jpg", 500, 330, exif=turned, progressive=True)
    Image.open(tmp_path / "1.jpg").save(tmp_path / "7.png")
    return tmp_path


def make_cuts(folder, **changes) -> Cuts:
    config = DataConfig(root=str(folder), image_size=SIZE, exif="apply", **changes)
    return Cuts(open_source(config, "train"), config, seed=1)


def cut(cuts: Cuts, epoch: int) -> torch.Tensor:
    views, bad = cuts.__getitems__((epoch, np.arange(len(cuts.source)), SIZE))
    assert not bad
    return views.float()


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_cuts_of_reduced_photographs_are_those_of_whole_ones_but_for_the_filter(photographs, how):
    reduced = make_cuts(photographs, interpolation=how)
    whole = make_cuts(photographs, interpolation=how, reduce_jpegs=False)
    for epoch in range(6):
        difference = (cut(reduced, epoch) - cut(whole, epoch)).abs()
        assert difference[2].max() == difference[7].max() == 0  # the small one and the PNG
        assert difference.max() <= 24 and difference.mean() < 2  # grey levels
        # A box that is off by one pixel of a view would change smooth pictures by more.
        assert difference.flatten(1).mean(1).max() < 3


def test_a_photograph_is_decoded_as_small_as_both_boxes_allow(photographs):
    cuts, used = make_cuts(photographs), set()
    for epoch in range(20):
        for row in range(len(cuts.source)):
            found = cuts._read(epoch, row, [])
            sizes = torch.tensor([[found.height, found.width]])
            boxes = cuts._boxes(epoch, torch.tensor([row]), sizes)
            shortest = min(min(int(b.height), int(b.width)) for b in boxes)
            by = found.reduction
            assert found.pixels.shape[1:] == (-(-found.height // by), -(-found.width // by))
            if cuts.source.paths[row].endswith("png"):
                assert by == 1
            else:
                allowed = [b for b in (1, 4, 8) if b == 1 or b * SIZE <= shortest]
                if cuts.source.paths[row].endswith("6.jpg"):  # turned, of 500 x 330 pixels
                    allowed = [min(b, 2) for b in allowed]
                assert by == max(allowed)
            used.add(by)
    assert used == {1, 2, 4, 8}  # 2 where a turned picture cannot be divided by 4


def test_the_reduced_size_is_that_of_the_upright_picture(photographs):
    config = DataConfig(root=str(photographs), image_size=SIZE, exif="apply")
    source, asked = open_source(config, "train"), []
    found = source.read_reduced(6, lambda *size: asked.append(size) or 4)
    assert asked == [(500, 330)] and found.pixels.shape == (3, 250, 165) and found.reduction == 2


def test_without_a_rule_nothing_is_reduced(photographs):
    path = str(photographs / "1.jpg")
    assert decode_reduced(path, 3).pixels.equal(decode(path, 3))
    assert decode(path, 3).shape == (3, 480, 640)
    assert cut(make_cuts(photographs, reduce_jpegs=False), 0).shape == (8, 2, 3, SIZE, SIZE)


def test_a_run_that_began_without_it_goes_on_without_it():
    former = TrainConfig.from_dict({"data": {"root": "x"}})
    assert not former.data.reduce_jpegs
    assert replace(former.data).reduce_jpegs is False and DataConfig().reduce_jpegs
