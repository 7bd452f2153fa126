"""Features of any images: the same bits as elsewhere, whole files, and runs that go on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding import FAST, SIZE, Stopped, embed, stop, table
from networks import SMALL, save_ours
from pictures import write_pictures
from PIL import Image
from processes import ROOT, finish, start_command

import moco
from moco.command.embed import main
from moco.command.search import main as search
from moco.config import DataConfig, RunError, UserError
from moco.images.labelled import LabelledData
from moco.images.sources import open_source
from moco.reports.listing import list_images_of

pytestmark = pytest.mark.usefixtures("in_tmp")


def expected(ckpt, root, batch_size=256):
    """Features and rows of a folder's images by `moco.extract_features`."""
    data = DataConfig(root=str(root), image_size=SIZE, num_workers=0, max_bad_fraction=1.0)
    images = LabelledData(open_source(data, "train"), data)
    batches = images.batches(torch.device("cpu"), batch_size)
    return moco.extract_features(moco.load_backbone(ckpt), batches)


def test_features_equal_those_of_extract_features_bit_for_bit(ckpt, images):
    result = embed(ckpt, images, "out")
    found = table("out")
    assert result["images"] == 48 and result["features"] == "out/features.parquet"
    assert np.array_equal(found["vector"].astype(np.float32), expected(ckpt, images)[0].numpy())
    assert found["id"] == list(range(48))
    assert found["path"] == sorted(path.name for path in images.iterdir())
    assert "label" not in found and "split" not in found, "a flat folder has none"
    assert [path.name for path in Path("out").iterdir()] == ["features.parquet"]


def test_the_file_says_what_made_it(ckpt, images):
    result = embed(ckpt, images, "out")
    schema = pq.read_schema("out/features.parquet")
    about = json.loads(schema.metadata[b"moco"])
    assert schema.field("vector").type == pa.list_(pa.float32(), 128)
    assert about["checkpoint"] == str(ckpt) and about["data_root"] == str(images)
    assert about["backbone_sha256"] == result["backbone_sha256"] and about["shape"] == [128]
    assert about["preparation"]["image_size"] == SIZE and about["preparation"]["steps"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_others_read_the_file(ckpt, images, dtype):
    embed(ckpt, images, "out", "--dtype", dtype)
    vectors = expected(ckpt, images)[0].numpy().astype(dtype)
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet("out/features.parquet")
    assert frame["id"].dtype == np.int64 and np.array_equal(np.stack(frame["vector"]), vectors)
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql("SELECT path, vector FROM 'out/features.parquet' ORDER BY id").fetchall()
    assert [path for path, _ in rows] == frame["path"].tolist()
    assert np.array_equal(np.array([vector for _, vector in rows], dtype), vectors)


def test_labels_and_splits_are_those_of_the_folders(ckpt, tmp_path):
    rng = np.random.default_rng(0)
    for place in ("train/cat", "train/dog", "test/cat", "other"):
        write_pictures(tmp_path / "set" / place, ["1.png"], rng)
    embed(ckpt, tmp_path / "set", "out")
    found = table("out")
    assert found["path"] == ["other/1.png", "test/cat/1.png", "train/cat/1.png", "train/dog/1.png"]
    assert found["split"] == [None, "test", "train", "train"]
    assert found["label"] == [None, "cat", "cat", "dog"]
    table_of_labels = "path,label,split\ntrain/cat/1.png,puma,train\ntest/cat/1.png,lynx,test\n"
    Path("labels.csv").write_text(table_of_labels)
    embed(ckpt, tmp_path / "set", "named", "--data.labels", "labels.csv")
    assert table("named")["label"] == [None, "lynx", "puma", None]
    assert table("named")["split"] == [None, "test", "train", "train"]


def test_splits_of_a_table_are_its_own_words(tmp_path):
    """Though a run calls what is held out its test images, and trains on what is not named."""
    names = [f"{n}.png" for n in range(4)]
    write_pictures(tmp_path / "set", names, np.random.default_rng(0))
    data = DataConfig(dataset="folder", root=str(tmp_path / "set"), channels=3, image_size=16)
    data.labels = str(tmp_path / "labels.csv")
    for words, splits in (
        (("train", "val", "test"), ["train", "val", "test", "train"]),
        (("train", "", ""), ["train"] * 4),
    ):
        rows = [f"{name},{'' if word == 'test' else 'cat'},{word}"
                for name, word in zip(names, words, strict=False)]  # fmt: skip
        absent = "gone.png,dog,test"
        (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows, absent]))
        assert list_images_of(data).splits == splits


