"""Images that cannot be read: left out, counted, named, or an error above a share."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from runs import load, run_tiny

import train
from moco.config import DataConfig, UserError
from moco.images.bad_files import BadFiles, _spread
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.steps import StepLoader

pytestmark = pytest.mark.usefixtures("in_tmp")


def damage(folder: Path) -> dict[str, str]:
    """Break five files in five ways; return what each is called in the end."""
    first = (folder / "00.jpg").read_bytes()
    (folder / "00.jpg").write_bytes(first[: len(first) // 2])
    (folder / "01.jpg").write_bytes(b"")
    (folder / "02.jpg").write_text("no image")
    (folder / "03.jpg").unlink()
    (folder / "03.jpg").symlink_to("nowhere.jpg")
    bomb = (folder / "04.jpg").read_bytes()
    place = bomb.index(b"\xff\xc0") + 5  # height and width in the frame header
    (folder / "04.jpg").write_bytes(bomb[:place] + b"\xff\xff\xff\xff" + bomb[place + 4 :])
    return {
        "00.jpg": "cannot be decoded", "01.jpg": "is empty", "02.jpg": "is no image",
        "03.jpg": "No such file", "04.jpg": "limit of 178956970 pixels",
    }  # fmt: skip


@pytest.mark.parametrize("resident", ["memory", "off"])
def test_bad_files_are_left_out_counted_and_named(copied, resident):
    reasons = damage(copied)
    arguments = ["--data.resident", resident, "--data.num_workers", "0"]
    # The 43 others fill two batches of an epoch if resident; streamed, others stand in.
    result = run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.11")
    assert result["steps"] == (6 if resident == "off" else 4)
    lines = dict(line.split("\t") for line in Path("run/bad_files.txt").read_text().splitlines())
    assert {Path(path).name for path in lines} == set(reasons)
    for path, reason in lines.items():
        assert reasons[Path(path).name] in reason
    with pytest.raises(UserError, match=r"of 48 images.*max_bad_fraction \(now 0\)"):
        run_tiny(copied, *arguments, run_dir="strict")


EVERY_FILE = ["00.jpg", "01.jpg", "02.jpg", "03.jpg", "04.jpg"]
OFF = ["--data.resident", "off", "--data.num_workers", "0"]


def test_all_bad_files_of_a_streamed_set_are_named_at_once_before_the_first_step(copied, said):
    damage(copied)
    with pytest.raises(UserError, match="^5 of 48 images") as error:
        run_tiny(copied, *OFF)
    assert all(name in str(error.value) for name in EVERY_FILE)
    named = Path("run/bad_files.txt").read_text().splitlines()
    assert [Path(line.split("\t")[0]).name for line in named] == EVERY_FILE
    assert not Path("run/config.yaml").exists(), "the run has not begun"


def test_what_headers_show_is_told_in_one_line_before_the_first_step(copied, said):
    first = (copied / "00.jpg").read_bytes()
    damage(copied)
    (copied / "00.jpg").write_bytes(first[:-40])  # its header is whole
    run_tiny(copied, *OFF, "--data.max_bad_fraction", "0.2")
    lines = [line for line in said if "cannot be read and are left out" in line]
    network = next(line for line in said if "M parameters" in line)
    assert lines[0].startswith("4 of 48 images") and said.index(lines[0]) < said.index(network)
    assert all(name in lines[0] for name in EVERY_FILE[1:])
    assert len(lines) == 2 and lines[1].startswith("5 of 48 images") and EVERY_FILE[0] in lines[1]


def test_ten_bad_files_are_named_and_the_rest_counted(copied):
    for path in sorted(copied.iterdir())[:13]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"13 of 48 .*09.jpg: is empty; and 3 more \(all are"):
        run_tiny(copied, *OFF)
    assert len(Path("run/bad_files.txt").read_text().splitlines()) == 13


def test_headers_are_looked_at_for_a_bounded_time_from_all_parts_of_the_set(
    copied, monkeypatch, said
):
    damage(copied)
    monkeypatch.setattr("moco.images.bad_files.HEADERS_S", -1)
    run_tiny(copied, *OFF, "--data.max_bad_fraction", "0.2")
    assert any("the headers of 0 of 48 images were looked at" in line for line in said)
    assert len(Path("run/bad_files.txt").read_text().splitlines()) == 5, "met while streaming"
    order = _spread(1000)
    assert sorted(order) == [*range(1000)] and order[:3] == [0, 16, 32]


def _look_on_rank(root: str) -> str:
    config = DataConfig(root=root, image_size=16, batch_size=16, resident="off")
    data = PretrainData(config, seed=3, shuffle=False, symmetric=False)
    data.prepare(torch.device("cpu"))
    try:
        data.bad.look_ahead()
    except UserError as error:
        return str(error)
    return ""


def test_ranks_share_the_headers_and_tell_what_all_have_found(copied, two_ranks):
    damage(copied)
    first, second = two_ranks.run(_look_on_rank, str(copied))
    assert all(name in first for name in EVERY_FILE)
    assert "5 of 48 images" in second, "all ranks stop"


def test_a_run_without_its_directory_leaves_no_list_of_bad_files_there(copied, monkeypatch):
    damage(copied)

    def is_held(*_):
        raise UserError("in use")

    monkeypatch.setattr("moco.run_directory._lock", is_held)
    Path("run").mkdir()
    with pytest.raises(UserError, match="in use"):
        run_tiny(copied, "--data.resident", "memory", "--data.max_bad_fraction", "0.2")
    assert not Path("run/bad_files.txt").exists()


def crops_of(root, position: int = 0, **changes) -> list[torch.Tensor]:
    config = DataConfig(
        root=str(root), image_size=16, batch_size=16, resident="off", max_bad_fraction=1,
        **{"num_workers": 0} | changes,
    )  # fmt: skip
    data = PretrainData(config, seed=3, shuffle=False, symmetric=False)
    data.prepare(torch.device("cpu"))
    try:
        loader = StepLoader(data, lambda: position)
        return [batch.crops for batch in loader]
    finally:
        loader.close()


def _crops_on_rank(root: str) -> list[np.ndarray]:
    return [crops.numpy() for crops in crops_of(root)]


def test_what_stands_in_for_a_bad_file_depends_on_no_worker_and_no_rank(
    copied, two_ranks, tmp_path
):
    whole = crops_of(copied)
    damage(copied)
    alone = crops_of(copied)
    places = [
        (i, j) for i, (a, b) in enumerate(zip(whole, alone, strict=True))
        for j in range(16) if not a[j].equal(b[j])
    ]  # fmt: skip
    assert len(places) == 5, "five bad files change five rows and no others"
    assert all(map(torch.Tensor.equal, alone, crops_of(copied, num_workers=2)))
    first, second = two_ranks.run(_crops_on_rank, str(copied))
    for a, b, c in zip(alone, first, second, strict=True):
        assert (a.numpy() == np.concatenate([b, c])).all()


class DeleteAfter(pl.Callback):
    """Delete files once a step has been trained."""

    def __init__(self, step: int, paths: list[Path]) -> None:
        self.step, self.paths = step, paths

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            for path in self.paths:
                path.unlink()


def test_files_deleted_during_training(copied, with_callback):
    gone = sorted(copied.iterdir())[:4]
    with_callback(DeleteAfter(3, gone))
    arguments = ["--data.resident", "off", "--data.num_workers", "0"]
    assert run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.1")["steps"] == 6
    named = Path("run/bad_files.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in named} == {str(path) for path in gone}


def test_a_bad_file_is_named_once_however_often_the_run_is_resumed(copied):
    reasons = damage(copied)
    arguments = ["--data.resident", "off", "--data.num_workers", "0"]
    run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.2")
    train.main(["--resume", "run/checkpoints/step_000000001.ckpt"])
    named = Path("run/bad_files.txt").read_text().splitlines()
    assert len(named) == len(reasons)


def _bad_on_rank(paths: list[str], most: float, report: str) -> tuple[list[str], str]:
    """Meet one bad file on each rank and another on both; return what is logged and raised."""
    rank, lines = torch.distributed.get_rank(), []
    bad = BadFiles(ImageSource("set", None, paths, None, [], 3), most, report)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("moco").addHandler(handler)
    try:
        bad.agree()
        bad.note([(rank, "is empty"), (2, "is no image")])
        assert not lines, "nothing is said before all have met"
        bad.agree()
        bad.agree()
        return lines, ""
    except UserError as error:
        return lines, str(error)
    finally:
        logging.getLogger("moco").removeHandler(handler)


def test_ranks_count_bad_files_together_and_name_each_once(two_ranks, tmp_path, copied):
    paths = sorted(map(str, copied.iterdir()))[:10]
    report = tmp_path / "bad_files.txt"
    (first, _), (second, _) = two_ranks.run(_bad_on_rank, paths, 0.3, str(report))
    assert len(first) == 1 and "3 of 10 images of set cannot be read" in first[0]
    assert second == []
    named = [line.split("\t")[0] for line in report.read_text().splitlines()]
    assert sorted(named) == paths[:3]
    (_, said_0), (_, said_1) = two_ranks.run(_bad_on_rank, paths, 0.2, str(report))
    assert "3 of 10" in said_0 and "3 of 10" in said_1, "all ranks stop"
    assert len(report.read_text().splitlines()) == 3


def test_too_many_deleted_files_stop_the_run_with_its_state_saved(copied, with_callback):
    gone = sorted(copied.iterdir())
    with_callback(DeleteAfter(3, gone[1:]))
    arguments = ["--data.resident", "off", "--data.num_workers", "0"]
    arguments += ["--run.checkpoint_every", "100"]
    with pytest.raises(UserError, match=r"of 48 images.*mend them, and go on with --resume"):
        run_tiny(copied, *arguments, "--data.max_bad_fraction", "0.1")
    assert load("run/checkpoints/last.ckpt")["global_step"] == 3
