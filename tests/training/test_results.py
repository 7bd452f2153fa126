"""The figures that a run returns: of which step they are, and what was not read."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from processes import ROOT

import train
from moco.training.monitor import Progress

pytestmark = pytest.mark.usefixtures("in_tmp")

DIGITS = [
    *("--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.precision", "32-true"),
    *("--model.width", "0.125", "--model.queue_size", "500", "--data.batch_size", "400"),
    *("--run.knn_every", "1", "--trainer.max_epochs", "2", "--optim.warmup_epochs", "0"),
]  # three steps an epoch


class StopIn(pl.Callback):
    """Send SIGTERM in one step, and make each take a fifth of a second."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        time.sleep(0.2)
        if trainer.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_run_reports_no_reading_of_the_untrained_network_as_its_own(with_callback):
    with_callback(StopIn(2))
    stopped = train.main([*DIGITS, "--run.dir", "run"])
    assert stopped["steps"] == 2 and stopped["knn_top1_untrained"] > 50
    assert (stopped["knn_top1"], stopped["knn_top1_step"]) == (None, None)
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
    with_callback(StopIn(1))
    started = [*DIGITS, "--run.dir", "run", "--init_from", "first/checkpoints/last.ckpt"]
    for result in (train.main(started), train.main(["--resume", "run"])):
        assert result["knn_top1_init_from"] == first["knn_top1"]
        assert "knn_top1_untrained" not in result


def test_the_time_left_counts_all_batches_of_a_step():
    data = SimpleNamespace(config=SimpleNamespace(batch_size=16))
    progress = Progress(SimpleNamespace(latest={}, rate=lambda: 16.0, data=data))
    module = SimpleNamespace(total_steps=10, steps_per_epoch=5, accumulate=3)
    text = progress._text(SimpleNamespace(global_step=4), module)
    assert text == "epoch 0.8/2, 0.3 min left"
