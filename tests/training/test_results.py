"""The figures that a run returns: of which step they are, and what was not read."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pictures import write_pictures
from processes import ROOT
from pytorch_lightning.plugins import Precision
from runs import run_tiny
from steps import SIZE, make_module

import train
from moco import distributed
from moco.config import DataConfig, ModelConfig, RunConfig, UserError
from moco.images.growth import Growth
from moco.training import announce, metrics, monitor, saving, showing
from moco.training.metrics import MetricsLogger, Progress
from moco.training.monitor import KNNMonitor
from moco.training.saving import Signals

pytestmark = pytest.mark.usefixtures("in_tmp")

DIGITS = [
    *("--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.precision", "32-true"),
    *("--model.width", "0.125", "--model.queue_size", "500", "--data.batch_size", "400"),
    *("--run.knn_every", "1", "--trainer.max_epochs", "2", "--optim.warmup_epochs", "0"),
    *("--run.report", "false"),
]  # three steps an epoch


class StopIn(pl.Callback):
    """Send SIGTERM in one step, and make each take a fifth of a second."""

    def __init__(self, step: int, seconds: float = 0.2) -> None:
        self.step, self.seconds = step, seconds

    def on_train_batch_start(self, trainer, *args) -> None:
        time.sleep(self.seconds)
        if trainer.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_run_reports_no_reading_of_the_untrained_network_as_its_own(with_callback):
    with_callback(StopIn(2))
    stopped = train.main([*DIGITS, "--run.dir", "run"])
    assert stopped["steps"] == 2 and stopped["knn_top1_untrained"] > 50
    assert (stopped["knn_top1"], stopped["knn_top1_step"]) == (None, None)
    assert stopped["knn_top1_untrained_draws"] == 1
    assert stopped["loss_step"] == 1 and stopped["loss"] > 0
    assert stopped["images_per_second"] < 400 / 0.2, "not the images of two steps by one's seconds"
    with_callback(StopIn(5))
    again = train.main(["--resume", "run"])
    assert (again["steps"], again["knn_top1_step"]) == (5, 3)
    assert again["loss"] is again["loss_step"] is None, "no reading since the resume"
    assert again["knn_top1_untrained"] == stopped["knn_top1_untrained"]


def test_a_first_reading_of_loaded_weights_is_named_for_them(with_callback):
    first = train.main([*DIGITS, "--run.dir", "first", "--trainer.max_epochs", "1"])
    assert first["knn_top1_step"] == first["loss_step"] == first["steps"] == 3
    with_callback(StopIn(1, 0))
    started = [*DIGITS, "--run.dir", "run", "--init_from", "first/checkpoints/last.ckpt"]
    for result in (train.main(started), train.main(["--resume", "run"])):
        assert result["knn_top1_init_from"] == first["knn_top1"]
        assert not [name for name in result if "untrained" in name]


def draws_cost(monkeypatch, share, most=3):
    """Let untrained networks take a share of the training time: 0, or more than they need."""
    monkeypatch.setattr(monitor, "SHARE", share)
    monkeypatch.setattr(monitor, "MOST_DRAWS", most)


ALL = 1e9


def test_a_run_ends_with_the_table_and_the_verdict(monkeypatch, said):
    draws_cost(monkeypatch, ALL)
    result = train.main([*DIGITS, "--run.dir", "run"])
    found = result["comparison"]
    assert (found["score"], found["test_images"]) == ("kNN (k 20)", 540)
    assert found["trained"]["top1"] == result["knn_top1"]
    assert found["untrained"]["top1"] == result["knn_top1_untrained"]
    assert found["untrained"]["draws"] == result["knn_top1_untrained_draws"] == 3
    assert len(set(found["untrained"]["top1_of_draws"])) == 3
    assert 90 < found["raw_pixels"]["top1"] < 99 and result["ten_shot_raw_pixels"] > 80
    table = said.index(next(line for line in said if line.startswith("kNN (k 20), 540 test")))
    assert max(map(len, said[table:])) <= 60
    assert " ".join(said[table + 5 :]) == found["sentence"]
    assert "so take model.queue_size 400; train longer" in found["sentence"]


def test_further_networks_are_drawn_only_where_training_took_far_longer(monkeypatch):
    draws_cost(monkeypatch, 0)
    result = train.main([*DIGITS, "--run.dir", "run"])
    with open("run/metrics.csv") as file:
        start = float(next(csv.DictReader(file))["val/knn_top1"])
    assert result["knn_top1_untrained"] == round(start, 2)
    assert result["comparison"]["untrained"]["draws"] == result["knn_top1_untrained_draws"] == 1


def test_a_resumed_run_compares_with_the_network_that_it_began_with(monkeypatch, with_callback):
    with_callback(StopIn(5, 0))
    train.main([*DIGITS, "--run.dir", "run"])
    draws_cost(monkeypatch, 0)
    old = Path("run/checkpoints/last.ckpt")
    stored = torch.load(old, weights_only=True)
    first = train.main(["--resume", "run"])["comparison"]["untrained"]
    assert first["draws"] == 1
    # An older version kept no hits, so that the same seed gives the network again.
    shutil.rmtree("run")
    old.parent.mkdir(parents=True)
    del stored["callbacks"]["KNNMonitor"]["first_hits"]
    torch.save(stored, old)
    draws_cost(monkeypatch, ALL, most=1)
    again = train.main(["--resume", str(old)])
    assert again["comparison"]["untrained"] == first


def test_weights_that_a_run_started_from_are_compared_with(monkeypatch, said):
    draws_cost(monkeypatch, 0)
    short = [*DIGITS, "--trainer.max_epochs", "1"]
    first = train.main([*short, "--run.dir", "first"])
    started = ["--run.dir", "run", "--init_from", "first/checkpoints/last.ckpt"]
    result = train.main([*short, *started])
    assert result["comparison"]["the_weights_it_started_from"]["top1"] == first["knn_top1"]
    assert "untrained" not in result["comparison"]
    draws_cost(monkeypatch, ALL, most=2)
    result = train.main([*short, *started[:-2], "--run.dir", "other", *started[-2:]])
    assert result["comparison"]["untrained"]["draws"] == 2
    assert result["knn_top1_init_from"] == first["knn_top1"]


def test_a_signal_ends_the_drawing_of_networks(monkeypatch, with_callback):
    """It comes in the last step, so that the run is finished, and its verdict is said at once."""
    draws_cost(monkeypatch, ALL)
    with_callback(StopIn(6, 0))
    result = train.main([*DIGITS, "--run.dir", "run"])
    assert result["steps"] == 6 and "stopped_by" not in result
    assert result["comparison"]["untrained"]["draws"] == 1


def test_a_stopped_run_says_no_verdict(with_callback, said):
    with_callback(StopIn(4, 0))
    result = train.main([*DIGITS, "--run.dir", "run"])
    assert result["stopped_by"] and result["comparison"] is None
    assert not any("test images" in line or "erdict" in line for line in said)


@pytest.mark.parametrize(
    "every,words", [("1", "no labelled train and test"), ("0", "knn_every is 0")]
)
def test_without_labels_what_was_read_instead_is_told(images, said, every, words):
    result = run_tiny(images, "--run.knn_every", every)
    lines = said[next(n for n, line in enumerate(said) if line.startswith("No verdict: ")) :]
    text = " ".join(lines)
    assert words in text and max(map(len, lines)) <= 60
    assert f"loss {result['loss']:.2f} (of a network that cannot tell images apart 3.71)" in text
    assert re.search(r"the own key first in \d+% of queries, spread \d\.\d\d", text)
    assert result["comparison"] is None


@pytest.mark.parametrize(
    "latest,words",
    [
        ({"train/spread": 0.01}, "nearly one point (train/spread 0.01), so lower optim.lr"),
        ({"train/loss": 5.0, "train/chance_loss": 4.9}, "loss is not below that of chance"),
        ({"train/loss": 4.0, "train/chance_loss": 4.9, "train/spread": 0.9}, ""),
    ],
)
def test_what_the_last_readings_show_is_found(latest, words):
    model, data = ModelConfig(queue_size=64), DataConfig(batch_size=16)
    run = SimpleNamespace(
        metrics=SimpleNamespace(latest=latest),
        module=SimpleNamespace(model_config=model),
        data=SimpleNamespace(config=data, source=range(6000)),
    )
    found = announce._findings(run)
    assert len(found) == bool(words) and words in "".join(found)
    run.data.source = range(100)
    assert "take model.queue_size 16" in announce._findings(run)[-1]


@pytest.mark.parametrize(
    ("sizes", "starts", "left"), [((32,), (0,), 20.0), ((16, 32), (0, 4), 80.0)]
)
def test_the_time_left_counts_larger_views_to_come_and_not_what_the_first_batch_took(
    capsys, sizes, starts, left
):
    data = SimpleNamespace(
        config=SimpleNamespace(batch_size=16), growth=Growth(sizes, starts), wait_seconds=0.0
    )
    logger = MetricsLogger(data, every=1000)
    progress = Progress(logger)
    module = SimpleNamespace(total_steps=10, steps_per_epoch=5, wants_metrics=False)
    trainer = SimpleNamespace(is_global_zero=True, global_step=1)
    logger.on_train_start(trainer, module)
    progress.on_train_start(trainer, module)
    module.window_end = lambda batch: batch // 2 * 2 + 2  # two batches are a step
    # The first step compiles, and within a window the step stands still.
    for step, seconds, batch in ((1, 100.0, 1), (1, 104.0, 2), (2, 107.0, 3), (4, 110.0, 7)):
        trainer.global_step = step
        logger._start = time.perf_counter() - seconds
        progress._spoke -= 11
        logger.on_train_batch_end(trainer, module, None, None, batch)
        progress.on_train_batch_end(trainer, module)
    assert logger.seconds_left == pytest.approx(left, rel=1e-3)
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["epoch 0.2/2"] * 2
    assert told[-1] == f"epoch 0.8/2, {left / 60:.1f} min left"


@pytest.mark.parametrize(
    ("columns", "lines", "told"),
    [
        (0, 0, "epoch 0.8/2, loss 5.123, kNN 97.1%"),  # it names no size
        (60, 50, "epoch 0.8/2, loss 5.123"),
        (80, 50, "epoch 0.8/2, loss 5.123, kNN 97.1%"),
        (200, 50, "epoch 0.8/2, loss 5.123, kNN 97.1%, contrast 45%, 1,050 images/s"),
    ],
)
def test_the_bar_tells_what_a_terminal_has_room_for(terminal, columns, lines, told):
    latest = {"train/loss": 5.1234, "val/knn_top1": 97.1, "train/contrast_top1": 0.45}
    latest["train/images_per_second"] = 1050.0
    data = SimpleNamespace(growth=Growth((32,), (0,)))
    progress = Progress(SimpleNamespace(latest=latest, data=data))
    trainer = SimpleNamespace(is_global_zero=True, global_step=0)
    module = SimpleNamespace(total_steps=10, steps_per_epoch=5)
    screen = terminal(columns, lines)
    progress.on_train_start(trainer, module)
    trainer.global_step = 4
    progress.on_train_batch_end(trainer, module)
    progress.on_train_end(trainer, module)
    shown = screen().rstrip("\n").split("\r")[-1]
    assert len(shown) == (columns or 80) - 2  # a terminal shows ^C behind it
    assert re.fullmatch(rf" 40%\|█+.? *\| \d\d:\d\d, \d\d:\d\d left, {re.escape(told)}", shown)


def test_the_bar_moves_by_time_where_views_grow(terminal):
    data = SimpleNamespace(growth=Growth((16, 32), (0, 4)))
    progress = Progress(SimpleNamespace(latest={}, data=data))
    trainer = SimpleNamespace(is_global_zero=True, global_step=0)
    module = SimpleNamespace(total_steps=10, steps_per_epoch=5)
    screen = terminal(100, 50)
    progress.on_train_start(trainer, module)
    trainer.global_step = 4  # four quarters of a step, of seven steps
    progress.on_train_batch_end(trainer, module)
    progress.on_train_end(trainer, module)
    assert re.search(r"\r 14%\|", screen())


def test_readings_of_a_streamed_set_leave_out_torn_files_and_name_them(tmp_path, said):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name in ("a", "b"):
            write_pictures(tmp_path / split / name, [f"{i}.png" for i in range(count)], rng)
    torn = [tmp_path / "train" / "a" / "3.png", tmp_path / "test" / "b" / "2.png"]
    for path in torn:
        path.write_bytes(path.read_bytes()[:100])
    arguments = ["--data.resident", "off", "--data.num_workers", "0", "--run.knn_every", "1"]
    arguments += ["--model.queue_size", "16"]
    with pytest.raises(UserError, match=r"1 of 24 images .*3\.png: .*data\.max_bad_fraction"):
        run_tiny(tmp_path, *arguments, run_dir="refused")
    said.clear()
    arguments += ["--data.max_bad_fraction", "0.1", "--run.knn_k", "200"]
    result = run_tiny(tmp_path, *arguments)
    assert result["knn_top1"] in [round(100 * n / 11, 2) for n in range(12)], "11 were read"
    named = [line.split("\t")[0] for line in Path("run/bad_files.txt").read_text().splitlines()]
    assert sorted(named) == sorted(map(str, torn))
    assert sum("run.knn_k is 200: kNN takes all 24 training images" in line for line in said) == 1


class Clock(pl.Callback):
    """A clock that a step moves by a second, and a checkpoint by a thousand."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        for room in (metrics, saving, showing):
            monkeypatch.setattr(room, "time", clock)

    def on_train_batch_start(self, *args) -> None:
        self.now += 1

    def on_save_checkpoint(self, *args) -> None:
        self.now += 1000