def test_a_data_set_that_has_no_files(ckpt):
    embed(ckpt, "", "out", "--data.dataset", "digits", "--data.upscale", "2")
    found = table("out")
    assert len(found["id"]) == 1797 and found["split"].count("test") == 540
    assert found["path"][0] == "digits/train/000000" and {*found["label"]} == {*"0123456789"}


def test_a_run_on_images_from_python_embeds_no_other_images(images, monkeypatch):
    """Its data root is empty, which would mean the working directory."""
    monkeypatch.chdir(images)
    data = DataConfig(dataset="own", root="", channels=3, image_size=32)
    with pytest.raises(UserError, match="these images came from Python: give them again"):
        list_images_of(data)


@pytest.mark.parametrize("dataset", ["shards", "parquet"])
def test_shards_are_refused_as_such_and_not_as_a_folder_without_images(dataset, tmp_path):
    data = DataConfig(dataset=dataset, root=str(tmp_path), channels=3, image_size=32)
    with pytest.raises(UserError, match=f"dataset is {dataset}, and embed reads files: name a"):
        list_images_of(data)


def test_images_named_on_the_command_line_are_not_the_run_s(ckpt, images):
    """The checkpoint is of digits: the folder is read all the same, and nothing is called idle."""
    embed(ckpt, images, "out")
    about = json.loads(pq.read_schema("out/features.parquet").metadata[b"moco"])
    assert about["data"]["dataset"] == "folder" and about["data"]["root"] == str(images)


def test_settings_that_do_nothing_are_said(ckpt, images, said):
    embed(ckpt, images, "out", "--data.resident", "memory", "--data.flip", "0.2")
    (line,) = [line for line in said if "do nothing" in line]
    assert "data.resident (" in line and "data.flip (" in line and "data.root" not in line


def test_embeddings_of_the_head(ckpt, images):
    result = embed(ckpt, images, "out", "--features", "head", "--encoder", "key")
    assert result["shape"] == [16]
    from moco.checkpoints.load import load_encoder

    loaded = load_encoder(ckpt, "key")
    features, _ = expected(ckpt, images)
    assert not np.allclose(table("out")["vector"], loaded.head(features).detach().numpy())
    network = torch.nn.Sequential(loaded.backbone, loaded.head)
    data = DataConfig(root=str(images), image_size=SIZE, num_workers=0)
    batches = LabelledData(open_source(data, "train"), data).batches(torch.device("cpu"))
    wanted, _ = moco.extract_features(network, batches)
    assert np.array_equal(table("out")["vector"].astype(np.float32), wanted.numpy())


def test_maps_have_the_mean_that_pooling_gives(ckpt, images):
    result = embed(ckpt, images, "out", "--features", "patch")
    assert result["shape"] == [128, 2, 2]
    maps = table("out")["vector"].reshape(-1, 128, 2, 2)
    wanted = expected(ckpt, images)[0].numpy()
    np.testing.assert_allclose(maps.mean((2, 3)), wanted, rtol=1e-4, atol=1e-5)


def test_maps_of_a_vit_are_its_tokens_in_rows(tmp_path, images):
    from networks import VIT

    save_ours(tmp_path / "vit.ckpt", replace(VIT, backbone="vit_tiny_patch16_224", depth=1,
              num_heads=4, width=1 / 8, patch_size=4), 3, SIZE)  # fmt: skip
    result = embed(tmp_path / "vit.ckpt", images, "out", "--features", "patch")
    assert result["shape"] == [24, 4, 4]


