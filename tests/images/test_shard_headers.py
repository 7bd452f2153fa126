"""What headers of shards tell: labels as tables spell them, damage in the middle, a full disk."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import unicodedata
import zlib

import pytest

from moco.config import DataConfig, RunError
from moco.images import indexing
from moco.images.shard_headers import read_tar
from moco.images.shard_index import Index


def as_tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return file.getvalue()


def one_labelled(value: object) -> bytes:
    return as_tar({"1.png": b"x", "1.json": json.dumps({"label": value}).encode()})


IMAGES = {f"{number}.png": bytes([number]) * 600 for number in range(1, 5)}  # 1536 bytes of a tar
WHOLE = as_tar(IMAGES)


@pytest.mark.parametrize(
    ("content", "names", "damaged"),
    [
        (WHOLE, "1234", 0),
        (WHOLE[:4000], "123", 0),  # within an image, which is then a bad file
        (WHOLE[:3072] + b"\xff" * 512 + WHOLE[3584:], "12", 3072),
        (WHOLE[:3172], "12", 3072),  # within a header
        (WHOLE + WHOLE, "1234", 6144),
    ],
    ids=["whole", "cut in an image", "a damaged header", "cut in a header", "two in a file"],
)
def test_where_a_tar_cannot_be_read_on_is_found(content, names, damaged):
    found = read_tar(io.BytesIO(content), "x.tar")
    assert "".join(name[0] for name in found.names) == names
    assert found.damaged == damaged


def test_images_behind_a_damaged_header_are_missed_aloud(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.tar").write_bytes(WHOLE + WHOLE)
    with caplog.at_level("INFO", "moco"):
        indexing.open_shards(DataConfig(dataset="shards", root=str(tmp_path)))
    assert "a.tar cannot be read on from byte 6144" in caplog.text


@pytest.mark.parametrize(
    ("value", "label"),
    [(2, "2"), (2.0, "2"), (2.5, "2.5"), (float("nan"), None), ([1], None), ("a", "a")],
)
def test_a_class_has_one_name_whatever_a_table_makes_of_it(value, label, tmp_path):
    assert read_tar(io.BytesIO(one_labelled(value)), "x.tar").labels == [label]
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from moco.images.shard_headers import read_parquet

    parquet.write_table(pa.table({"image": [b"x"], "label": [value]}), tmp_path / "x.parquet")
    with open(tmp_path / "x.parquet", "rb") as file:
        assert read_parquet(file, "x.parquet").labels == [label]


def test_labels_count_whatever_the_case_of_their_ending():
    members = {"1.JPG": b"x", "1.CLS": b"cat", "2.JPG": b"x", "2.Json": b'{"label": "dog"}'}
    found = read_tar(io.BytesIO(as_tar(members)), "x.tar")
    assert (found.names, found.labels) == (["1.JPG", "2.JPG"], ["cat", "dog"])
    without = read_tar(io.BytesIO(as_tar({"1.JPG": b"x", "2.JPG": b"x"})), "x.tar")
    assert found.checksum() == without.checksum(), "runs of a version that did not read them go on"


@pytest.mark.parametrize(
    ("value", "in_tar", "in_parquet"),
    [(2, "2", "2"), (2.0, None, "2.0"), (float("nan"), None, "nan"), ([1], None, "[1]")],
)
def test_a_run_of_an_older_version_finds_its_shards_again(value, in_tar, in_parquet, tmp_path):
    """What tells them from others counts labels as that version spelt them."""

    def checksum(found, label):
        return zlib.crc32(json.dumps([found.names, found.sizes, [label]]).encode(), found.starts)

    found = read_tar(io.BytesIO(one_labelled(value)), "x.tar")
    assert found.checksum() == checksum(found, in_tar)
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from moco.images.shard_headers import read_parquet

    parquet.write_table(pa.table({"image": [b"x"], "label": [value]}), tmp_path / "x.parquet")
    with open(tmp_path / "x.parquet", "rb") as file:
        found = read_parquet(file, "x.parquet")
    assert found.checksum() == checksum(found, in_parquet)


def test_a_process_of_an_older_version_can_read_the_index_on(tmp_path):
    """It runs while another one, of this version, writes into the index that both share."""
    index = Index(tmp_path / "index.sqlite")
    index.add([("x.tar", indexing.Facts(1, ""), read_tar(io.BytesIO(WHOLE), "x.tar"))])
    with index._open() as connection:
        ((kept,),) = connection.execute("select members from indexed").fetchall()
    known = {"names", "offsets", "sizes", "labels", "starts", "second", "foreign"}
    assert json.loads(zlib.decompress(kept)).keys() == known
    assert index.members("x.tar").names == [*IMAGES]


def test_a_class_in_another_unicode_form_is_the_same_class():
    other = unicodedata.normalize("NFD", "Bär")
    members = {"1.png": b"x", "1.cls": other.encode(), "2.png": b"x"}
    members["2.json"] = json.dumps({"label": other}).encode()
    assert read_tar(io.BytesIO(as_tar(members)), "x.tar").labels == ["Bär", "Bär"]


def test_links_that_are_passed_over_are_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.tar").write_bytes(WHOLE)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        kinds = {"5.png": tarfile.LNKTYPE, "6.png": tarfile.SYMTYPE, "1.cls": tarfile.SYMTYPE}
        for name, kind in (kinds | {"README": tarfile.SYMTYPE, ".7.png": tarfile.LNKTYPE}).items():
            item = tarfile.TarInfo(name)
            item.type, item.linkname = kind, "1.png"
            tar.addfile(item)
    with caplog.at_level("INFO", "moco"):
        found = indexing.open_shards(DataConfig(dataset="shards", root=str(tmp_path)))
    assert len(found) == 4
    assert "3 images or labels are passed over, since a shard holds a link" in caplog.text


def test_an_index_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    index = Index(tmp_path / "index.sqlite")
    found = [("x.tar", indexing.Facts(1, ""), read_tar(io.BytesIO(WHOLE), "x.tar"))]
    monkeypatch.setattr(index, "_open", full)
    with pytest.raises(RunError, match=r"index.sqlite cannot be used .*full.*set MOCO_CACHE"):
        index.add(found)