def test_writing_checkpoints_is_no_time_of_training(images, monkeypatch, with_callback):
    with_callback(Clock(monkeypatch))
    assert run_tiny(images)["images_per_second"] == 16
    with open("run/metrics.csv") as file:
        rates = [float(row["train/images_per_second"]) for row in csv.DictReader(file)]
    assert rates == [16] * 6


class OnTwoRanks:
    """Images of a labelled split, of which each rank has a half."""

    source, config = SimpleNamespace(classes=["a", "b"]), None

    def __len__(self):
        return 16

    def batches(self, device):
        generator = torch.Generator().manual_seed(distributed.rank())
        images = torch.randn(8, 3, SIZE, SIZE, generator=generator).double()
        yield images, torch.arange(8)

    def labels(self, rows):
        return rows % 2


def _statistics_after_a_reading() -> tuple[list[float], float]:
    """Give each rank statistics of its own, and read kNN."""
    module = make_module()
    statistic = module.query_encoder.backbone.bn1.running_mean.fill_(1 + distributed.rank())
    shown = SimpleNamespace(paused=0.0, publish=lambda *args: None)
    reader = KNNMonitor((OnTwoRanks(), OnTwoRanks()), RunConfig(knn_k=3), shown, Signals())
    trainer = SimpleNamespace(global_step=3, precision_plugin=Precision())
    seen = []
    hook = module.query_encoder.backbone.bn1.register_forward_pre_hook(
        lambda layer, inputs: seen.append(layer.running_mean[0].item())
    )
    reader.read(trainer, module, final=False)
    hook.remove()
    return seen, statistic[0].item()


def test_a_reading_leaves_each_rank_its_own_statistics(two_ranks):
    """It judges rank 0's, which the checkpoint holds."""
    assert two_ranks.run(_statistics_after_a_reading) == [([1.0, 1.0], 1.0), ([1.0, 1.0], 2.0)]


def test_a_rate_that_is_to_follow_knn_needs_labels(images):
    follow = ["--optim.schedule", "plateau", "--optim.plateau_metric", "val/knn_top1"]
    with pytest.raises(UserError, match=r"kNN is never read: set it to train/loss"):
        run_tiny(images, *follow, "--run.knn_every", "1")
    assert not Path("run").exists()


def test_less_than_an_epoch_is_told_in_the_same_digits():
    progress = Progress(SimpleNamespace(latest={}))
    module = SimpleNamespace(total_steps=5, steps_per_epoch=19, accumulate=1)
    assert progress._text(SimpleNamespace(global_step=5), module) == "epoch 0.263/0.263"
