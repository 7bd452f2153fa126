"""Sources: data sets of real formats, odd trees of images, and what the user is told."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import save
from torchvision import datasets

from moco.config import DataConfig, UserError
from moco.images import sources
from moco.images.image_source import ImageSource
from moco.images.resident import load_all

RNG = np.random.default_rng(0)


def folder(root: Path, **settings) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **settings)


# Data sets


def test_digits_are_scaled_and_split_the_same_way_every_time():
    data = DataConfig(dataset="digits", channels=1)
    train, test = sources.open_labelled(data)
    assert train.images.shape == (1257, 1, 8, 8) and test.images.shape == (540, 1, 8, 8)
    assert train.images.max() == 255 and len(train) == 1257
    again = sources.open_source(data, "test")
    assert torch.equal(again.images, test.images) and torch.equal(again.labels, test.labels)
    assert test.labels[:8].tolist() == [
        1,
        4,
        5,
        6,
        9,
        1,
        2,
        2,
    ]  # the split must never move: results depend on it
    counts = torch.bincount(test.labels) / (
        torch.bincount(train.labels) + torch.bincount(test.labels)
    )
    assert ((counts - 0.3).abs() < 0.01).all()  # stratified
    rgb = sources.open_source(DataConfig(dataset="digits", channels=3), "train")
    assert torch.equal(rgb.images, train.images.expand(-1, 3, -1, -1))
    assert torch.equal(rgb.read(5), rgb.images[5])
    with pytest.raises(UserError, match=r"data.channels is 4"):
        sources.open_source(DataConfig(dataset="digits", channels=4), "train")


def cifar(root: Path, kind: type, monkeypatch) -> np.ndarray:
    """Write CIFAR's files with four images each, and make theirs the checksums asked for."""
    base = root / kind.base_folder
    base.mkdir(parents=True)
    lists = {"train_list": [], "test_list": []}
    images = RNG.integers(0, 256, (4 * 6, 3072), dtype=np.uint8)
    label = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    names = [("train_list", n) for n, _ in kind.train_list] + [
        ("test_list", n) for n, _ in kind.test_list
    ]
    for number, (group, name) in enumerate(names):
        part = {"data": images[4 * number : 4 * number + 4], label: [0, 1, 2, number]}
        (base / name).write_bytes(pickle.dumps(part))
        lists[group].append([name, hashlib.md5((base / name).read_bytes()).hexdigest()])
    meta = {**kind.meta}
    (base / meta["filename"]).write_bytes(
        pickle.dumps({meta["key"]: [f"class {i}" for i in range(10)]})
    )
    meta["md5"] = hashlib.md5((base / meta["filename"]).read_bytes()).hexdigest()
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(kind, name, value)
    return images.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name, num_train", [("cifar10", 20), ("cifar100", 4)])
