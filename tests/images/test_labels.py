"""Folders, splits and labels as people lay them out: read as they are meant, and said."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pictures import save, write_pictures
from runs import run_tiny

import eval_knn
import train
from moco.config import DataConfig, UserError
from moco.images import sources, splits

pytestmark = pytest.mark.usefixtures("in_tmp")


def folder(root: Path, **settings) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **settings)


@pytest.fixture(autouse=True)
def lines(caplog):
    """Collect what is logged."""
    caplog.set_level("INFO", logger="moco")
    return caplog


def relative(source, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in source.paths]


def tree(root: Path, *names: str) -> Path:
    """Write grey images, each of another value."""
    for number, name in enumerate(names):
        save(root / name, size=(4, 4 + number % 3))
    return root


# Splits


@pytest.mark.parametrize(
    "names, held_out, unused",
    [
        (("train", "valid", "test"), "test", "valid"),  # Roboflow
        (("Training", "Testing"), "Testing", ""),  # Kaggle
        (("TRAIN", "Val"), "Val", ""),
        (("training", "validation", "README files"), "validation", "README files"),
        (("train", "valid"), "valid", ""),
    ],
)
@pytest.mark.parametrize("deeper", ["", "dataset", "archive/dataset"])
def test_splits_by_other_names_and_below_single_folders(
    tmp_path, lines, names, held_out, unused, deeper
):
    for split in names:
        for name in ("ant", "bee"):
            save(tmp_path / "root" / deeper / split / name / "1.png")
    data = folder(tmp_path / "root")
    source = sources.open_source(data, "train")
    start = os.path.join(deeper, names[0])
    wanted = [os.path.join(start, "ant/1.png"), os.path.join(start, "bee/1.png")]
    assert relative(source, tmp_path / "root") == wanted and source.classes == ["ant", "bee"]
    assert f"/{held_out}/" in sources.open_source(data, "test").paths[0]
    said = [line for line in lines.messages if "trained on is" in line]
    assert len(said) == 1 and f"trained on is {names[0]}, held out is {held_out}" in said[0]
    assert said[0].endswith(f"not used: {unused}" if unused else held_out)


def test_what_lies_beside_the_splits_is_not_used_and_said(tmp_path, lines):
    tree(tmp_path, "train/1.png", "Train/2.png", "test/3.png", "4.png", "5.jpg", ".6.png")
    source = sources.open_source(folder(tmp_path), "train")
    assert relative(source, tmp_path) == ["train/1.png"]
    assert any(x.endswith("held out is test; not used: Train, 2 pictures") for x in lines.messages)


def test_classes_below_a_single_folder_are_labels(tmp_path):
    tree(tmp_path / "root", "animals/ant/1.png", "animals/bee/2.png")
    assert sources.open_source(folder(tmp_path / "root"), "train").classes == ["ant", "bee"]


def test_a_single_folder_that_leads_back_ends(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/again").symlink_to(tmp_path / "root", target_is_directory=True)
    with pytest.raises(UserError, match="holds no images"):
        sources.open_source(folder(tmp_path / "root"), "train")


def test_a_single_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    save(tmp_path / "root/closed/1.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match="holds no images .*1 of them cannot be read"):
        sources.open_source(folder(tmp_path / "root"), "train")


# What is no image of the set


def test_folders_of_systems_are_left_out_and_counted(tmp_path, lines):
    tree(
        tmp_path, "ant/1.png", "bee/2.png", "@eaDir/1.png", "ant/@eaDir/1.png/SYNOPHOTO.jpg",
        "#recycle/3.png", "$RECYCLE.BIN/4.png", "lost+found/5.png", ".thumbnails/6.png",
        "System Volume Information/7.png", "@Recycle/8.png",
    )  # fmt: skip
    source = sources.open_source(folder(tmp_path), "train")
    assert relative(source, tmp_path) == ["ant/1.png", "bee/2.png"]
    assert source.classes == ["ant", "bee"]
    said = [line for line in lines.messages if "system folders are left out" in line]
    assert len(said) == 1 and "left out: 2 @eaDir, 1 #recycle, 1 $" in said[0]


# Labels by folder


def test_a_stray_picture_keeps_the_labels_of_the_others_and_is_named(tmp_path, lines):
    for split in ("train", "test"):
        tree(tmp_path / split, *(f"{c}/{n}.png" for c in ("ant", "bee") for n in range(3)))
    save(tmp_path / "train/stray.png")
    save(tmp_path / "test/other.png")
    data = folder(tmp_path)
    source = sources.open_source(data, "train")
    assert len(source) == 7 and source.labels is None
    assert any("1 of 7 images have no class" in x and "stray.png" in x for x in lines.messages)
    bank, queries = sources.open_labelled(data, source)
    assert len(bank) == len(queries) == 6 and bank.classes == queries.classes == ["ant", "bee"]
    assert bank.labels.tolist() == queries.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert any("left out: (no class)" in line for line in lines.messages)


def test_a_few_folders_beside_a_heap_of_pictures_are_no_classes(tmp_path):
    tree(tmp_path, *(f"{n}.png" for n in range(6)), "x/1.png", "y/1.png")
    (tmp_path / "test").mkdir()
    source = sources.open_source(folder(tmp_path), "train")
    assert source.labels is None and sources.open_labelled(folder(tmp_path), source) is None


def test_names_of_classes_in_another_unicode_form_are_the_same_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    for split, name in (("train", composed), ("test", decomposed)):
        tree(tmp_path / split, f"{name}/1.png", "ant/2.png")
    bank, queries = sources.open_labelled(folder(tmp_path))
    assert bank.classes == queries.classes == [composed, "ant"]
    assert sorted(queries.labels.tolist()) == [0, 1]


def write_splits(root: Path, rng=None) -> Path:
    rng = rng or np.random.default_rng(0)
    for split, names in (("train", "abc"), ("val", "bcd")):
        for name in names:
            write_pictures(root / split / name, [f"{n}.png" for n in range(10)], rng)
    return root


def test_a_class_more_or_less_stops_no_run_and_the_shared_ones_are_scored(tmp_path, said):
    root = write_splits(tmp_path / "root")
    result = run_tiny(root, "--run.knn_every", "1", "--trainer.max_epochs", "1",
                      "--model.queue_size", "16")  # fmt: skip
    assert result["knn_top1"] is not None
    last = "run/checkpoints/last.ckpt"
    options = ["--baselines", "false", "--k", "[5]", "--shots", "[1]", "--gallery", "false"]
    assert eval_knn.main(["--checkpoint", last, *options])
    text = "\n".join(said)
    assert "10 of 30 images are of classes that the train split lacks and are left out: d" in text
    assert "classes of one split alone are left out: a (10 images)" in text
    shutil.rmtree(root / "val/c")
    with pytest.raises(UserError, match="share 1 classes .*both need images of two classes"):
        eval_knn.main(["--checkpoint", last, *options])


def test_readings_of_a_run_score_the_shared_classes_as_evaluation_does(tmp_path, said):
    root = write_splits(tmp_path / "root")
    run = ["--run.knn_every", "1", "--trainer.max_epochs", "1", "--model.queue_size", "16"]
    result = run_tiny(root, *run)
    assert any("classes of one split alone are left out: a (10 images)" in line for line in said)
    assert result["comparison"]["test_images"] == 20 and result["comparison"]["chance"] == 50
    options = ["--baselines", "false", "--k", "[20]", "--shots", "[1]", "--gallery", "false"]
    judged = eval_knn.main(["--checkpoint", "run/checkpoints/last.ckpt", *options])
    assert judged["top1"] == result["knn_top1"]
    said.clear()
    shutil.rmtree(root / "val/c")
    result = run_tiny(root, *run, run_dir="other")
    assert result["knn_top1"] is None
    assert any("kNN is not read: " in line and "share 1 classes" in line for line in said)


def test_the_same_file_in_two_classes_is_said_once(tmp_path, lines):
    tree(tmp_path, "ant/1.png", "bee/2.png", "bee/4.png", "cat/6.png")
    shutil.copy(tmp_path / "ant/1.png", tmp_path / "bee/1.png")
    shutil.copy(tmp_path / "ant/1.png", tmp_path / "cat/1.png")
    save(tmp_path / "ant/6.png", size=(9, 9))  # of the same name alone
    sources.open_source(folder(tmp_path), "train")
    said = [line for line in lines.messages if "same file" in line]
    assert len(said) == 1 and "ant/1.png and" in said[0] and "2 such pairs" in said[0]


# Tables and lists


def test_a_list_of_files_is_what_is_trained_on(tmp_path):
    root = tree(tmp_path / "root", "ant/1.png", "ant/2.png", "bee/3.png", "bee/4.png")
    (tmp_path / "f.txt").write_text(f"bee/4.png\n\n./ant/1.png\n{root}/bee/3.png\nbee/4.png\n")
    data = folder(root, files=str(tmp_path / "f.txt"))
    source = sources.open_source(data, "train")
    assert relative(source, root) == ["bee/4.png", "ant/1.png", "bee/3.png"]
    assert source.classes == ["ant", "bee"] and source.labels.tolist() == [1, 0, 1]
    (tmp_path / "f.txt").write_text("gone.png\n")
    with pytest.raises(UserError, match=r"none of its 1 files is there, first .*gone.png"):
        sources.open_source(data, "train")
    data.files = str(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="data.files '.*nowhere.txt' cannot be read"):
        sources.open_source(data, "train")


def test_readings_on_a_labelled_set_of_their_own(tmp_path, images, said):
    own = write_splits(tmp_path / "own")
    options = ["--trainer.max_epochs", "1", "--run.knn_every", "1", "--run.knn_root", str(own)]
    assert run_tiny(images, *options)["knn_top1"] is not None
    assert any("classes of one split alone are left out" in line for line in said)
    for root, message in (
        (images, "run.knn_root '.*' has no labelled train and test images"),
        (tmp_path / "nowhere", "run.knn_root '.*nowhere' does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            run_tiny(images, *options[:-1], str(root), run_dir="other")
    assert train.main(["--resume", "run"])["steps"] == 3


@pytest.mark.parametrize(
    "write",
    [
        lambda path: ("\ufeff" if "0" in path else "") + path + "\r\n",
        lambda path: f'"{path}"\n',
        lambda path: path.replace("/", "\\") + "\n",
        lambda path: unicodedata.normalize("NFD", path) + "\n",
    ],
)
def test_a_list_may_spell_paths_as_other_programs_do(tmp_path, write):
    names = [unicodedata.normalize("NFC", f"x/Käfer {n}.png") for n in range(2)]
    root = tree(tmp_path / "root", *names)
    (tmp_path / "f.txt").write_text("".join(map(write, names)), encoding="utf-8")
    source = sources.open_source(folder(root, files=str(tmp_path / "f.txt")), "train")
    assert relative(source, root) == names


def opened(root: Path) -> tuple[str, str | None]:
    """Return which folders are trained on and held out."""
    train, test = splits.split_folders(folder(root))
    return os.path.relpath(train, root), test and os.path.relpath(test, root)


@pytest.mark.parametrize(
    "names, train, held_out",
    [
        (("train2017", "val2017", "test2017"), "train2017", "test2017"),  # COCO
        (("training_set", "test_set"), "training_set", "test_set"),
        (("seg_train", "seg_test", "seg_pred"), "seg_train", "seg_test"),
        (("train", "test1"), "train", "test1"),
        (("train-images", "valid-images", "notes"), "train-images", "valid-images"),
        (("train2014", "train2017", "val2014"), ".", None),  # which of them, nobody knows
        (("freight train", "test track"), ".", None),
    ],
)
def test_splits_whose_names_have_a_word_more(tmp_path, names, train, held_out):
    tree(tmp_path, *(f"{name}/{kind}/1.png" for name in names for kind in ("ant", "bee")))
    assert opened(tmp_path) == (train, held_out)


def test_classes_below_a_single_folder_of_a_split_are_labels(tmp_path):
    names = [f"seg_{s}/seg_{s}/{c}/1.png" for s in ("train", "test") for c in ("ant", "bee")]
    bank, queries = sources.open_labelled(folder(tree(tmp_path, *names)))
    assert bank.classes == queries.classes == ["ant", "bee"]
    assert opened(tmp_path) == ("seg_train/seg_train", "seg_test/seg_test")


def test_folders_without_images_beside_the_images_do_not_count(tmp_path):
    tree(tmp_path / "yolo", "images/train/1.png", "images/val/2.png")
    tree(tmp_path / "single", "train/ant/1.png", "train/bee/2.png")
    for name in ("yolo/labels/train", "yolo/labels/val", "single/annotations"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.txt").touch()
    assert opened(tmp_path / "yolo") == ("images/train", "images/val")
    assert opened(tmp_path / "single") == ("train", None)
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere/3.png")
    (tmp_path / "single/more").mkdir()
    (tmp_path / "single/more/linked").symlink_to(tmp_path / "elsewhere")
    assert opened(tmp_path / "single") == (".", None)  # which keeps the linked images


def test_what_is_held_out_has_labels_where_the_train_split_has(tmp_path):
    tree(tmp_path, *(f"{s}/{c}/1.png" for s in ("train", "val") for c in ("ant", "bee")))
    tree(tmp_path, "test/1.png", "test/2.png")
    assert opened(tmp_path) == ("train", "val")
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test").mkdir()
    assert opened(tmp_path) == ("train", "val")
    shutil.rmtree(tmp_path / "val")
    save(tmp_path / "test/3.png")
    assert opened(tmp_path) == ("train", "test")


def test_a_held_out_folder_without_images_is_none(tmp_path, lines):
    tree(tmp_path, "train/ant/1.png", "train/bee/2.png")
    (tmp_path / "test").mkdir()
    data = folder(tmp_path)
    assert len(sources.open_source(data, "train")) == 2 and not sources.has_test_split(data)
    assert any("held out is none; not used: test" in line for line in lines.messages)
