"""Quality without labels while a run trains: which images, when, and the best checkpoint."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import write_pictures
from runs import TINY, as_after, assert_same_end, load, main_on_rank, run_tiny

import train
from moco.command import views
from moco.config import TrainConfig, UserError
from moco.evaluation.measures import MEASURES
from moco.images import sources
from moco.images.aside import set_aside
from moco.reports.facts import read_facts
from moco.reports.panel import make_panel
from moco.run_directory import BEST, HELD_OUT
from moco.training.agreement import Agreement
from moco.training.replay import replay
from moco.training.saving import Checkpoints, Signals

pytestmark = pytest.mark.usefixtures("in_tmp")
READ = ["--run.knn_every", "1"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """640 pictures in one folder, of which a tenth may be set aside."""
    root = tmp_path_factory.mktemp("many")
    write_pictures(root, [f"{i:03d}.png" for i in range(640)], np.random.default_rng(0))
    return root


@pytest.fixture(scope="module")
def done(many, tmp_path_factory):
    """A run of two epochs on them, which tests copy."""
    folder = tmp_path_factory.mktemp("done")
    run(many, run_dir=str(folder / "run"))
    return folder / "run"


def rows(run_dir: str = "run") -> list[dict[str, str]]:
    with open(f"{run_dir}/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["val/rankme"]]


def run(root, *words: str, **options) -> dict:
    return run_tiny(root, *READ, "--data.batch_size", "128", "--model.queue_size", "128", *words,
                    **options)  # fmt: skip


def test_a_set_without_a_split_is_measured_on_images_that_it_is_not_trained_on(many, said):
    result = run(many)
    names = Path("run", HELD_OUT).read_text().splitlines()
    assert len(names) == len(set(names)) == 64 and all(Path(name).is_file() for name in names)
    assert any("run.held_out: 64 of 640 images are not trained on" in line for line in said)
    assert result["steps"] == 2 * (576 // 128)
    read = rows()
    assert [row["step"] for row in read] == ["0", "4", "8"]
    for name in MEASURES:
        assert result["quality"][name] == round(float(read[-1][f"val/{name}"]), 2)
        assert result["quality"][f"{name}_at_start"] == round(float(read[0][f"val/{name}"]), 2)
    assert "of 64 held-out images another view the nearest of all" in " ".join(said)


def test_readings_change_no_bit_of_the_run(many, done):
    shutil.copytree(done, "run")
    run(many, "--run.knn_every", "0", run_dir="silent")
    assert_same_end("run", "silent")
    assert "val/rankme" in rows()[0] and not rows("silent")


def test_a_resumed_run_reads_what_a_whole_one_does(done):
    as_after(3, str(done))
    train.main(["--resume", "run"])
    assert rows() == rows(str(done))
    assert_same_end("run", str(done))


def test_another_number_held_out_is_another_run(done):
    shutil.copytree(done, "run")
    with pytest.raises(UserError, match="run.held_out is 0 but the run has 512"):
        train.main(["--resume", "run", "--run.held_out", "0"])


@pytest.mark.parametrize("budget", ["4", "0"], ids=["held", "streamed"])
def test_a_bad_file_among_the_held_out_counts_in_the_whole_set(many, done, budget, tmp_path, said):
    held = Path(done, HELD_OUT).read_text().splitlines()
    shutil.copytree(many, tmp_path / "copy")
    (tmp_path / "copy" / Path(held[9]).name).write_bytes(b"no image")
    words = ["--data.max_bad_fraction", "0.01", "--data.resident_budget", budget]
    words += ["--data.num_workers", "0", "--trainer.max_steps", "1"]
    result = run(tmp_path / "copy", *words, run_dir="other")  # 1 of 64, and of 640
    assert result["quality"]["rankme"] > 1
    assert any("1 of 64 images" in line and "cannot be read" in line for line in said)


def test_a_run_keeps_its_images_whatever_it_is_measured_on_later(done):
    as_after(3, str(done))
    rng = np.random.default_rng(1)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        write_pictures(Path("labelled", folder), ["0.png", "1.png"], rng)
    train.main(["--resume", "run", "--run.knn_root", "labelled"])
    assert_same_end("run", str(done))


def test_what_looks_at_a_run_later_numbers_the_images_as_it_did(many, done):
    shutil.copytree(done, "run")
    held = set(Path("run", HELD_OUT).read_text().splitlines())
    found = replay(Path("run"), 4)  # at which quality is read too
    assert found["exact"] and found["loss"] == pytest.approx(found["logged_loss"], rel=1e-5)
    assert not held & {image["file"] for image in found["images"]}
    facts = read_facts(Path("run"))
    panel = make_panel(facts, 8, "", 0)
    assert dict(panel.about)["images"].startswith("576 of")
    views.main([*TINY, "--data.root", str(many), "--output", "pairs.png"])


def test_a_run_of_a_version_that_set_none_aside_goes_on_with_all_images():
    assert TrainConfig.from_dict({"run": {"seed": 1}}).run.held_out == 0


def test_sets_of_few_images_lose_none(many):
    source = sources.open_source(TrainConfig().data.__class__(root=str(many)), "train")
    for count, most, aside in ((639, 512, 0), (640, 512, 64), (640, 10, 10), (640, 0, 0)):
        kept, held = set_aside(source.rows(torch.arange(count)), most, seed=1)
        assert (len(kept), len(held or [])) == (count - aside, aside)
        assert not held or not set(kept.paths) & set(held.paths)
    again = set_aside(source, 10, seed=1)[1].paths
    assert again == set_aside(source, 10, seed=1)[1].paths
    assert again != set_aside(source, 10, seed=2)[1].paths


def test_the_best_checkpoint_is_that_of_the_best_reading(many, monkeypatch):
    values = iter([5.0, 9.0, 7.0, 8.0])
    monkeypatch.setitem(MEASURES, "lidar", (lambda features: next(values), True))
    run(many, "--run.select", "lidar", "--trainer.max_epochs", "3", "--run.keep_checkpoints", "1")
    assert load(f"run/checkpoints/{BEST}")["global_step"] == 4
    assert load("run/checkpoints/last.ckpt")["global_step"] == 12
    values = iter([6.0, 9.5])
    train.main(["--resume", "run", "--extend", "2", "--yes"])  # 9.0 was the best before
    assert load(f"run/checkpoints/{BEST}")["global_step"] == 20


def test_a_checkpoint_is_the_best_by_the_reading_of_its_own_step(tmp_path):
    """Its file may be written whole only when the state of a later step is taken."""
    written = []
    trainer = SimpleNamespace(
        global_step=4,
        is_global_zero=True,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        save_checkpoint=lambda path, storage_options: written.append((path, storage_options)),
    )
    best, metrics = SimpleNamespace(is_best=True), SimpleNamespace(paused=0.0)
    saver = Checkpoints(Signals(), metrics, best, tmp_path, TrainConfig().run, 0, {}, Agreement())
    for trainer.global_step, best.is_best in ((4, True), (8, True), (9, False)):
        saver.save(trainer)
    for path, after in written[:1] + written[2:]:  # the disk was full for the second
        path.write_bytes(path.name.encode())
        after(path)
    assert (tmp_path / BEST).read_bytes() == b"step_000000004.ckpt"
    assert (tmp_path / "last.ckpt").read_bytes() == b"step_000000009.ckpt"


def test_where_less_is_better_the_least_is_the_best(many, monkeypatch):
    values = iter([5.0, 9.0, 7.0])
    monkeypatch.setitem(MEASURES, "alignment", (lambda features: next(values), False))
    run(many, "--run.select", "alignment")
    assert load(f"run/checkpoints/{BEST}")["global_step"] == 8


@pytest.mark.parametrize(
    ("name", "missing"), [("knn_top1", "labels"), ("rankme", "held-out images")]
)
def test_a_reading_that_is_never_taken_chooses_nothing(images, name, missing):
    with pytest.raises(UserError, match=f"never read here, since there are no {missing}"):
        run_tiny(images, *READ, "--run.select", name)
    with pytest.raises(UserError, match=f"run.select is '{name}', and run.knn_every 0 reads nothi"):
        run_tiny(images, *READ, "--run.select", name, "--run.knn_every", "0")


def test_labelled_sets_are_measured_on_their_test_images():
    small = ["--data.dataset", "digits", "--data.image_size", "16", "--data.upscale", "2"]
    result = train.main([*TINY, *small, *READ, "--data.batch_size", "400", "--run.knn_k", "5",
                         "--model.queue_size", "400", "--trainer.max_epochs", "1"])  # fmt: skip
    assert result["quality"]["rankme"] > 1 and not list(Path("runs").glob(f"*/{HELD_OUT}"))


def _without_labels(words, folder):
    """Open the labelled images on ranks, of which the second cannot; return what each raises."""
    from moco.distributed import rank

    def gone(*_):
        raise UserError("run.knn_root is not on this machine")

    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr("moco.training.build.open_labelled", gone)
        try:
            main_on_rank("train", words, folder)
        except UserError as error:
            return str(error)


def test_what_one_rank_cannot_open_ends_all_before_they_meet(two_ranks, tmp_path):
    for split, count in (("train", 48), ("test", 16)):
        (tmp_path / "images" / split).mkdir(parents=True)
        names = [f"{split}/{number:02d}.png" for number in range(count)]
        write_pictures(tmp_path / "images", names, np.random.default_rng(0))
    words = [*TINY, "--data.root", str(tmp_path / "images"), "--run.dir", "run"]
    words += ["--model.key_bn", "plain", "--run.knn_every", "1"]
    assert (
        two_ranks.run(_without_labels, words, str(tmp_path))
        == ["rank 1: run.knn_root is not on this machine"] * 2
    )
