"""What kNN reads while a run trains: which layer, which images vote, when, and on several ranks."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import write_pictures
from pytorch_lightning.plugins import Precision
from runs import TINY, load
from steps import SIZE, make_module

import eval_knn
import train
from moco import distributed
from moco.config import RunConfig
from moco.training import monitor
from moco.training.monitor import KNNMonitor
from moco.training.saving import Signals

pytestmark = pytest.mark.usefixtures("in_tmp")
DIGITS = [
    *TINY,
    *("--data.dataset", "digits", "--data.image_size", "16", "--data.upscale", "2"),
    *("--data.batch_size", "256", "--model.queue_size", "256", "--trainer.max_epochs", "1"),
    *("--run.knn_every", "1", "--run.knn_k", "5", "--run.dir", "run"),
]


@pytest.fixture(autouse=True)
def one_draw(monkeypatch):
    """Draw no untrained network beside the run's own."""
    monkeypatch.setattr(monitor, "SHARE", 0.0)


@pytest.mark.parametrize("layer", ["backbone", "head"])
def test_the_layer_that_was_asked_for_is_read_as_evaluation_reads_it(layer, said):
    result = train.main([*DIGITS, "--run.knn_layer", layer])
    words = ["--checkpoint", "run/checkpoints/last.ckpt", "--layer", layer, "--baselines", "false"]
    scores = eval_knn.main([*words, "--k", "[5]"])
    assert result["knn_top1"] == pytest.approx(scores["top1"], abs=0.01)
    title = "kNN (k 5, head)" if layer == "head" else "kNN (k 5)"
    assert any(title in line for line in said)


def test_only_some_images_of_a_large_set_vote(said):
    result = train.main([*DIGITS, "--run.knn_bank", "100"])
    assert "run.knn_bank: 100 of 1257 training images vote" in said
    assert result["knn_top1"] < train.main([*DIGITS, "--run.dir", "all"])["knn_top1"]


def test_a_run_may_begin_without_a_reading():
    result = train.main([*DIGITS, "--run.knn_first", "false"])
    with open("run/metrics.csv") as file:
        read = [row["step"] for row in csv.DictReader(file) if row["val/knn_top1"]]
    assert read == ["4"] and result["knn_top1"] > 0
    assert result["knn_top1_untrained"] is None and "untrained" not in result["comparison"]
    assert load("run/checkpoints/last.ckpt")["callbacks"]["KNNMonitor"]["first"] is None


class Spread:
    """Labelled images of which each rank has every W-th."""

    source, config = SimpleNamespace(classes=["a", "b", "c"]), None

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, SIZE, SIZE, generator=generator).double()

    def __len__(self):
        return len(self.images)

    def batches(self, device):
        rows = torch.arange(distributed.rank(), len(self), distributed.world_size())
        yield self.images[rows], rows

    def labels(self, rows):
        return rows % 3


def _hits() -> list[int]:
    """Read kNN of one network over images that the ranks share."""
    module = make_module()
    shown = SimpleNamespace(paused=0.0, publish=lambda *args: None)
    reader = KNNMonitor((Spread(31, 0), Spread(17, 1)), RunConfig(knn_k=9), shown, Signals())
    trainer = SimpleNamespace(global_step=3, precision_plugin=Precision())
    return reader.judge(trainer, module.device, module.query_encoder.backbone).tolist()


def test_several_ranks_read_what_one_does(two_ranks):
    alone = _hits()
    assert set(alone) == {0, 1}
    assert two_ranks.run(_hits) == [alone, alone]


def test_readings_of_another_set_or_kind_are_not_compared_with_those_before(images, said):
    rng = np.random.default_rng(0)
    for root, count in (("one", 12), ("two", 9)):
        for folder in ("train/a", "train/b", "test/a", "test/b"):
            write_pictures(Path(root, folder), [f"{n}.png" for n in range(count)], rng)
    words = [*TINY, "--data.root", str(images), "--run.knn_every", "1", "--run.knn_k", "5"]
    train.main([*words, "--run.knn_root", "one", "--run.select", "knn_top1", "--run.dir", "run"])
    changes = (["--run.knn_root", "two"], ["--run.knn_k", "3"], ["--run.knn_layer", "head"])
    for number, change in enumerate([[], *changes]):
        shutil.copytree("run", f"run{number}")
        for path in Path(f"run{number}/checkpoints").iterdir():
            if path.name != "step_000000003.ckpt":
                path.unlink()
        result = train.main(["--resume", f"run{number}", *change])
        compared = ["untrained" in result["comparison"], "rankme_at_start" in result["quality"]]
        assert compared == [not change, number != 1], change
        assert any("reads other images than before" in x for x in said) == bool(number), change
        best = load(f"run{number}/checkpoints/step_000000003.ckpt")["callbacks"]["Quality"]["best"]
        state = load(f"run{number}/checkpoints/last.ckpt")["callbacks"]["Quality"]
        read = result["knn_top1"]
        wanted = read if change else max(best, read)
        assert state["best"] == pytest.approx(wanted, abs=0.01), change
