"""Sets of shards: what is read from them, their labels, their order in a run, what goes wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_classes, write_pictures
from PIL import Image
from test_formats import write_dicom

from moco.config import DataConfig, RunError, UserError
from moco.images import shard_headers, shard_index, sources
from moco.images.decode import decode
from moco.images.labelled import open_data
from moco.images.loader import PretrainData
from moco.images.packing import pack
from moco.images.patterns import expand_braces, find_shards
from moco.images.steps import StepLoader
from moco.run_directory import same_images

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def said(caplog):
    """Collect the lines that are logged."""
    caplog.set_level("INFO", logger="moco")
    return caplog


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The same as shards of some images each."""
    out = tmp_path_factory.mktemp("packed") / "set"
    pack(str(folder), str(out), 0.006)
    return out


def make_data(root, **changes) -> PretrainData:
    config = DataConfig(
        **{"dataset": "shards", "root": str(root), "image_size": 16, "batch_size": 8}
        | {"num_workers": 0, "streams": 4, "window": 4}
        | changes
    )
    data = PretrainData(config, seed=3, shuffle=False, symmetric=False)
    data.prepare(CPU)
    return data


def take(data, position=0):
    loader = StepLoader(data, lambda: position)
    try:
        return list(loader)
    finally:
        loader.close()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return path


