"""Questions to features: images like one, near-duplicates, and what cannot be answered."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding import checkpoint, embed
from PIL import Image
from processes import ROOT, finish, start_command

from moco.command.search import main
from moco.config import UserError

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture(scope="module")
def features(tmp_path_factory, images):
    """Write features with an index, of 48 pictures and of a copy of one; return their places."""
    folder = tmp_path_factory.mktemp("search")
    root = shutil.copytree(images, folder / "set")
    shutil.copy(root / "07.jpg", root / "copy <i>\n.jpg")
    embed(checkpoint(folder), root, folder / "out", "--index")
    return folder


def search(folder, *arguments):
    return main(["--index", str(folder / "out"), *map(str, arguments)])


def query(folder, name, *arguments):
    return search(folder, "--query", folder / "set" / name, "--accelerator", "cpu", *arguments)


def test_an_image_of_the_set_is_its_own_nearest(features, said):
    result = query(features, "31.jpg", "--k", 5)
    found = result["neighbours"]
    assert len(found) == 5 and found[0]["path"] == "31.jpg" and found[0]["similarity"] == 1
    cosines = [each["similarity"] for each in found]
    assert cosines == sorted(cosines, reverse=True) and cosines[1] < 1
    assert [line for line in said if line.startswith("  1.0000") and "31.jpg" in line]
    assert json.loads(json.dumps(result)) == result


def test_a_query_is_read_as_the_set_was_though_its_own_values_tell_another_range(
    features, tmp_path
):
    """One file of more than 8 bits, which the sample of the set has not seen."""
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for number in range(200):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / f"set/{number:03d}.png")
    deep = rng.integers(0, 4096, (8, 8)).astype(np.uint16).repeat(5, 0).repeat(5, 1)
    Image.fromarray(deep).save(tmp_path / "set/001.png")
    embed(features / "last.ckpt", tmp_path / "set", tmp_path / "out")
    found = query(tmp_path, "001.png")["neighbours"][0]
    assert (found["path"], found["similarity"]) == ("001.png", 1)


def test_a_label_of_two_lines_stays_in_its_row(features, tmp_path, said):
    for name in ("a\nb", "c"):
        (tmp_path / "set" / name).mkdir(parents=True)
        shutil.copy(features / "set/01.jpg", tmp_path / "set" / name)
    embed(features / "last.ckpt", tmp_path / "set", tmp_path / "out")
    query(tmp_path, "c/01.jpg")
    rows = [line for line in said if line.startswith("  1.0000")]
    assert len(rows) == 2 and all(len(row.splitlines()) == 1 for row in rows)


def test_the_neighbours_are_those_of_the_file(features):
    from embedding import table

    vectors = table(features / "out")["vector"]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    product = units @ units[20]
    found = [each["id"] for each in query(features, "20.jpg")["neighbours"]]
    assert len({*found}) == 10, "and 07.jpg and its copy in either order"
    np.testing.assert_allclose(product[found], np.sort(product)[::-1][:10], atol=1e-6)


def test_pairs_that_are_not_listed_are_said(features, said):
    """Each of 49 images is above 0.01 with 48 others, of which 20 are looked at."""
    result = search(features, "--duplicates", "--above", "0.01", "--output", "all.csv")
    assert result["pairs"] < 49 * 48 // 2 and result["crowded"] == 49
    assert any("49 of them have 20 such partners" in line for line in said)
    said.clear()
    result = search(features, "--duplicates", "--above", "0.9999", "--output", "few.csv")
    assert result["crowded"] == 0 and not any("partners" in line for line in said)


def test_a_copy_is_found_and_drawn(features, said):
    result = query(features, "07.jpg", "--k", 3, "--picture", "sheet.png")
    assert {each["path"] for each in result["neighbours"][:2]} == {"07.jpg", "copy <i>\n.jpg"}
    assert [line for line in said if "copy <i>\\n.jpg" in line], "one line for each image"
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (2 * 6 + 4 * 78, 6 + 90)
        query_cell = sheet.crop((6, 6, 78, 78)).tobytes()
        assert query_cell == sheet.crop((90, 6, 162, 78)).tobytes() != bytes(len(query_cell))


def test_an_image_that_is_gone_is_drawn_grey(features, said):
    shutil.copy(features / "set" / "07.jpg", "query.jpg")
    moved = features / "set" / "07.jpg"
    moved.rename("elsewhere.jpg")
    try:
        search(features, "--query", "query.jpg", "--picture", "sheet.png", "--accelerator", "cpu")
    finally:
        Path("elsewhere.jpg").rename(moved)
    assert any("07.jpg cannot be read" in line for line in said) and Path("sheet.png").is_file()


def test_images_without_files_are_drawn(features):
    last = features / "last.ckpt"
    embed(last, "", "out", "--data.dataset", "digits", "--data.upscale", "2")
    words = ["--index", "out", "--query", str(features / "set" / "07.jpg"), "--k", "2"]
    result = main([*words, "--picture", "sheet.png", "--accelerator", "cpu"])
    assert result["neighbours"][0]["path"].startswith("digits/") and Path("sheet.png").is_file()


def test_near_duplicates_as_csv_and_as_json(features):
    result = search(features, "--duplicates", "--above", "0.9999", "--output", "pairs.csv")
    assert (result["pairs"], result["images"], result["of"]) == (1, 2, 49)
    with open("pairs.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert {row["path"], row["other_path"]} == {"07.jpg", "copy <i>\n.jpg"}
    assert float(row["similarity"]) == 1
    search(features, "--duplicates", "--above", "0.9999", "--output", "pairs.json")
    (same,) = json.loads(Path("pairs.json").read_text(encoding="utf-8"))
    assert {key: str(value) for key, value in same.items()} == {**row, "similarity": "1.0"}
    search(features, "--duplicates", "--above", "1", "--output", "none.json")
    assert len(json.loads(Path("none.json").read_text())) == 1, "a copy has the cosine 1"


def test_no_pair_is_an_empty_list(features, tmp_path):
    (tmp_path / "set").mkdir()
    shutil.copy(features / "set" / "01.jpg", tmp_path / "set")
    embed(features / "last.ckpt", tmp_path / "set", tmp_path / "out")
    search(tmp_path, "--duplicates", "--output", "none.json")
    assert json.loads(Path("none.json").read_text()) == []
    assert search(tmp_path, "--duplicates")["duplicates"] == str(tmp_path / "out/duplicates.csv")


def test_the_encoder_must_be_the_one_that_made_the_features(features):
    (features / "last.ckpt").rename("moved.ckpt")
    try:
        with pytest.raises(UserError, match="made the features and is gone: give --checkpoint"):
            query(features, "01.jpg")
        assert query(features, "01.jpg", "--checkpoint", "moved.ckpt")["neighbours"]
        state = torch.load("moved.ckpt", weights_only=True)
        state["state_dict"]["query_encoder.backbone.conv1.weight"][0] += 1
        torch.save(state, "other.ckpt")
        with pytest.raises(UserError, match="other.ckpt is not the encoder that made these"):
            query(features, "01.jpg", "--checkpoint", "other.ckpt")
    finally:
        Path("moved.ckpt").rename(features / "last.ckpt")


def test_settings_that_do_nothing_are_said(features, said):
    search(features, "--duplicates", "--k", "3", "--output", "pairs.csv")
    assert any("do nothing here: k (there is no query)" in line for line in said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --query IMAGE"),
        (["--duplicates", "--query", "text"], "give one of --query IMAGE"),
        (["--query", "absent.jpg"], "--query absent.jpg is no file"),
        (["--query", "text"], "text cannot be read"),
        (["--query", "text", "--k", "0"], "k is 0: it must be at least 1"),
        (["--query", "text", "--picture", "no/sheet.png"], "no is no directory to write in"),
        (["--query", "text", "--picture", "."], "a directory: name a file"),
        (["--query", "text.png", "--picture", "photo.jpg"], "a name that ends in .png"),
        (["--query", "text.png", "--picture", "./text.png"], "is the image of --query"),
        (["--duplicates", "--output", "pipe.csv"], "--output pipe.csv is no regular file"),
        (["--duplicates", "--output", "features/features.parquet"], "ends in .csv or .json"),
        (["--duplicates", "--output", "."], "a directory: name a file"),
        (["--duplicates", "--above", "1.5"], "above is 1.5: it must be at most 1"),
        (["--duplicates", "--output", "pairs.txt"], "a name that ends in .csv or .json"),
        (["--duplicates", "--index", "absent"], "absent holds no features.parquet"),
    ],
)
def test_wrong_input(features, words, message):
    for name in ("text", "text.png"):
        Path(name).write_text("no image")
    os.mkfifo("pipe.csv")
    with pytest.raises(UserError, match=message):
        search(features, "--accelerator", "cpu", *words)


def test_near_duplicates_and_a_choice_need_no_torch(features):
    code = (
        "import sys\nfrom importlib import import_module\n"
        "for name, words in (('search', ['--duplicates']), ('select', ['--count', '3'])):\n"
        "    main = import_module(f'moco.command.{name}').main\n"
        "    assert main(['--index', sys.argv[1], *words])\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended, _, err = finish(start_command("-c", code, str(features / "out"), cwd=ROOT))
    assert ended == 0, err
