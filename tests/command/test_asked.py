"""embed, quality, search, select and report from Python: plain values, and one line where wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from door import PIXELS, TINY, pretrain
from pictures import write_pictures
from PIL import Image
from torch import nn

import moco

CPU = {"accelerator": "cpu"}


class Rows(nn.Module):
    """Weighs the rows of an image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 16, 1))

    def forward(self, images):
        return (images * self.weight).mean(3).flatten(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of 40 pictures, and what a run of one step on it has left."""
    folder = tmp_path_factory.mktemp("asked")
    names = [f"{i:02d}.png" for i in range(40)]
    write_pictures(folder / "images", names, np.random.default_rng(0))
    settings = {"trainer.max_steps": 1, "run.report": True}
    return folder, pretrain(folder / "images", folder / "run", **settings)


def test_a_run_tells_where_its_page_is_and_report_makes_it_again(made, tmp_path):
    folder, run = made
    assert run.report == run.metrics["report"] == str(folder / "run" / "report.html")
    told = moco.report([run, folder / "run"], output=tmp_path / "two.html", images=8)
    assert told["report"] == str(tmp_path / "two.html") and len(told["images"]) == 2
    assert moco.report(run, output=tmp_path / "one.html")["images"] == [40]
    with pytest.raises(moco.UserError, match="none is no directory"):
        moco.report("none")


def test_features_are_written_searched_and_chosen_from(made, tmp_path):
    folder, run = made
    told = moco.embed(run, folder / "images", tmp_path / "set", index=True, **CPU)
    assert (told["images"], told["unread"]) == (40, 0) and Path(told["index"]).is_file()
    image = folder / "images" / "07.png"
    found = moco.search(tmp_path / "set", image, k=3, **CPU)["neighbours"]
    assert [found[0]["path"], len(found)] == ["07.png", 3] and found[0]["similarity"] > 0.999
    pairs = moco.search(tmp_path / "set", duplicates=True, output=tmp_path / "pairs.csv")
    assert Path(pairs["duplicates"]).is_file()
    chosen = moco.select(tmp_path / "set", 4, output=tmp_path / "first.csv")
    assert chosen["count"] == len(chosen["first"]) == 4
    json.dumps([told, found, pairs, chosen])  # plain values


def test_an_image_of_python_finds_what_its_file_finds(made, tmp_path, said):
    folder, run = made
    moco.embed(run, folder / "images", tmp_path / "set", index=True, **CPU)
    path = folder / "images" / "07.png"
    wanted = moco.search(tmp_path / "set", path, k=3, picture=tmp_path / "a.png", **CPU)
    picture = Image.open(path)
    array = np.asarray(picture)
    for given in (picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        found = moco.search(tmp_path / "set", given, k=3, picture=tmp_path / "b.png", **CPU)
        assert found["neighbours"] == wanted["neighbours"] and found["query"] == "own"
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not any("do nothing here" in line for line in said)
    with pytest.raises(moco.UserError, match=r"item 0 cannot be read: has the shape \(2"):
        moco.search(tmp_path / "set", np.stack([array] * 2), **CPU)


def test_values_of_python_find_what_their_file_finds_in_the_range_of_the_features(made, tmp_path):
    values = PIXELS.astype(np.float32) * 16
    (tmp_path / "files").mkdir()
    np.save(tmp_path / "files" / "a.npy", values[3] / 8)
    run = pretrain(values, tmp_path / "run", **{"trainer.max_steps": 1})
    for checkpoint, name in ((run, "own"), (made[1], "auto")):  # the other knows no range
        moco.embed(checkpoint, values, tmp_path / name, index=True, **CPU)
        wanted = moco.search(tmp_path / name, tmp_path / "files" / "a.npy", k=3, **CPU)
        for given in (values[3] / 8, torch.from_numpy(values[3] / 8)):
            found = moco.search(tmp_path / name, given, k=3, **CPU)
            assert found["neighbours"] == wanted["neighbours"]
        itself = moco.search(tmp_path / name, values[3], k=1, **CPU)["neighbours"][0]
        assert itself["path"] == "own/000003" and itself["similarity"] > 0.999


def test_a_query_of_another_range_than_the_features_is_told(made, tmp_path, said):
    deep = PIXELS.astype(np.float32) * 16
    run = pretrain(deep, tmp_path / "run", **{"trainer.max_steps": 1})
    moco.embed(run, deep, tmp_path / "deep", index=True, **CPU)
    for line, given in {
        "float64 values of 0 to 0.99.*, of which 0 to 4095, .* leaves 0 alone": PIXELS[3] / 255,
        "of -.* leaves 0 and 255 alone: scale it": (deep[3] - 1000) * 1e6,
        "query holds no number among its float32 values": deep[3] * np.nan,
    }.items():
        with pytest.raises(moco.UserError, match=line):
            moco.search(tmp_path / "deep", given, **CPU)
    found = moco.search(tmp_path / "deep", PIXELS[3], k=1, **CPU)["neighbours"][0]
    assert found["path"] == "own/000003"
    moco.search(tmp_path / "deep", deep[3] * 2, **CPU)
    assert any("% of which lie outside of 0 to 4095, the range of the" in line for line in said)
    assert moco.search(tmp_path / "deep", deep[3] * 0 + 9, k=1, **CPU)["neighbours"]  # blank


def test_floats_find_what_their_bytes_find_among_files_of_8_bits(made, tmp_path, said):
    folder, run = made
    moco.embed(run, folder / "images", tmp_path / "set", index=True, **CPU)
    array = np.asarray(Image.open(folder / "images" / "07.png"))
    wanted = moco.search(tmp_path / "set", array, k=3, **CPU)
    said.clear()
    found = moco.search(tmp_path / "set", torch.from_numpy(array / 255), k=3, **CPU)
    assert found["neighbours"] == wanted["neighbours"]
    assert sum(line.startswith("values: 0 becomes 0 and 1 becomes 255 (auto") for line in said) == 1


def test_images_and_a_module_of_python_are_embedded_and_measured(made, tmp_path):
    run = made[1]
    told = moco.embed(run, PIXELS, tmp_path / "pixels", **CPU)
    assert told["images"] == len(PIXELS) and moco.embed(run, PIXELS, tmp_path / "pixels", **CPU)
    with pytest.raises(moco.UserError, match="is of other features"):
        moco.embed(run, 255 - PIXELS, tmp_path / "pixels", **CPU)
    usual = {n: v for n, v in TINY.items() if n not in ("model.stem", "model.width")}
    own = {**usual, "trainer.max_steps": 1, "run.report": False}
    own.pop("model.backbone")
    other = moco.pretrain(PIXELS, backbone=Rows(), dir=tmp_path / "own", **own)
    told = moco.embed(other, PIXELS, tmp_path / "rows", backbone=Rows(), **CPU)
    assert told["shape"] == [48]
    with pytest.raises(moco.UserError, match="backbone=module"):
        moco.search(tmp_path / "rows", PIXELS[5], **CPU)
    found = moco.search(tmp_path / "rows", PIXELS[5], backbone=Rows(), k=1, **CPU)
    (nearest,) = found["neighbours"]
    assert nearest["id"] == 5 and nearest["similarity"] > 0.999
    found = moco.quality(other, PIXELS, backbone=Rows(), count=40, views=2, **CPU)
    assert found["images"] == 40 and found["backbone"]["rankme"] >= 1


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda run, at: moco.search(at, [PIXELS[0]]),
            "query is a list: give the path of an .*, a PIL",
        ),
        (lambda run, at: moco.search(at), "give one of --query IMAGE"),
        (lambda run, at: moco.select(at, 0), "count is 0: it must be at least 1"),
        (lambda run, at: moco.embed(run, PIXELS, at, dtyp="float16"), "unknown option --dtyp"),
        (lambda run, at: moco.embed(run, PIXELS > 9, at, **CPU), "images holds bool values"),
        (lambda run, at: moco.quality(run, views=3), "views is 3: give an even number"),
    ],
)
def test_wrong_use_is_one_line(call, line, made, tmp_path):
    with pytest.raises(moco.UserError, match=line) as error:
        call(made[1], tmp_path / "set")
    assert "\n" not in str(error.value)


def test_images_that_came_from_python_are_asked_for_again(tmp_path):
    settings = {"trainer.max_steps": 1, "run.report": False}
    run = pretrain(PIXELS, tmp_path / "run", **settings)
    with pytest.raises(moco.UserError, match="came from Python: give them again"):
        moco.embed(run, None, tmp_path / "set", **CPU)
    with pytest.raises(moco.UserError, match="images come from Python: give them"):
        moco.quality(run, **CPU)