def png(value: int, size=(20, 24)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


# Packing


def test_a_folder_becomes_shards_with_its_splits_labels_and_bytes(folder, packed):
    names = sorted(path.name for path in packed.iterdir())
    assert names[0] == "test-00000.tar" and names[-1].startswith("train-0000")
    assert sum(name.startswith("train") for name in names) > 4
    bank, queries = sources.open_labelled(DataConfig(dataset="shards", root=str(packed)))
    assert (len(bank), len(queries)) == (40, 10)
    assert bank.classes == queries.classes == ["cat", "dog"]
    for source, split in ((bank, "train"), (queries, "test")):
        files = {path.read_bytes(): path.parent.name for path in (folder / split).rglob("*.png")}
        found = {source.paths[row].content(True): source.labels[row] for row in range(len(source))}
        assert found.keys() == files.keys()
        assert all(source.classes[found[content]] == files[content] for content in files)
    mixed = bank.labels[: bank.paths.counts[0]].tolist()
    assert {*mixed} == {0, 1}, "a shard holds all classes"


@pytest.mark.parametrize(
    ("tops", "name"),
    [
        (("seg_train", "seg_test"), "test"),
        (("train/images", "test/images"), "test"),
        (("train2017", "val2017"), "val2017"),
        (("Training", "Testing"), "testing"),
    ],
)
def test_what_is_held_out_stays_so_in_shards(folder, tmp_path, tops, name):
    for split, top in zip(("train", "test"), tops, strict=True):
        shutil.copytree(folder / split, tmp_path / "in" / top)
    pack(str(tmp_path / "in"), str(tmp_path / "out"), 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train-00000.tar", f"{name}-00000.tar"
    }  # fmt: skip
    pair = sources.open_labelled(DataConfig(dataset="shards", root=str(tmp_path / "out")))
    assert [len(part) for part in pair] == [40, 10]


def test_files_of_several_frames_are_refused_and_none_is_lost(tmp_path):
    pytest.importorskip("pydicom")
    (tmp_path / "in").mkdir()
    write_dicom(tmp_path / "in/a.dcm", np.zeros((3, 12, 10), np.uint8))
    with pytest.raises(UserError, match=r"a.dcm has several frames, .*files of their own"):
        pack(str(tmp_path / "in"), str(tmp_path / "out"), 1)
    assert not (tmp_path / "out").exists()


def test_equal_folders_make_equal_shards(folder, packed, tmp_path):
    pack(str(folder), str(tmp_path / "again"), 0.006)
    for path in packed.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_shards_are_whole_or_absent(folder, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
        patch.setattr(Path, "read_bytes", full)
        pack(str(folder), str(tmp_path / "out"), 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        pack(str(folder), str(tmp_path / "out"), 1)


# What is read


def test_every_format_is_read_from_a_shard_as_from_a_file(tmp_path):
    tifffile, pydicom = pytest.importorskip("tifffile"), pytest.importorskip("pydicom")
    rng = np.random.default_rng(0)
    folder = tmp_path / "files"
    write_pictures(folder, ["a.jpg", "b.png", "c.webp", "d.tif"], rng)
    np.save(folder / "e.npy", rng.integers(0, 4096, (20, 20, 3), dtype=np.uint16))
    tifffile.imwrite(folder / "f.tif", rng.integers(0, 4096, (20, 20), dtype=np.uint16))
    tifffile.imwrite(folder / "g.tif", rng.random((3, 20, 20), dtype=np.float32) * 4096, imagej=1)
    example = pydicom.examples.get_path("ct")
    (folder / "h.dcm").write_bytes(example.read_bytes())
    files = sorted(folder.iterdir())
    write_tar(tmp_path / "x.tar", {path.name: path.read_bytes() for path in files})
    source = sources.open_source(
        DataConfig(dataset="shards", root=str(tmp_path / "x.tar"), min_value=0, max_value=4095),
        "train",
    )
    assert len(source) == len(files) == 8
    for row, path in enumerate(files):
        assert source.read(row).equal(decode(str(path), 3, source.reading)), path.name
        assert source.paths[row] == f"{tmp_path}/x.tar#{path.name}"


def test_labels_of_cls_and_json_and_none(tmp_path):
    texts = [{"cls": None, "label": 3}, {"class_name": "dog"}, {"caption": "a dog"}, ["no mapping"]]
    members = {}
    for number, text in enumerate(texts):
        members[f"d/{number}.png"] = png(number)
        members[f"d/{number}.json"] = json.dumps(text).encode()
    members |= {"d/4.cls": b"cat\n", "d/4.seg.png": png(9), "d/4.jpg": png(4)}
    members |= {"d/5.png": png(5), "d/5.json": b"broken", "d/.hidden.png": png(6), "d/x.txt": b""}
    write_tar(tmp_path / "x.tar", members)
    source = sources.open_source(DataConfig(dataset="shards", root=str(tmp_path)), "train")
    assert source.paths.labels() == ["3", "dog", None, None, "cat", None]
    assert source.paths[4].endswith("x.tar#d/4.seg.png"), "the first image of a key counts"


def test_evaluation_reads_shards_as_a_folder(folder, packed):
    found = {}
    for dataset, root in (("folder", folder), ("shards", packed)):
        config = DataConfig(dataset=dataset, root=str(root), image_size=16, num_workers=0)
        for part, source in zip("bq", sources.open_labelled(config), strict=True):
            data = open_data(source, config, CPU, None)
            images, rows = (torch.cat(x) for x in zip(*data.batches(CPU, 7), strict=True))
            order = images.flatten(1).sum(1).sort().indices
            found[dataset, part] = images[order], data.labels(rows)[order]
    for part in "bq":
        (a, first), (b, second) = found["folder", part], found["shards", part]
        assert first.equal(second) and (a - b).abs().mean() < 0.02


def test_parquet_as_hugging_face_writes_it(folder, tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    files = sorted((folder / "train").rglob("*.png"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    for split, some in (("train", files), ("test", files[::5])):
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in some],
            "label": [int(path.parent.name == "dog") for path in some],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet", batch_size=16)
    config = DataConfig(dataset="parquet", root=str(tmp_path))
    bank, queries = sources.open_labelled(config)
    assert (len(bank), len(queries), bank.classes) == (40, 8, ["cat", "dog"])
    for row, path in enumerate(files):
        assert bank.read(row).equal(decode(str(path), 3))
        assert bank.classes[bank.labels[row]] == path.parent.name
    [unpacked] = [path for path in cache.iterdir() if "-" in path.name]
    whole = unpacked.read_bytes()
    unpacked.write_bytes(whole[:100])  # as after a crash of the machine
    bank, _ = sources.open_labelled(config)
    assert bank.read(3).equal(decode(str(files[3]), 3)) and unpacked.read_bytes() == whole


def test_parquet_of_paths_alone_is_one_line(tmp_path, cache):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    image = pa.array([{"bytes": None, "path": f"{n}.png"} for n in range(4)])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="a.parquet holds no bytes of images, perhaps their paths"):
        source = sources.open_source(DataConfig(dataset="parquet", root=str(tmp_path)), "train")
        source.read(0)


# The order in a run


def test_an_epoch_of_shards_goes_on_from_its_middle_with_the_same_views(packed):
    whole, rest = take(make_data(packed), 5), take(make_data(packed), 8)
    assert len(whole) == 5 and len(rest) == 2 and whole[0].epoch == 1
    for a, b in zip(whole[3:], rest, strict=True):
        assert a.index.equal(b.index) and a.crops.equal(b.crops) and a.step == b.step
    assert len(torch.cat([batch.index for batch in whole]).unique()) == 40


def test_workers_do_not_change_what_shards_give(packed):
    for a, b in zip(take(make_data(packed)), take(make_data(packed, num_workers=2)), strict=True):
        assert a.index.equal(b.index) and a.crops.equal(b.crops)


def test_streams_that_do_not_divide_the_batch_are_fewer_and_it_is_said(packed, said):
    assert len(take(make_data(packed, streams=64))) == 5
    assert any("read as 8 streams" in line for line in said.messages)


# What goes wrong


def test_a_torn_member_is_a_bad_file(tmp_path, said):
    members = {f"{n}.png": png(n) for n in range(16)}
    members["3.png"] = members["3.png"][:40]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"x.tar#3.png: .*max_bad_fraction"):
        take(make_data(tmp_path, batch_size=4))
    batches = take(make_data(tmp_path, batch_size=4, max_bad_fraction=0.1))
    assert len(batches) == 4 and batches[0].crops.shape == (4, 2, 3, 16, 16)
    assert any("1 of 16 images" in line and "x.tar#3.png" in line for line in said.messages)


def test_a_shard_that_is_cut_short_gives_what_is_whole(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{n}.png": png(n, (64, 64)) for n in range(8)})
    with tarfile.open(path) as tar:
        end = tar.getmembers()[6].offset_data + 20
    os.truncate(path, end)
    data = make_data(tmp_path, batch_size=7, max_bad_fraction=0.2)
    assert len(data.source) == 7
    take(data)
    assert [*data.bad.found.values()] == ["is cut short: its shard ends within it"]


def test_a_shard_replaced_while_it_is_read_is_one_line(packed, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for path in packed.glob("train-*"):
        (root / path.name).write_bytes(path.read_bytes())
    data = make_data(root)
    batches = iter(StepLoader(data, lambda: 0))
    next(batches)
    for path in root.iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(RunError, match=r"train-0000\d.tar was replaced while it was read"):
        list(batches)


def test_a_changed_shard_is_indexed_anew(tmp_path, said):
    root = write_tar(tmp_path / "x.tar", {"0.png": png(1)})
    config = DataConfig(dataset="shards", root=str(root))
    assert len(sources.open_source(config, "train")) == 1
    sources.open_source(config, "train")
    assert sum("reading the headers" in line for line in said.messages) == 1
    write_tar(root, {f"{n}.png": png(n) for n in range(5)})
    source = sources.open_source(config, "train")
    assert len(source) == 5 and int(source.read(4)[0, 0, 0]) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"no tar" * 200), "x.tar is no plain tar"),
        (lambda path: write_tar(path, {"a.txt": b"x"}), "hold no images"),
        (lambda path: path.mkdir(), "names no shard"),
    ],
)
def test_what_is_no_shard_is_one_line(tmp_path, make, said):
    make(tmp_path / "x.tar")
    with pytest.raises(UserError, match=said):
        sources.open_source(DataConfig(dataset="shards", root=str(tmp_path / "x.tar")), "train")


def test_damaged_parquet_is_one_line(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    noise = np.random.default_rng(0).bytes
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [{"bytes": noise(2000)} for _ in range(50)]}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)  # of the images, which the index does not read
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"x.parquet is damaged: .*: put a whole one there"):
        sources.open_source(DataConfig(dataset="parquet", root=str(tmp_path)), "train")


