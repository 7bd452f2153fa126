"""A replayed step is the run's own, and the views before a run are those of the run."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from door import PIXELS, pretrain
from PIL import Image
from runs import STREAMED, TINY, at, run_tiny, trained

from moco.command import replay as command
from moco.command import views
from moco.config import DataConfig, UserError
from moco.images.loader import PretrainData
from moco.images.pairs import find_partners
from moco.images.steps import Indices
from moco.reports.pairs import make_pairs
from moco.reports.pictures import shortened
from moco.training.replay import replay

pytestmark = pytest.mark.usefixtures("in_tmp")


def logged() -> dict[int, float]:
    with open("run/metrics.csv", encoding="utf-8") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--model.symmetric", "mean", "--model.key_momentum", "0.9"),
        ("--model.queue_size", "0", "--model.symmetric", "sum", "--model.predictor", "mlp"),
        (*STREAMED, "--model.patches", "2", "--model.combine", "2"),
    ],
    ids=["queue", "symmetric", "no queue", "streamed patches"],
)
def test_a_replayed_step_costs_what_the_run_has_logged(images, options):
    run_tiny(images, *options)
    for step in (3, 5):  # of the first epoch and of the second
        (Path("run/checkpoints") / f"step_{step - 1:09d}.ckpt").unlink()  # it is taken again
        found = replay(Path("run"), step)
        assert found["exact"] and found["checkpoint_step"] == step - 2
        assert found["loss"] == pytest.approx(logged()[step], rel=1e-5) == found["logged_loss"]
        losses = [image["loss"] for image in found["images"]]
        assert losses == sorted(losses, reverse=True) and len(losses) == 16
        assert sum(losses) / 16 == pytest.approx(found["loss"], abs=1e-4)
        files = {Path(image["file"]).name for image in found["images"]}
        assert len(files) == 16 and files <= {path.name for path in Path(images).iterdir()}
        assert Image.open(found["picture"]).height > 16 * 96
    assert json.dumps(found)


def test_a_step_of_several_batches_shows_them_all(images):
    run_tiny(images, "--trainer.accumulate_grad_batches", "2")
    found = replay(Path("run"), 3)  # the first step of the second epoch: two of its three batches
    assert len(found["images"]) == 32 and found["exact"]
    assert found["loss"] == pytest.approx(logged()[3], rel=1e-5)
    assert len(replay(Path("run"), 4)["images"]) == 16


def test_without_an_earlier_checkpoint_the_batch_meets_later_weights(images):
    trained(images)
    whole = replay(Path("run"), 3)
    for path in Path("run/checkpoints").glob("step_*.ckpt"):
        path.unlink()
    found = replay(Path("run"), 3)
    assert not found["exact"] and found["checkpoint_step"] == 6 and found["loss"] > 0
    assert {each["file"] for each in found["images"]} == {each["file"] for each in whole["images"]}


def test_the_image_that_made_the_loss_stands_first(copied):
    run_tiny(copied)
    state, path = at(3), "run/checkpoints/step_000000003.ckpt"
    batch = replay(Path("run"), 4)["images"]
    chosen = batch[7]["file"]
    Image.new("RGB", (20, 20), "white").save(chosen)
    assert state["global_step"] == 3 and Path(path).exists()
    found = {each["file"]: each["loss"] for each in replay(Path("run"), 4)["images"]}
    assert abs(found[chosen] - batch[7]["loss"]) > 1e-3


def test_what_cannot_be_replayed_is_said(images, tmp_path):
    trained(images)
    with pytest.raises(UserError, match="step is 7 but the run has 6 steps"):
        command.main(["run", "--step", "7"])
    with pytest.raises(UserError, match="step is 0"):
        command.main(["run", "--step", "0"])
    with pytest.raises(UserError, match="run is a directory: name a file"):
        command.main(["run", "--step", "2", "--output", "run"])
    with pytest.raises(UserError, match="last.ckpt: give a name that ends in .png"):
        command.main(["run", "--step", "2", "--output", "run/checkpoints/last.ckpt"])
    shutil.copytree(images, "other")
    Path("other/00.jpg").rename("other/zero.jpg")
    with pytest.raises(UserError, match="holds other images than those of the run"):
        command.main(["run", "--step", "2", "--root", "other"])
    shutil.rmtree("run/checkpoints")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        command.main(["run", "--step", "2"])


def test_a_run_of_what_python_gave_is_refused_by_what_holds_for_replay():
    pretrain(PIXELS, pairs=lambda row: row // 2, **{"trainer.max_steps": 1})
    with pytest.raises(UserError, match=r"^run was given its images and pairs in Python.*folder"):
        command.main(["run", "--step", "1"])


def test_a_loss_that_is_no_number_is_told_as_null(images):
    run_tiny(images)
    path = "run/checkpoints/step_000000003.ckpt"
    state = at(3)
    for name, value in state["state_dict"].items():
        if name.startswith("query_encoder") and value.is_floating_point():
            value.fill_(math.nan)
    torch.save(state, path)
    found = command.main(["run", "--step", "4"])
    assert found["loss"] is None and {each["loss"] for each in found["images"]} == {None}
    json.dumps(found, allow_nan=False)


def test_views_are_drawn_before_a_run(images, monkeypatch):
    monkeypatch.setattr("moco.training.run.build_module", None)  # nothing is built
    found = views.main([*TINY, "--data.root", str(images), "--output", "pairs.png"])
    assert found == {"views": "pairs.png", "images": 12, "image_size": 16}
    picture = Image.open("pairs.png").convert("RGB")
    assert picture.width > 7 * 96 and picture.height > 12 * 96
    assert len(picture.getcolors(2**24)) > 1000, "images and no empty sheet"
    auto = ["--data.image_size", "auto", "--data.channels", "auto", "--data.views", "auto"]
    found = views.main([*TINY, *auto, "--data.root", str(images)])
    assert found["image_size"] == 16 and Path("views.png").exists()
    with pytest.raises(UserError, match="nowhere"):
        views.main(["--data.root", "nowhere"])
    with pytest.raises(UserError, match=r"\. is a directory: name a file"):
        views.main([*TINY, "--data.root", str(images), "--output", "."])
    Path("link.png").symlink_to("photo.jpg")
    with pytest.raises(UserError, match="--output link.png leads to .*/photo.jpg: give another"):
        views.main([*TINY, "--data.root", str(images), "--output", "link.png"])
    with pytest.raises(UserError, match="--output photo.jpg: give a name that ends in .png"):
        views.main([*TINY, "--data.root", str(images), "--output", "photo.jpg"])


@pytest.mark.parametrize("pairs", ["", "([0-9])[0-9].jpg"], ids=["one image", "partners"])
def test_pairs_are_those_that_the_encoder_sees(images, pairs):
    data = DataConfig(root=str(images), image_size=16, batch_size=16, mean=[0.5] * 3, std=[0.2] * 3)
    data.pairs = pairs
    seen = PretrainData(data, seed=3, shuffle=False, symmetric=True)
    seen.prepare(torch.device("cpu"))
    rows = [5, 0, 47]
    batch = seen.on_after_batch_transfer(Indices(2, 0, torch.tensor(rows)), 0)
    partners = find_partners(seen.source, data, 3)
    pairs = make_pairs(seen.source, data, 3, [0, 2], rows, partners)
    for place, pair in enumerate(pairs):
        for view, made in zip(batch.query_views, pair.views[2:], strict=True):
            pixels = (view[place] * 0.2 + 0.5).clamp(0, 1) * 255
            # Boxes are cut to 8 bits before the colours, which may stretch a level.
            assert (pixels - made).abs().mean() < 2
    assert [pair.name.split("/")[-1] for pair in pairs] == ["05.jpg", "00.jpg", "47.jpg"]


@pytest.mark.parametrize(
    ("name", "letters", "shown"),
    [
        ("4.16404  train/cat/0001.jpg", 20, "4.16404  at/0001.jpg"),
        ("4.16404  train/cat/0001.jpg", 60, "4.16404  train/cat/0001.jpg"),
        ("train/cat/0001.jpg", 10, "t/0001.jpg"),
        ("4.16404  a.jpg", 3, "4.16404  g"),
    ],
)
def test_a_row_that_is_too_narrow_shortens_the_path_and_never_the_loss(name, letters, shown):
    assert shortened(name, letters) == shown