@pytest.mark.parametrize("more", ["--index", "--map"])
def test_maps_are_not_searched(ckpt, images, more):
    with pytest.raises(UserError, match=f"{more} takes one vector for each image"):
        embed(ckpt, images, "out", "--features", "patch", more)


def test_finished_features_are_left_alone_and_others_refused(ckpt, images, said):
    embed(ckpt, images, "out")
    before = Path("out/features.parquet").stat().st_mtime_ns
    assert embed(ckpt, images, "out")["images"] == 48
    assert Path("out/features.parquet").stat().st_mtime_ns == before
    assert "out/features.parquet holds these features already" in said
    with pytest.raises(UserError, match="is of other features .* or give --overwrite"):
        embed(ckpt, images, "out", "--features", "head")
    assert table("out")["vector"].shape == (48, 128)
    embed(ckpt, images, "out", "--features", "head", "--overwrite")
    assert table("out")["vector"].shape == (48, 16)


def test_what_can_be_read_by_now_gets_features(ckpt, images, said):
    """Nothing but what is able to read has changed: a limit here, else a package."""
    root = shutil.copytree(images, "set")
    write_pictures(Path(root), ["big.png"], np.random.default_rng(0), size=(60, 60))
    words = [ckpt, root, "out", "--data.max_bad_fraction", "1", "--data.max_pixels"]
    for _ in range(2):
        assert embed(*words, "2000")["unread"] == 1
    assert "out/features.parquet holds these features already" in said
    assert embed(*words, "4000") | {"seconds": 0} == embed(*words, "4000") | {"seconds": 0}
    assert "1 of 1 images without features can be read now: computing anew" in said
    assert "big.png" in table("out")["path"] and not Path("out/bad_files.txt").exists()


def test_features_of_a_file_that_was_replaced_are_refused(ckpt, images, tmp_path):
    root = shutil.copytree(images, tmp_path / "set")
    embed(ckpt, root, "out")
    shutil.copyfile(root / "01.jpg", root / "00.jpg")
    with pytest.raises(UserError, match="is of other features .* changed images"):
        embed(ckpt, root, "out")
    embed(ckpt, root, "out", "--overwrite")
    first, second = table("out")["vector"][:2]
    assert (first == second).all()


def test_an_index_of_features_that_were_removed_is_not_kept(ckpt, images, tmp_path):
    embed(ckpt, images, "out", "--index")
    before = Path("out/features.faiss").read_bytes()
    embed(ckpt, images, "out", "--index")
    Path("out/features.parquet").unlink()
    embed(ckpt, images, "out", "--encoder", "key", "--index")
    assert Path("out/features.faiss").read_bytes() != before


def test_other_labels_and_another_head_are_other_features(ckpt, images):
    """They change the file, though neither the backbone nor the images differ."""
    embed(ckpt, images, "out")
    Path("labels.csv").write_text("path,label\n00.jpg,a\n01.jpg,b\n")
    with pytest.raises(UserError, match="is of other features"):
        embed(ckpt, images, "out", "--data.labels", "labels.csv")
    embed(ckpt, images, "out", "--data.labels", "labels.csv", "--overwrite")
    assert table("out")["label"][:3] == ["a", "b", None]
    embed(ckpt, images, "head", "--features", "head")
    state = torch.load(ckpt, weights_only=True)
    for name, value in state["state_dict"].items():
        if name.startswith("query_encoder.head"):
            value += 1
    torch.save(state, "other.ckpt")
    with pytest.raises(UserError, match="is of other features"):
        embed("other.ckpt", images, "head", "--features", "head")
    query = ["--index", "head", "--query", str(images / "00.jpg"), "--accelerator", "cpu"]
    assert search(query)["neighbours"][0]["path"] == "00.jpg"
    with pytest.raises(UserError, match="other.ckpt is not the encoder that made these"):
        search([*query, "--checkpoint", "other.ckpt"])


