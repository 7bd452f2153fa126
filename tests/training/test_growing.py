"""Runs whose views grow: resumed to the same bits, read and exported at the last size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from runs import STREAMED, as_after, assert_same_end, load, run_tiny, trained
from timm.models.resnet import ResNet

import moco
import train
from moco.algorithm.encoder import build_backbone
from moco.algorithm.vit import take_any_size
from moco.config import ModelConfig, UserError
from moco.training import rehearsal

pytestmark = pytest.mark.usefixtures("in_tmp")
GROWING = ["--data.image_size_start", "8", "--data.image_size_share", "0.67"]
VIT = [
    *("--model.backbone", "vit_tiny_patch16_224", "--model.stem", "imagenet", "--model.width"),
    *("0.25", "--model.patch_size", "4", "--model.depth", "2", "--model.num_heads", "2"),
]


def test_views_grow_as_the_log_says(images, said):
    run_tiny(images, *GROWING)
    assert any("views v2 at 8 px, 12 px from step 2, 16 px from step 4," in line for line in said)


@pytest.mark.parametrize("streamed", [[], STREAMED])
@pytest.mark.parametrize("start", [0, 8])
def test_images_are_judged_at_a_larger_size_than_the_views(images, monkeypatch, streamed, start):
    sides = {True: set(), False: set()}  # by whether the backbone trains
    forward = ResNet.forward

    def noted(self, images):
        if images.device.type != "meta":
            sides[self.training].add(images.shape[-1])
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward", noted)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        write_pictures(Path(folder), [f"{n}.png" for n in range(9)], np.random.default_rng(0))
    words = ["--data.image_size_end", "12", "--data.image_size_start", str(start)]
    run_tiny(images, *words, *streamed, "--run.knn_every", "1", "--run.knn_root", ".")
    assert sides == {True: {8, 10, 12} if start else {12}, False: {16}}
    backbone = moco.load_backbone("run/checkpoints/last.ckpt")
    assert [*backbone.pretrained_cfg["input_size"]] == [3, 16, 16]


@pytest.mark.parametrize("streamed", [[], STREAMED])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_grows_at_the_same_steps(images, streamed, step):
    trained(images, *GROWING, *streamed, run_dir="whole")
    as_after(step, "whole")
    train.main(["--resume", "run"])
    assert_same_end("whole", "run")


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("smaller", [GROWING, ["--model.patches", "2", "--model.combine", "2"]])
def test_a_vit_resamples_its_positions(images, positions, smaller):
    run_tiny(images, *smaller, *VIT, "--model.positions", positions, run_dir="whole")
    as_after(3, "whole")
    train.main(["--resume", "run"])
    assert_same_end("whole", "run")
    backbone = moco.load_backbone("run/checkpoints/last.ckpt")
    assert [*backbone.pretrained_cfg["input_size"]] == [3, 16, 16]
    state = load("run/checkpoints/last.ckpt")["state_dict"]
    config = ModelConfig(backbone=VIT[1], width=0.25, patch_size=4, depth=2, num_heads=2)
    trained, _ = build_backbone(config, 3, 16)
    prefix = "query_encoder.backbone."
    trained.load_state_dict(
        {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}
    )
    take_any_size(trained.eval())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert trained(images).equal(backbone(images))
        assert trained(images[..., :8, :8]).shape == (2, 48)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.image_size_start", "16"], "data.image_size_start 16 is not below"),
        (["--data.image_size_end", "3"], "data.image_size_end 3 is below 4 pixels"),
        (["--data.image_size_start", "2"], "data.image_size_start 2 is below 4 pixels"),
        (
            ["--data.image_size_end", "10", "--model.patches", "3"],
            "data.image_size_end 10 does not divide into model.patches 3",
        ),
        (["--data.image_size", "18", "--data.image_size_end", "16", *VIT], "data.image_size 18 is"),
        (["--data.image_size_end", "17"], "data.image_size_end 17 is above data.image_size 16"),
        (
            ["--data.image_size_end", "12", "--data.image_size_start", "12"],
            "data.image_size_start 12 is not below data.image_size_end 12",
        ),
        (["--data.image_size_end", "6", *VIT], "data.image_size_end 6 is no multiple of the 4"),
        (["--data.image_size_start", "6", *VIT], "data.image_size_start 6 is no multiple of the 4"),
        (
            ["--data.image_size_start", "7", "--model.patches", "2"],
            "data.image_size_start 7 does not divide into model.patches 2",
        ),
        (
            [*GROWING, "--model.backbone", "mixer_s32_224", "--model.stem", "imagenet",
             "--model.width", "1", "--data.image_size", "64", "--data.image_size_start", "32",
             "--data.upscale", "4"],
            "mixer_s32_224 cannot take images of data.image_size_start 32",
        ),
        (
            [*GROWING, "--optim.schedule", "stable", "--trainer.max_epochs", "auto",
             "--run.minutes", "1"],
            "data.image_size_start is 8, which follows from the length of the run",
        ),
    ],
)  # fmt: skip
def test_what_cannot_grow_is_refused(images, words, message):
    with pytest.raises(UserError, match=message):
        run_tiny(images, *words)
    assert not Path("run/checkpoints").exists()


def test_views_alone_divide_into_patches(images):
    run_tiny(images, "--data.image_size_end", "12", "--model.patches", "3", "--model.combine", "1")


def test_the_page_tells_views_from_images(images):
    run_tiny(images, "--data.image_size_end", "12", "--run.report", "true")
    assert "views of 12 px, judged at 16 px" in Path("run/report.html").read_text()


def test_small_views_shorten_the_plan(images, monkeypatch):
    monkeypatch.setattr(rehearsal._Clock, "pace", lambda self: (1.0, 0.0))
    monkeypatch.setattr(rehearsal, "BATCHES", 2)
    found = run_tiny(images, *GROWING, "--run.plan", "true")
    areas = 0.335 * (8**2 + 12**2) + 0.33 * 16**2
    assert found["seconds"] == round(6 * areas / 16**2, 1)
    run_tiny(images, *GROWING)
    rest = ["--resume", "run/checkpoints/step_000000004.ckpt", "--run.plan", "true"]
    assert train.main(rest)["seconds"] == pytest.approx(2, abs=0.05), "two steps of 16 px"


def test_a_longer_run_would_have_grown_later(images):
    run_tiny(images, *GROWING, "--optim.schedule", "constant")
    with pytest.raises(UserError, match="the size of the views follows from the length of the run"):
        train.main(["--resume", "run", "--extend", "1"])
    assert train.main(["--resume", "run", "--extend", "1", "--yes"])["steps"] == 9


def test_what_a_recipe_leaves_open_since_then_is_as_the_run_has_it(images):
    run_tiny(images, "--trainer.max_steps", "2", run_dir="whole")
    as_after(1, "whole")
    words = ["--data.image_size_end", "auto", "--data.image_size", "auto", "--optim.lr", "auto"]
    run_tiny(images, "--trainer.max_steps", "2", *words, "--resume", "run")
    config = load("run/checkpoints/last.ckpt")["config"]
    assert [config["data"]["image_size_end"], config["optim"]["lr"]] == [0, 0.01]