def test_other_shards_are_another_set(packed, tmp_path):
    def found(root):
        source = sources.open_source(DataConfig(dataset="shards", root=str(root)), "train")
        return sources.identify(source, str(root))

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert found(copy) == found(packed)
    (copy / "train-00000.tar").unlink()
    assert found(copy) != found(packed)


def test_other_content_of_the_same_names_and_sizes_is_another_set(tmp_path):
    """Also at another address, and whatever its date: a copy is the same set."""
    found = []
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        file = io.BytesIO()
        np.save(file, np.full((8, 8), value, np.uint8))
        members = {"0.png": png(0), "1.npy": file.getvalue(), "1.cls": b"1"}
        write_tar(tmp_path / name / "x.tar", members)
        source = sources.open_source(
            DataConfig(dataset="shards", root=str(tmp_path / name)), "train"
        )
        found.append(sources.identify(source, str(tmp_path / name)))
    assert found[0] == found[1] and found[0]["crc32"] == found[2]["crc32"]
    assert found[0] != found[2]
    before = {name: found[0][name] for name in ("count", "crc32")}
    assert same_images(found[2], before) and not same_images(found[2], found[0])


def test_images_that_are_passed_over_are_said(tmp_path, said, monkeypatch):
    """Of a key the first image with the first label counts; what cannot be read may be later."""
    members = {"a.1.png": png(1), "a.cls": b"cat", "b.png": png(2), "c.svg": b"x", "d.nef": b"x"}
    write_tar(tmp_path / "x.tar", members)
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name, content in {"a.2.png": png(3), "a.cls": b"dog"}.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    config = DataConfig(dataset="shards", root=str(tmp_path))
    source = sources.open_source(config, "train")
    assert source.paths.labels() == ["cat", None] and len(source) == 2
    assert any("passed over: 1 .nef, 1 .svg" in line for line in said.messages)
    assert any(line.startswith("1 images are passed over, since") for line in said.messages)
    known = shard_index.readable()
    for room in (shard_headers, shard_index):
        monkeypatch.setattr(room, "readable", lambda: known | {".nef"})
    assert len(sources.open_source(config, "train")) == 3, "a package has come"


# Patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x-{08..11}.tar", ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{t-{0..1},v-{7..7}}.tar", ["t-0.tar", "t-1.tar", "v-7.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["x-{0..1", "{9..1}.tar", "{0..99999}{0..99999}.tar"])
def test_braces_that_name_nothing_are_refused(pattern):
    with pytest.raises(UserError, match="data.root"):
        expand_braces(pattern)


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["train-0", "val-0", "test-0"], ["train-0"], ["test-0"]),
        (["training_0", "validation_0"], ["training_0"], ["validation_0"]),
        (["a-0", "val-0"], ["a-0"], ["val-0"]),
        (["a-0", "b-0"], ["a-0", "b-0"], []),
        (["val-0"], ["val-0"], []),
    ],
)
def test_the_first_word_of_a_shard_is_its_split(tmp_path, names, train, held_out):
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    found = find_shards(DataConfig(dataset="shards", root=str(tmp_path)))
    assert [[Path(path).stem for path in part] for part in found] == [train, held_out]


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "x-0.tar").touch()
    with pytest.raises(UserError, match=r"x-1.tar is not there \(1 of 2 shards\)"):
        find_shards(DataConfig(dataset="shards", root=f"{tmp_path}/x-{{0..1}}.tar"))


@pytest.mark.parametrize("place", ["its start", "a page"])
def test_a_damaged_index_is_made_anew(packed, cache, said, place):
    whole = sources.open_source(DataConfig(dataset="shards", root=str(packed)), "train")
    index = cache / "index.sqlite"
    content = bytearray(index.read_bytes())
    middle = len(content) // 2
    content[: 100 if place == "its start" else 0] = b"\xff" * (100 if place == "its start" else 0)
    content[middle : middle + 4096] = b"\xff" * 4096
    index.write_bytes(content)
    again = sources.open_source(DataConfig(dataset="shards", root=str(packed)), "train")
    assert len(again) == len(whole) and again.read(3).equal(whole.read(3))
    assert "index.sqlite is damaged" in said.text
