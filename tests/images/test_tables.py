"""Tables of labels and splits: read as they are meant, and said."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest
from pictures import save
from test_labels import folder, lines, relative, tree

from moco.config import DataConfig, UserError
from moco.images import sources, tables
from moco.reports.listing import list_images_of

__all__ = ["lines"]  # a fixture


def tabled(tmp_path: Path, content: str, *names: str) -> DataConfig:
    """Write images below root/ and a table of labels beside it; return the settings of both."""
    tree(tmp_path / "root", *names)
    (tmp_path / "t.csv").write_text(content, encoding="utf-8", newline="")
    return folder(tmp_path / "root", labels=str(tmp_path / "t.csv"))


HEADED = "path,label,split\n"
TABLES = {
    "comma, no header": "x/1.png,ant\nx/2.png,bee\n",
    "header, other order": "id;label;path\n7;ant;x/1.png\n8;bee;x/2.png\n",
    "tab": "x/1.png\tant\nx/2.png\tbee\n",
    "bar and quotes": '"x/1.png"|"ant"\n./x/2.png|bee\n',
    "names without endings": "id,breed\n1,ant\n2,bee\n",
    "file names": "image,target\n1.png,ant\n2.png,bee\n",
    "Windows": "filename,class\r\nx\\1.png,ant\r\nx\\2.png,bee\r\n",
    "a byte order mark": "\ufefflabel,path\nant,x/1.png\nbee,x/2.png\n",
    "a byte order mark, no header": "\ufeffx/1.png,ant\nx/2.png,bee\n",
}


def test_names_of_files_in_another_unicode_form_are_those_of_the_table(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    content = f"{composed}.png,ant\nb/{decomposed}.png,bee\n"
    data = tabled(tmp_path, content, f"{decomposed}.png", f"b/{composed}.png")
    source = sources.open_source(data, "train")
    assert sorted(source.labels.tolist()) == [0, 1] and source.classes == ["ant", "bee"]


def test_a_table_that_holds_all_images_out_is_refused(tmp_path):
    content = "path,label,split\n1.png,ant,test\n2.png,bee,test\n"
    data = tabled(tmp_path, content, "1.png", "2.png")
    with pytest.raises(UserError, match="holds all images out: none is left to train on"):
        sources.open_source(data, "train")


def test_a_table_with_a_column_for_each_class_is_not_guessed(tmp_path):
    content = "image,MEL,NV,split\n1,0,1,train\n2,1,0,train\n"
    data = tabled(tmp_path, content, "1.png", "2.png")
    with pytest.raises(UserError, match="no column of a usual name for labels, but MEL, NV: call"):
        sources.open_source(data, "train")


@pytest.mark.parametrize("name", TABLES)
def test_labels_of_a_table(tmp_path, name):
    data = tabled(tmp_path, TABLES[name], "x/1.png", "x/2.png")
    source = sources.open_source(data, "train")
    assert source.classes == ["ant", "bee"] and source.labels.tolist() == [0, 1]


def test_a_table_with_splits_holds_images_out(tmp_path, lines):
    rows = [f"{n}.png,{'ab'[n % 2]},{'test' if n > 4 else 'train'}" for n in range(8)]
    data = tabled(tmp_path, HEADED + "\n".join(rows), *(f"{n}.png" for n in range(9)))
    source = sources.open_source(data, "train")
    names = [f"{n}.png" for n in range(5)]
    assert relative(source, tmp_path / "root") == [*names, "8.png"]  # the last one has no label
    bank, queries = sources.open_labelled(data, source)
    assert relative(bank, tmp_path / "root") == names and bank.labels.tolist() == [0, 1, 0, 1, 0]
    assert relative(queries, tmp_path / "root") == ["5.png", "6.png", "7.png"]
    assert queries.labels.tolist() == [1, 0, 1]


def test_images_that_a_table_holds_out_beside_a_test_folder_are_said(tmp_path, lines):
    """As of sets whose test folder has no labels, where the table splits the train folder."""
    rows = [f"{n}.png,{'ab'[n % 2]},{'val' if n > 4 else 'train'}\n" for n in range(8)]
    places = [*(f"train/{n}.png" for n in range(8)), "test/x.png", "test/y.png"]
    data = tabled(tmp_path, HEADED + "".join(rows), *places)
    assert len(sources.open_source(data, "train")) == 5
    (line,) = [line for line in lines.messages if "not used" in line]
    assert "test; not used: 3 images of val: to hold these out, let data.root be their" in line


@pytest.mark.parametrize(
    "content, trained, held_out, line",
    [
        (HEADED + "0.png,a,train\n1.png,b,\n2.png,,test\n", "0134", "2", ""),  # kept secret
        ("0.png,a,train\n1.png,b,Test\n2.png,,train\n", "0234", "1", ""),
        (HEADED + "0.png,a\n1.png,b\n2.png,a,test\n", "0134", "2", "2 of 4 images have a label"),
        (
            HEADED + "0.png,a,train\n1.png,b,val\n2.png,a,test\n3.png,b,train\n",
            "034",
            "2",
            "held out is test; not used: 1 images of val",
        ),
        (
            HEADED + "0.png,a,dev\n1.png,b,dev\n",
            "01234",
            "",
            "its column split has dev, none of train, test,",
        ),
        (
            HEADED + "0.png,a,train\n1.png,b,val\n2.png,,test\n3.png,b,train\n",
            "034",
            "1",
            "held out is val; not used: 1 images of test",
        ),
        (HEADED + "0.png,a,train\n1.png,b,\n9.png,b,test\n", "01234", "", ""),
        ("0.png,a,train\n1.png,b\n2.png,a,test\n3.png,b,\n", "0134", "2", ""),
    ],
    ids=[
        "no labels",
        "no header",
        "short rows",
        "test and val",
        "no words of splits",
        "test without labels",
        "test that is not there",
        "no header, ends left out",
    ],
)
def test_what_a_table_says_of_splits(tmp_path, lines, content, trained, held_out, line):
    data = tabled(tmp_path, content, *(f"{n}.png" for n in range(5)))
    train, test = sources.open_source(data, "train"), sources.open_source(data, "test")
    for source, wanted in ((train, trained), (test, held_out)):
        found = relative(source, tmp_path / "root") if source else []
        assert found == [f"{n}.png" for n in wanted]
    assert line in lines.text
    assert sources.has_test_split(data) == bool(held_out)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"data.labels '.*t.csv' cannot be read \(No such file"),
        ("", "rows of one column"),
        ("1.png\n2.png\n", "rows of one column: write PATH,LABEL"),
        ("path,label\n1.png,\n", "labels no image"),
        (HEADED + "1.png,a,train\n2.png,b,dev\n", "its column split has dev, which is no split"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ],
)
def test_a_table_that_labels_nothing_is_refused(tmp_path, content, message):
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        tables.read_table(str(path))
    assert "\n" not in str(caught.value)


SPELLINGS = {
    "another Unicode form": lambda path: unicodedata.normalize("NFD", path),
    "below the folder that the root lies in": lambda path: f"root/{path}",
    "below a folder of the root": lambda path: path.removeprefix("x/"),
    "Windows": lambda path: ".\\" + path.replace("/", "\\"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_table_may_spell_paths_in_another_way(tmp_path, lines, spelling):
    names = [unicodedata.normalize("NFC", f"x/{n % 2}/Käfer {n}.png") for n in range(4)]
    rows = [f"{SPELLINGS[spelling](name)},{'ab'[n % 2]}" for n, name in enumerate(names)]
    data = tabled(tmp_path, "\n".join(["path,kind", *rows]), *names)
    source = sources.open_source(data, "train")
    assert source.labels.tolist() == [0, 0, 1, 1]
    said = [line for line in lines.messages if "have a label" in line]
    assert len(said) == 1 and "4 of 4 images have a label, of 2 classes, by its column" in said[0]


def test_a_table_that_names_no_image_is_refused_with_what_it_names(tmp_path):
    content = "C:\\else\\7.png,ant\nC:\\else\\8.png,bee\n"
    data = tabled(tmp_path, content, "a/1.png", "b/2.png")
    with pytest.raises(UserError, match="none of the 2 images: .* names C:/else/7.png, .*a/1.png$"):
        sources.open_source(data, "train")


def test_several_labels_of_an_image_are_said(tmp_path, lines):
    content = "1.png,ant\n2.png,bee\n1.png,bee\n./2.png,bee\n"
    sources.open_source(tabled(tmp_path, content, "1.png", "2.png"), "train")
    said = [line for line in lines.messages if "several labels" in line]
    assert len(said) == 1 and "gives 1 images several labels, first 1.png" in said[0]


def test_a_row_that_may_be_two_files_is_refused(tmp_path):
    names = ["train/1.png", "train/2.png", "test/1.png", "test/2.png"]
    data = tabled(tmp_path, "id,label\n1,ant\n2,bee\n", *names)
    with pytest.raises(UserError, match="1 may be .*train/1.png or .*test/1.png: write paths"):
        sources.open_labelled(data)
    shutil.rmtree(tmp_path / "root/test")
    save(tmp_path / "root/train/deeper/1.png")
    with pytest.raises(UserError, match="1 may be .*train/1.png or .*deeper/1.png: write paths"):
        sources.open_source(data, "train")


def test_a_table_holds_images_of_the_train_folder_out(tmp_path):
    rows = [f"{n}.png,{'ab'[n % 2]},{'test' if n > 1 else 'train'}" for n in range(4)]
    data = tabled(tmp_path, HEADED + "\n".join(rows), *(f"train/{n}.png" for n in range(4)))
    bank, queries = sources.open_labelled(data)
    assert (len(bank), len(queries)) == (2, 2) and queries.labels.tolist() == [0, 1]


def test_an_index_has_the_splits_of_a_table(tmp_path):
    content = HEADED + "0.png,a,train\n1.png,b,val\n2.png,a,test\n"
    listing = list_images_of(tabled(tmp_path, content, *(f"{n}.png" for n in range(4))))
    assert listing.splits == ["train", "val", "test", "train"]
