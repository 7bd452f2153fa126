"""The command `quality`: an encoder is measured without labels, beside the untrained network."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from door import PIXELS, pretrain
from pictures import write_pictures
from runs import TINY
from torchvision.transforms import v2

import moco
import train
from moco.command import quality
from moco.config import UserError
from moco.evaluation.measures import MEASURES
from moco.evaluation.quality import some
from moco.images.loader import PretrainData

pytestmark = pytest.mark.usefixtures("in_tmp")
LAST = ["--checkpoint", "run/checkpoints/last.ckpt", "--accelerator", "cpu"]


@pytest.fixture
def folder(tmp_path):
    """120 pictures without labels or splits, and a network that has seen them."""
    root = tmp_path / "images"
    write_pictures(root, [f"{i:03d}.png" for i in range(120)], np.random.default_rng(0))
    train.main([*TINY, "--data.root", str(root), "--run.dir", "run", "--trainer.max_steps", "1"])
    return root


def test_backbone_head_and_untrained_network_are_measured_on_the_same_views(folder, said):
    found = quality.main([*LAST, "--data.root", str(folder), "--count", "100", "--views", "6"])
    assert (found["images"], found["views"]) == (100, 6)
    for name in ("backbone", "head", "untrained"):
        assert found[name].keys() == MEASURES.keys()
        assert 1 <= found[name]["rankme"] <= 600 and 0 <= found[name]["retrieval"] <= 100
    assert found["backbone"] != found["untrained"] != found["head"]
    assert (
        quality.main([*LAST, "--data.root", str(folder), "--count", "100", "--views", "6"]) == found
    )
    other = quality.main([*LAST, "--count", "100", "--views", "6", "--seed", "1"])  # the run's
    assert other["data"] == found["data"] and other["backbone"] != found["backbone"]
    assert any(line.startswith("rankme") and "higher is better" in line for line in said)


def test_a_run_of_own_views_is_measured_by_those_of_a_recipe(said):
    run = pretrain(PIXELS, views=v2.RandomCrop(16), **{"trainer.max_steps": 1})
    found = moco.quality(run, PIXELS, views=2)
    assert found["images"] == len(PIXELS) and found["backbone"].keys() == MEASURES.keys()
    assert any("those of data.views cifar are taken" in line for line in said)


def test_images_that_may_have_been_trained_on_are_said_and_one_alone_is_refused(folder, said):
    quality.main([*LAST, "--data.root", str(folder)])
    assert any("the network may have been trained on these images" in line for line in said)
    write_pictures(folder.parent / "one", ["a.png"], np.random.default_rng(0))
    with pytest.raises(UserError, match="one holds 1 image to measure: give two or more"):
        quality.main([*LAST, "--data.root", str(folder.parent / "one")])


def test_a_bad_file_leaves_each_image_beside_its_own_views(folder, monkeypatch):
    """What fills no batch is left out once, and not anew in each epoch."""
    monkeypatch.setattr("moco.evaluation.quality.BATCH", 32)
    (folder / "005.png").write_bytes(b"no image")
    seen: dict[int, set[int]] = {}
    make = PretrainData.make_batch

    def noted(data, batch):
        seen.setdefault(batch.epoch, set()).update(batch.index.tolist())
        return make(data, batch)

    monkeypatch.setattr(PretrainData, "make_batch", noted)
    words = ["--data.root", str(folder), "--count", "96", "--data.max_bad_fraction", "0.1"]
    found = quality.main([*LAST, *words])
    assert seen == {0: {*range(64)}, 1: {*range(64)}} and found["images"] == 64


def test_wrong_use_is_one_line(folder):
    with pytest.raises(UserError, match="views is 3: give an even number"):
        quality.main([*LAST, "--views", "3"])
    with pytest.raises(UserError, match="does not exist"):
        quality.main(["--checkpoint", "nothing"])
    with pytest.raises(UserError, match="'none' does not exist"):
        quality.main([*LAST, "--data.root", "none"])
    with pytest.raises(UserError, match="shards are not measured: give a folder"):
        some(SimpleNamespace(is_sharded=True), 2, seed=0)
