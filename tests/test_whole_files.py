"""Whole files: whole at their place or not there, and one line that says why."""

import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from moco.config import RunError, UserError
from moco.evaluation.gallery import Cell, draw_sheet
from moco.reports.pictures import draw_rows
from moco.whole_files import explained, output_file, whole_file


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("content")
        assert temporary.parent == tmp_path and not path.exists()
    assert path.read_text() == "content" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyError, KeyboardInterrupt])
def test_a_failure_leaves_the_file_before(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("before")
    kind = type(failure) if isinstance(failure, OSError) else failure
    with pytest.raises(kind), whole_file(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_a_link_is_followed_and_permissions_stay(tmp_path):
    target, link, new = tmp_path / "real.csv", tmp_path / "link.csv", tmp_path / "new.csv"
    target.write_text("before")
    target.chmod(0o400)
    link.symlink_to(target)
    new.symlink_to(tmp_path / "made.csv")
    for path in (link, new):
        with output_file(path) as temporary:
            temporary.write_text("after")
        assert path.is_symlink() and path.resolve().read_text() == "after"
    assert target.stat().st_mode & 0o777 == 0o400


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    place = pytest.raises(UserError, match="pipe is no regular file: choose another place")
    with place, output_file(tmp_path / "pipe") as temporary:
        temporary.write_text("lost")
    assert (tmp_path / "pipe").is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("letter", ["a", "\N{EURO SIGN}"])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, letter):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    with output_file(path) as temporary:
        temporary.write_text("content")
    assert path.read_text() == "content"


def test_what_never_wrote_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt"):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left"), RunError, "No space left; make room"),
        (OSError(errno.EDQUOT, "Quota exceeded"), RunError, "make room"),
        (OSError("a library's own words"), RunError, "a library's own words; make room"),
        (PermissionError(errno.EACCES, "Permission denied"), UserError, "choose another place"),
    ],
)
def test_what_is_wrong_is_one_line(error, kind, remedy):
    with (
        pytest.raises(kind, match=f"place/a.png cannot be written: .*{remedy}"),
        explained(Path("place/a.png")),
    ):
        raise error


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: draw_rows(path, [("row", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))], ["a"]),
        lambda path: draw_sheet(path, [[Cell(Image.new("RGB", (8, 8)), "a", "green")]]),
    ],
)
def test_pictures_say_what_is_wrong(tmp_path, monkeypatch, draw):
    path = tmp_path / "a.png"
    draw(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="a.png cannot be written: No space left on device"):
        draw(path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
