"""Features are written in parts: what was stopped goes on, and ends in the same bytes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from embedding import FAST, Stopped, embed, in_small_parts, stop
from processes import finish, start, wait_for
from runs import main_on_rank

from moco.config import UserError
from moco.reports import parts

pytestmark = pytest.mark.usefixtures("in_tmp")


def vectors_of(folder):
    return Path(folder, "features.parquet").read_bytes()


def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_bytes(
    ckpt, images, small_parts, monkeypatch, said
):
    embed(ckpt, images, "whole")
    written, stops = [], [True]
    write = parts._write_part

    def stopped(job, first, features):
        if first == 16 and stops:
            stops.clear()
            next(features)  # a batch of the part is computed, and lost
            raise KeyboardInterrupt
        written.append(first)
        write(job, first, features)

    monkeypatch.setattr(parts, "_write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        embed(ckpt, images, "out")
    assert not Path("out/features.parquet").exists()
    embed(ckpt, images, "out")
    assert written == [0, 16, 32], "what was there is not computed again"
    assert "going on: 1 of 3 parts are there" in said
    assert vectors_of("out") == vectors_of("whole") and not Path("out/.parts").exists()


HELD = """
import signal
from pathlib import Path
from moco.command import cli
from moco.command.embed import main
from moco.reports import parts
parts._BATCH, parts._PART_BATCHES, write = 8, 2, parts._write_part
def hold(job, start, features):
    if start == 32:
        next(features)
        Path("held").touch()
        signal.pause()
    write(job, start, features)
parts._write_part = hold
cli.run_main(main)
"""


def test_kill_9_in_the_middle_and_go_on(ckpt, images, small_parts):
    embed(ckpt, images, "whole")
    Path("held.py").write_text(HELD)
    words = ["--checkpoint", str(ckpt), "--output", "out", *FAST, "--data.root", str(images)]
    process = start(*words, script=Path("held.py").absolute(), cwd=Path.cwd())
    wait_for("held", process)
    process.send_signal(signal.SIGKILL)
    code, _, _ = finish(process)
    assert code == -signal.SIGKILL and not Path("out/features.parquet").exists()
    assert sorted(p.name for p in Path("out/.parts").glob("0*")) == [
        "000000000000.parquet",
        "000000000016.parquet",
    ]
    embed(ckpt, images, "out")
    assert vectors_of("out") == vectors_of("whole")


def embed_on_rank(words, folder):
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        return main_on_rank("moco.command.embed", words, folder)


def test_two_ranks_write_the_same_file(ckpt, images, small_parts, two_ranks, tmp_path):
    embed(ckpt, images, "one")
    words = ["--checkpoint", str(ckpt), "--output", "two", *FAST, "--data.root", str(images)]
    (first, _), (second, _) = two_ranks.run(embed_on_rank, words, str(tmp_path))
    assert first["images"] == 48 and second == {}
    assert vectors_of("two") == vectors_of("one")


def test_two_ranks_agree_on_what_cannot_be_read(ckpt, copied, two_ranks, tmp_path):
    for name in ("03.jpg", "40.jpg", "41.jpg"):
        content = (copied / name).read_bytes()
        (copied / name).write_bytes(content[: len(content) // 2])  # whose headers are whole
    words = ["--checkpoint", str(ckpt), "--output", "two", *FAST, "--data.root", str(copied)]
    words += ["--data.max_bad_fraction", "0.1"]
    (first, said), _ = two_ranks.run(embed_on_rank, words, str(tmp_path))
    assert first["unread"] == 3 and len(Path("two/bad_files.txt").read_text().splitlines()) == 3
    assert any("3 of 48 images" in line and "03.jpg" in line for line in said)


def test_parts_without_a_plan_are_computed_anew(ckpt, images, monkeypatch):
    """As where a kill came while the parts of other features were removed."""
    embed(ckpt, images, "whole")
    with monkeypatch.context() as patch:
        patch.setattr("moco.reports.embed.join", stop)
        with pytest.raises(Stopped):
            embed(ckpt, images, "out", "--encoder", "key")
    Path("out/.parts/plan.json").unlink()
    embed(ckpt, images, "out")
    assert vectors_of("out") == vectors_of("whole")


def test_parts_of_other_features_are_refused(ckpt, images, monkeypatch):
    monkeypatch.setattr("moco.reports.embed.join", stop)
    with pytest.raises(Stopped):
        embed(ckpt, images, "out")
    with pytest.raises(UserError, match=r"out/.parts/plan.json is of other features"):
        embed(ckpt, images, "out", "--encoder", "key")


def test_features_stay_until_those_that_replace_them_are_whole(ckpt, images, monkeypatch, said):
    embed(ckpt, images, "out", "--index")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    other = ("--features", "head", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr("moco.reports.embed.join", stop)
        with pytest.raises(Stopped):
            embed(ckpt, images, "out", *other)
    assert {p.name: p.read_bytes() for p in Path("out").iterdir() if p.is_file()} == before
    assert embed(ckpt, images, "out", *other)["shape"] == [16]
    assert "going on: 1 of 1 parts are there" in said
    assert [path.name for path in Path("out").iterdir()] == ["features.parquet"]


def test_a_plan_without_parts_holds_nobody_up(ckpt, images, tmp_path):
    """As where an image could not be read: it was to be mended, and the command given again."""
    root = shutil.copytree(images, tmp_path / "set")
    (root / "00.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        embed(ckpt, root, "out")
    shutil.copyfile(images / "00.jpg", root / "00.jpg")
    assert embed(ckpt, root, "out")["images"] == 48
    assert [path.name for path in Path("out").iterdir()] == ["features.parquet"]


def test_features_outlive_a_failed_start_of_others(ckpt, images, tmp_path):
    """The list of what it could not read goes when the features are asked for again."""
    embed(ckpt, images, "out")
    root = shutil.copytree(images, tmp_path / "set")
    (root / "00.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        embed(ckpt, root, "out", "--overwrite")
    assert Path("out/bad_files.txt").exists()
    Path("out/.parts/000000000000.parquet").touch()  # as of a part that was done
    assert embed(ckpt, images, "out")["images"] == 48
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == [".parts", "features.parquet"], "what others have begun is theirs"