def test_cifar(tmp_path, monkeypatch, name, num_train):
    images = cifar(tmp_path, getattr(datasets, name.upper()), monkeypatch)
    train, test = sources.open_labelled(DataConfig(dataset=name, root=str(tmp_path)))
    assert torch.equal(train.images, torch.from_numpy(images[:num_train]))
    assert torch.equal(test.images, torch.from_numpy(images[num_train : num_train + 4]))
    assert test.labels.tolist() == [0, 1, 2, num_train // 4] and test.labels.dtype == torch.int64
    assert train.classes[3] == "class 3" and train.name == f"{name} train"
    with pytest.raises(UserError, match=r"data.channels is 1.*set it to 3"):
        sources.open_source(DataConfig(dataset=name, root=str(tmp_path), channels=1), "train")


def test_cifar_is_not_unpickled_when_a_checksum_differs(tmp_path, monkeypatch):
    cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    evil = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    evil.write_bytes(b"cos\nmkdir\n(S'" + os.fsencode(tmp_path / "pwned") + b"'\ntR.")
    with pytest.raises(UserError, match=r"data.root.*checksum.*--data.download true"):
        sources.open_source(DataConfig(dataset="cifar10", root=str(tmp_path)), "test")
    assert not (tmp_path / "pwned").exists()


def test_missing_cifar_names_path_and_remedy_and_a_failed_download_its_reason(
    tmp_path, monkeypatch
):
    data = DataConfig(dataset="cifar10", root=str(tmp_path))
    with pytest.raises(UserError, match=r"cifar-10-batches-py.data_batch_1.*--data.download true"):
        sources.open_source(data, "train")

    def offline(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    data.download = True
    with pytest.raises(UserError, match=r"cannot be fetched \(no route\\nto host\)"):
        sources.open_source(data, "train")


def test_stl10_trains_on_its_unlabelled_split(tmp_path, monkeypatch):
    base = tmp_path / "stl10_binary"
    base.mkdir()
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    images = {name: RNG.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
              for name, n in (("train", 3), ("test", 2), ("unlabeled", 4))}  # fmt: skip
    for name, array in images.items():
        array.tofile(base / f"{name}_X.bin")
    np.array([1, 10, 2], np.uint8).tofile(base / "train_y.bin")
    np.array([3, 1], np.uint8).tofile(base / "test_y.bin")
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    data = DataConfig(dataset="stl10", root=str(tmp_path))
    train = sources.open_source(data, "train")
    assert train.labels is None and len(train) == 4
    assert torch.equal(train.images, torch.from_numpy(images["unlabeled"]).transpose(2, 3))
    bank, queries = sources.open_labelled(data)
    assert bank.labels.tolist() == [0, 9, 1] and queries.labels.tolist() == [2, 0]
    assert torch.equal(queries.images, torch.from_numpy(images["test"]).transpose(2, 3))
    assert queries.classes == list("abcdefghij")
    assert torch.equal(sources.open_source(data, "test").labels, queries.labels)


# Folders


def relative(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in source.paths]


def test_flat_folder_is_unlabelled_sorted_and_ignores_hidden_and_foreign_files(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "__MACOSX/c.png", ".cache/d.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # would block whoever opens it
    os.mkfifo(tmp_path / ".cache/pipe.png")
    (tmp_path / "link to pipe.png").symlink_to(".cache/pipe.png")
    source = sources.open_source(folder(tmp_path), "train")
    assert relative(source, tmp_path) == ["a.jpg", "b.PNG"]
    assert source.labels is None and source.classes == [] and source.images is None
    assert sources.open_source(folder(tmp_path), "test") is None
    assert sources.open_labelled(folder(tmp_path)) is None


def test_subfolders_are_labels_unless_mixed_or_single(tmp_path):
    save(tmp_path / "cat/deep/er/1.png")
    assert sources.open_source(folder(tmp_path), "train").labels is None
    save(tmp_path / "ant/2.png")
    source = sources.open_source(folder(tmp_path), "train")
    assert source.classes == ["ant", "cat"] and source.labels.tolist() == [0, 1]
    save(tmp_path / "stray.png")
    assert sources.open_source(folder(tmp_path), "train").labels is None
    for split in ("train", "test"):
        save(tmp_path / "one" / split / "cat/1.png")
    assert sources.open_source(folder(tmp_path / "one"), "train").labels is None


@pytest.mark.parametrize(
    "train_name, held_out", [("train", "val"), ("Train", "TEST"), ("train", "validation")]
)
def test_splits_share_the_class_numbers_of_train(tmp_path, train_name, held_out, caplog):
    for name in ("ant", "bee", "cat"):
        save(tmp_path / train_name / name / "1.png")
    save(tmp_path / held_out / "cat/2.png")
    (tmp_path / "notes").mkdir()
    bank, queries = sources.open_labelled(folder(tmp_path))
    assert len(bank) == 3 and queries.labels.tolist() == [2]
    assert queries.classes == bank.classes == ["ant", "bee", "cat"]
    assert sources.open_labelled(folder(tmp_path), bank)[0] is bank
    save(tmp_path / held_out / "Bee/3.png")  # which is another class than bee
    caplog.set_level("INFO", logger="moco")
    assert sources.open_labelled(folder(tmp_path))[1].labels.tolist() == [2]
    assert sources.open_source(folder(tmp_path), "test").labels.tolist() == [2]
    assert "1 of 2 images are of classes that the train split lacks" in caplog.text
    assert "are left out: Bee" in caplog.text


def test_unlabelled_test_split_and_a_class_called_train(tmp_path):
    for name in ("train/ant/1.png", "train/bee/1.png"):
        save(tmp_path / name)
    assert sources.open_source(folder(tmp_path), "train").classes == ["ant", "bee"]
    save(tmp_path / "test/1.png")
    assert sources.open_source(folder(tmp_path), "test").labels is None
    assert sources.open_labelled(folder(tmp_path)) is None
    for name in ("ant", "bee"):
        save(tmp_path / f"test/{name}/1.png")
    (tmp_path / "test/1.png").rename(tmp_path / "train/stray.png")
    assert sources.open_source(folder(tmp_path), "test").labels is None  # nothing to map them by
    (tmp_path / "test").rename(tmp_path / "plane")
    assert sources.open_source(folder(tmp_path), "train").classes == ["plane", "train"]


def test_links_in_circles_and_twice_list_every_file_once(tmp_path):
    root = tmp_path / "root"
    real = save(root / "a/1.png")
    save(tmp_path / "outside/2.png")
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    (root / "c").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "a/0 again.png").symlink_to(real)
    (root / "d.png").symlink_to(tmp_path / "outside/2.png")
    source = sources.open_source(folder(root), "train")
    assert relative(source, root) == ["a/1.png", "c/2.png"]


def test_linked_files_from_elsewhere_come_once_and_dangling_ones_are_named_bad(tmp_path):
    store = save(tmp_path / "store/object.png")
    root = tmp_path / "root"
    (root / "x").mkdir(parents=True)
    (root / "x/1.png").symlink_to(store)
    (root / "x/2.png").symlink_to(store)
    (root / "x/3.png").symlink_to("nowhere.png")
    (root / "x/4.png").symlink_to("4.png")
    source = sources.open_source(folder(root), "train")
    assert relative(source, root) == ["x/1.png", "x/3.png", "x/4.png"]
    _, bad = load_all(source)
    assert [index for index, _ in bad] == [1, 2] and "No such file" in bad[0][1]


def test_unreadable_subfolder_is_skipped_with_a_warning(tmp_path, monkeypatch, caplog):
    save(tmp_path / "open/1.png")
    save(tmp_path / "closed/2.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = sources.open_source(folder(tmp_path), "train")
    assert relative(source, tmp_path) == ["open/1.png"]
    assert "1 folders cannot be read" in caplog.text and "closed: Permission denied" in caplog.text
    with pytest.raises(UserError, match=r"closed' cannot be read \(Permission denied\)"):
        sources.open_source(folder(tmp_path / "closed"), "train")


def test_roots_that_give_nothing_are_refused_in_one_line(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "images.tar").touch()
    cases = {
        "picture": "data.root '.*picture' does not exist: did you mean '.*pictures'",
        "zzz": "data.root '.*zzz' does not exist: give a folder",
        "images.tar": "data.root '.*images.tar' is a file",
        "pictures": r"data.root '.*pictures' holds no images \(looked for .*.jpg .*.npy .* in all",
        "nul\0byte": "data.root .* cannot be read",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            sources.open_source(folder(tmp_path / name), "train")
        assert "\n" not in str(caught.value)


def test_imagenet_wants_its_layout(tmp_path):
    data = DataConfig(dataset="imagenet", root=str(tmp_path))
    save(tmp_path / "train/n01/1.JPEG")
    save(tmp_path / "train/n02/1.JPEG")
    with pytest.raises(UserError, match=r"lacks train/ or val/.*train/CLASS/\*.JPEG"):
        sources.open_source(data, "train")
    flat = save(tmp_path / "val/1.JPEG")
    with pytest.raises(UserError, match=r"one subfolder per class"):
        sources.open_source(data, "test")
    flat.unlink()
    save(tmp_path / "val/n02/1.JPEG")
    bank, queries = sources.open_labelled(data)
    assert bank.labels.tolist() == [0, 1] and queries.labels.tolist() == [1]


@pytest.mark.parametrize(("name", "dataset"), [("a.tar", "shards"), ("b.parquet", "parquet")])
def test_a_folder_of_shards_that_is_read_as_images_names_the_setting(tmp_path, name, dataset):
    (tmp_path / name).write_bytes(b"")
    data = DataConfig(dataset="folder", root=str(tmp_path))
    with pytest.raises(UserError, match=f"no images .* are read with --data.dataset {dataset}$"):
        sources.open_source(data, "train")
