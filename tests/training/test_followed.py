"""Metrics that Lightning's callbacks follow: those that never come are refused before a step."""

import pytest
import pytorch_lightning as pl
from door import PIXELS, pretrain
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from moco.config import RunConfig, UserError
from moco.training.followed import check_followed

EVERY, NEVER = RunConfig(knn_every=1), RunConfig(knn_every=0)


class Logs(pl.Callback):
    """May log anything."""


@pytest.mark.parametrize(
    ("name", "config", "labels", "words"),
    [
        ("train/los", EVERY, True, "which no run has: did you mean 'train/loss'"),
        ("val_loss", EVERY, True, "did you mean 'train/loss'.* There are train/loss, .*val/knn"),
        ("knn_top1", EVERY, True, "did you mean 'val/knn_top1'"),
        ("zzz", EVERY, True, "no run has: there are train/loss"),
        ("val/knn_top1", NEVER, True, "never read here, since run.knn_every is 0: mend that"),
        ("val/knn_top1", EVERY, False, "never read here, since there are no labels: mend that"),
    ],
)
def test_a_metric_that_never_comes_is_refused(name, config, labels, words):
    for callback in (EarlyStopping(name), ModelCheckpoint("own", monitor=name)):
        with pytest.raises(UserError, match=f"{type(callback).__name__} follows '{name}'.*{words}"):
            check_followed([callback], config, labels, True)
        for other in (Logs(), LearningRateMonitor(), type("Mine", (EarlyStopping,), {})("own")):
            check_followed([callback, other], config, labels, True)


def test_metrics_that_come_are_followed():
    stops = [EarlyStopping(name) for name in ("train/loss", "val/knn_top1", "train/lr")]
    keeps = [ModelCheckpoint("own", monitor=name) for name in (None, "epoch", "step")]
    check_followed([*stops, *keeps], EVERY, True, True)
    check_followed([EarlyStopping("zzz", strict=False)], EVERY, True, True)


def test_a_run_is_refused_before_its_first_step(in_tmp, tmp_path):
    with pytest.raises(UserError, match="follows 'train/los', which no run has"):
        pretrain(PIXELS, callbacks=[EarlyStopping("train/los")])
    assert not list(tmp_path.rglob("*.ckpt"))