def test_bad_files_are_named_and_left_out(ckpt, copied, small_parts, monkeypatch, said):
    (copied / "03.jpg").write_bytes(b"no image")
    (copied / "40.jpg").write_bytes(b"neither")
    with pytest.raises(UserError, match="2 of 48 images .*03.jpg: .*data.max_bad_fraction"):
        embed(ckpt, copied, "out")
    assert not Path("out/features.parquet").exists()
    share = ("--data.max_bad_fraction", "0.1")
    with monkeypatch.context() as patch:
        patch.setattr("moco.reports.embed.join", stop)
        with pytest.raises(Stopped):
            embed(ckpt, copied, "out", *share)
    said.clear()
    result = embed(ckpt, copied, "out", *share)
    assert any("03.jpg" in line and "40.jpg" in line for line in said), "told again when it goes on"
    found = table("out")
    assert (result["images"], result["unread"]) == (46, 2) and found["id"] == list(range(46))
    assert "03.jpg" not in found["path"] and "40.jpg" not in found["path"]
    wanted, _ = expected(ckpt, copied, batch_size=8)
    assert np.array_equal(found["vector"].astype(np.float32), wanted.numpy())
    listed = Path("out/bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0][-6:] for line in listed] == ["03.jpg", "40.jpg"]


HOSTILE = [
    b"<script>alert(1)</script>.png".replace(b"/", b"\xe2\x81\x84"),
    b"new\nline.png",
    b"latin\xe9.png",
    b'quote",comma.png',
    b"tab\tand $HOME `ls`.png",
]


def test_names_of_any_bytes(ckpt, tmp_path):
    folder = tmp_path / "set" / "<b>class"
    write_pictures(folder, ["1.png"], np.random.default_rng(0))
    for name in HOSTILE:
        shutil.copy(folder / "1.png", os.path.join(os.fsencode(folder), name))
    other = os.path.join(os.fsencode(tmp_path / "set"), b"caf\xe9")
    os.mkdir(other)
    shutil.copy(folder / "1.png", os.path.join(other, b"1.png"))
    embed(ckpt, tmp_path / "set", "out", "--index")
    found = table("out")
    assert len(found["path"]) == len(HOSTILE) + 2
    assert {*found["label"]} == {"<b>class", "caf\\xe9"}
    assert {name.partition(b"/")[2] for name in found["path_bytes"]} == {b"1.png", *HOSTILE}
    assert "<b>class/latin\\xe9.png" in found["path"] and "<b>class/new\nline.png" in found["path"]
    from moco.reports.table import Features

    assert all(map(os.path.isfile, Features("out").files(found["id"])))


def test_one_image_and_images_without_a_difference(ckpt, tmp_path):
    for count in (1, 2, 30):
        folder = tmp_path / f"set{count}"
        folder.mkdir()
        for number in range(count):
            Image.new("RGB", (20, 20), "red").save(folder / f"{number}.png")
        embed(ckpt, folder, f"out{count}", "--index", "--map")
        found = table(f"out{count}")
        assert found["x"] == [0] * count and found["y"] == [0] * count
        most = min(count - 1, 15)
        assert [len(each["ids"]) for each in found["neighbors"]] == [most] * count


def test_features_that_are_no_numbers_are_one_line(ckpt, images):
    state = torch.load(ckpt, weights_only=True)
    state["state_dict"]["query_encoder.backbone.layer4.1.bn2.weight"][3] = float("nan")
    torch.save(state, "nan.ckpt")
    with pytest.raises(UserError, match="features hold NaN or infinity in 48 of 48 rows"):
        embed(Path("nan.ckpt"), images, "out")
    assert not Path("out/features.parquet").exists()


def test_features_beyond_float16(ckpt, images):
    state = torch.load(ckpt, weights_only=True)
    state["state_dict"]["query_encoder.backbone.layer4.1.bn2.bias"][3] = 1e6
    torch.save(state, "large.ckpt")
    with pytest.raises(UserError, match="beyond float16's 65504: take --dtype float32"):
        embed(Path("large.ckpt"), images, "out", "--dtype", "float16")


def test_a_map_as_embedding_atlas_reads_it(ckpt, images):
    embed(ckpt, images, "out")
    plain = table("out")["vector"]
    embed(ckpt, images, "out", "--map")
    found = table("out")
    assert np.array_equal(found["vector"], plain) and found["id"] == list(range(48))
    points = np.array([found["x"], found["y"]])
    assert np.isfinite(points).all() and points.std(1).min() > 0
    units = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    distances = 1 - units @ units.T
    np.fill_diagonal(distances, np.inf)
    for row, each in enumerate(found["neighbors"]):
        assert each.keys() == {"ids", "distances"} and len(each["ids"]) == 15
        np.testing.assert_allclose(each["distances"], np.sort(distances[row])[:15], atol=1e-5)
        np.testing.assert_allclose(distances[row][each["ids"]], each["distances"], atol=1e-5)


def test_a_full_disk_is_one_line_and_leaves_no_file(ckpt, images, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moco.reports.table.os.fsync", full)
    with pytest.raises(RunError, match="No space left on device; make room, and give the command"):
        embed(ckpt, images, "out")
    assert [path.name for path in Path("out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "absent.ckpt"], "absent.ckpt does not exist"),
        (["--data.root", "absent"], "data.root 'absent' does not exist"),
        (["--output", "text/out"], "text is no directory to write in"),
        (["--features", "heads"], "features"),
        (["--dtype", "float64"], "dtype"),
        (["--devices", "1025"], "devices is 1025: it must be at most 1024"),
        (["--stem_padding", "4"], "stem_padding is 4: it must be at most 3"),
        (["--num_heads", "1025"], "num_heads is 1025"),
        (["--data.views", "v3"], "data.views is a setting of pretraining"),
        (["--data.image_size", "auto"], "data.image_size is auto"),
        (["--backbone", "resnet51"], "did you mean"),
    ],
)
def test_wrong_input(ckpt, images, words, message):
    Path("text").write_text("")
    usual = ["--checkpoint", str(ckpt), "--output", "out", "--data.root", str(images), *FAST]
    with pytest.raises(UserError, match=message):
        main([*usual, *words])


def test_a_missing_package_is_named(ckpt, images, monkeypatch):
    monkeypatch.setattr("moco.command.early.find_spec", lambda name: None)
    with pytest.raises(UserError, match="embed needs pyarrow: pip install pyarrow"):
        embed(ckpt, images, "out")


def test_wrong_input_is_told_before_torch_is_imported(ckpt, images):
    words = ["--checkpoint", str(ckpt), "--output", "out", "--data.root", "absent"]
    code = (
        "import json, sys\nfrom moco.command.embed import main\n"
        "from moco.config import UserError\n"
        "try: main(json.loads(sys.argv[1]))\n"
        "except UserError as error: assert 'does not exist' in str(error), error\n"
        "else: raise AssertionError\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended, _, err = finish(start_command("-c", code, json.dumps(words), cwd=ROOT))
    assert ended == 0, err


def test_small_images_are_refused_as_elsewhere(ckpt, tmp_path):
    write_pictures(tmp_path / "set", ["1.png"], np.random.default_rng(0), size=(8, 8))
    with pytest.raises(UserError, match="data.image_size 16 is above the images' 8 pixels"):
        embed(ckpt, tmp_path / "set", "out")


def test_a_file_without_heads(tmp_path, images):
    save_ours(tmp_path / "last.ckpt", SMALL, 3, SIZE)
    state = torch.load("last.ckpt", weights_only=True)["state_dict"]
    start = "query_encoder.backbone."
    plain = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
    torch.save(plain, "plain.pth")
    size = ("--data.image_size", str(SIZE))
    with pytest.raises(UserError, match="holds no projection head"):
        embed(Path("plain.pth"), images, "out", "--features", "head", "--stem_padding", "1", *size)
    embed(Path("plain.pth"), images, "out", "--stem_padding", "1", *size)
    embed(Path("last.ckpt"), images, "ours")
    assert np.array_equal(table("out")["vector"], table("ours")["vector"])
