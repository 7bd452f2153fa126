"""MoCo in a Trainer of the user's own: it trains, saves, resumes to the same bits, and loads."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import PARTS, load, same
from steps import MODEL

import moco
from moco.training.writing import AtomicCheckpointIO

PIXELS = np.random.default_rng(0).integers(0, 255, (48, 20, 20, 3), dtype=np.uint8)
pytestmark = pytest.mark.usefixtures("in_tmp")


def fit(folder, checkpoint=None, **options):
    """Train two epochs of three steps as docs/python.md does."""
    pl.seed_everything(0)
    size, end = options.pop("image_size", 16), options.pop("image_size_end", 0)
    views = {"shuffle": True, "symmetric": False} | options.pop("views", {})
    config = moco.DataConfig(
        dataset="own", image_size=size, image_size_end=end, batch_size=16, views="cifar",
        chunks=options.pop("chunks", 1),
    )  # fmt: skip
    optim = options.pop("optim", moco.OptimConfig(lr=0.01))
    module = moco.MoCo(options.pop("model", MODEL), optim, channels=3, image_size=16)
    data = moco.PretrainData(config, seed=0, source=PIXELS, **views)
    every = options.pop("checkpoint_every", 1)
    own = moco.callbacks(
        module, data, folder, log_every=1, checkpoint_every=every, keep_checkpoints=9
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[*options.pop("first", []), *own, *options.pop("callbacks", [])],
        logger=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return trainer, module


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_plain_trainer_resumes_to_the_same_bits_in_and_between_epochs(step):
    trainer, module = fit("whole")
    assert trainer.global_step == 6 and (module.total_steps, module.steps_per_epoch) == (6, 3)
    fit("again", f"whole/checkpoints/step_{step:09d}.ckpt")
    whole, again = (load(f"{run}/checkpoints/last.ckpt") for run in ("whole", "again"))
    assert [part for part in PARTS if not same(whole[part], again[part])] == []


def test_a_vit_takes_views_that_are_smaller_than_its_images():
    vit = moco.ModelConfig(
        backbone="vit_tiny_patch16_224", width=0.25, patch_size=4, depth=1, num_heads=2,
        embedding_dim=16, queue_size=32, key_bn="split", bn_splits=2,
    )  # fmt: skip
    _, module = fit("run", image_size_end=12, model=vit, max_steps=1)
    assert module.query_encoder.backbone.pos_embed.shape[1] == 1 + 4 * 4


def test_what_is_left_to_auto_is_named():
    with pytest.raises(moco.UserError, match="data.image_size_end is auto, .* give its value"):
        fit("run", image_size_end="auto")
    with pytest.raises(moco.UserError, match="optim.lr is auto, .* give its value"):
        moco.MoCo(MODEL, moco.OptimConfig(lr="auto"), channels=3, image_size=16)


@pytest.mark.parametrize(
    ("group", "setting", "value", "message"),
    [
        ("model", "key_bn", "auto", "model.key_bn is auto, which a run decides"),
        ("model", "key_bn", "spilt", "model.key_bn is 'spilt': choose one of"),
        ("model", "width", -1.0, "model.width is -1.0: it must be"),
        ("optim", "name", "muno", "optim.name is 'muno': choose one of"),
        ("optim", "schedule", "cosin", "optim.schedule is 'cosin': choose one of"),
        ("optim", "lr", "0.06", "optim.lr is '0.06': give a number"),
        ("optim", "lr", None, "optim.lr is null"),
        ("optim", "nesterov", True, "optim.nesterov is true: it needs"),
        ("data", "dataset", "foldr", "data.dataset is 'foldr': choose one of"),
        ("data", "crop_min", 5, "data.crop_min is 5: it must be"),
        ("data", "crop_min", "wide", "data.crop_min is 'wide': give a number or a list"),
        ("data", "batch_size", 0, "data.batch_size is 0: it must be"),
        ("data", "image_size_end", 64, "data.image_size_end 64 is above data.image_size 32"),
        ("data", "views", "cifra", "data.views is 'cifra': choose one of"),
        ("data", "mean", [0.5], "data.mean has 1 values for data.channels 3"),
        ("data", "root", "", "data.root is empty"),
    ],
)
def test_settings_are_checked_where_no_run_does_it(group, setting, value, message):
    settings = {
        "model": MODEL,
        "optim": moco.OptimConfig(sgd_momentum=0),
        "data": moco.DataConfig(root="images", image_size=32),
    }
    settings[group] = replace(settings[group], **{setting: value})
    with pytest.raises(moco.UserError, match=re.escape(message)):
        moco.MoCo(settings["model"], settings["optim"], channels=3, image_size=16)
        moco.PretrainData(settings["data"], seed=0, shuffle=True, symmetric=False)


def test_its_checkpoints_tell_their_network():
    _, module = fit("run", max_steps=2)
    network = moco.load_backbone("run/checkpoints/last.ckpt")
    images = torch.rand(2, 3, 16, 16)
    wanted = module.query_encoder.backbone.eval()(images)  # channels last, which rounds otherwise
    torch.testing.assert_close(network(images), wanted)
    assert network.transform.image_size == 16
    assert module.total_steps == 2


def test_a_run_whose_numbers_overflow_ends():
    class Overflow(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            next(module.query_encoder.parameters()).data.fill_(float("nan"))

    with pytest.raises(moco.RunError, match="not finite|NaN|nan"):
        fit("run", callbacks=[Overflow()])


def test_an_error_before_the_first_step_is_told_as_it_is():
    with pytest.raises(moco.UserError, match="data.image_size 64 is above the images' 20 pixels"):
        fit("run", image_size=64)

    class Early(pl.Callback):
        def setup(self, *_, **__):
            raise moco.UserError("the user's own")

    with pytest.raises(moco.UserError, match="the user's own"):
        fit("run", first=[Early()])


def test_a_trainer_that_stops_early_has_written_what_it_saves(monkeypatch):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    write = AtomicCheckpointIO._write

    def slowly(writer, checkpoint, path, after):
        if path.stem.endswith("3"):
            has_ended.wait(1)  # longer than the end of the run takes
        write(writer, checkpoint, path, after)

    has_ended = threading.Event()
    monkeypatch.setattr(AtomicCheckpointIO, "_write", slowly)
    fit("run", callbacks=[Stop()])
    found = load("run/checkpoints/last.ckpt")["global_step"]
    has_ended.set()
    assert found == 3


@pytest.mark.parametrize(
    "limit", [{"limit_train_batches": 1}, {"overfit_batches": 0.5}, {"fast_dev_run": True}]
)
def test_a_trainer_that_cuts_epochs_short_is_refused(limit):
    with pytest.raises(moco.UserError, match="limit_train_batches is .* set max_steps or max_ep"):
        fit("run", **limit)


def test_the_end_of_a_run_that_another_callback_shortens_is_saved():
    class Shorten(pl.Callback):
        def on_train_start(self, trainer, *_):
            trainer.fit_loop.max_epochs = 1

    fit("run", checkpoint_every=0, callbacks=[Shorten()])
    assert load("run/checkpoints/last.ckpt")["global_step"] == 3


def test_a_plateau_of_the_loss_lowers_the_rate():
    class Worse(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.loss_sum.add_(100 * trainer.current_epoch)

    optim = moco.OptimConfig(lr=0.01, schedule="plateau", plateau_patience=0, gamma=0.5)
    _, module = fit("whole", optim=optim, first=[Worse()])
    assert module.plateau.factor == 0.5
    fit("again", "whole/checkpoints/step_000000004.ckpt", optim=optim, first=[Worse()])
    whole, again = (load(f"{run}/checkpoints/last.ckpt") for run in ("whole", "again"))
    assert [part for part in PARTS if not same(whole[part], again[part])] == []
    with pytest.raises(moco.UserError, match="reads no kNN: set it to train/loss"):
        fit("run", optim=replace(optim, plateau_metric="val/knn_top1"))


@pytest.mark.parametrize("step", [2, 3])
def test_a_model_checkpoint_beside_writes_at_once_what_resumes_to_the_same_bits(step):
    every = ModelCheckpoint("other", "{step}", save_top_k=-1, every_n_train_steps=1)
    fit("whole", callbacks=[every], enable_checkpointing=True)
    assert sorted(path.stem for path in Path("other").iterdir()) == [
        f"step={n}" for n in range(1, 7)
    ]
    own = {path.stem for path in Path("whole/checkpoints").iterdir()}
    assert own == {"last", *(f"step_{number:09d}" for number in range(1, 7))}
    fit("again", f"other/step={step}.ckpt")
    whole, again = (load(f"{run}/checkpoints/last.ckpt") for run in ("whole", "again"))
    assert [part for part in PARTS if not same(whole[part], again[part])] == []


def test_what_the_trainer_saves_is_there_when_it_says_so_and_tidies_nothing():
    trainer, _ = fit("run")
    before = sorted(Path("run/checkpoints").iterdir())
    trainer.save_checkpoint("new/final.ckpt")
    assert load("new/final.ckpt")["global_step"] == 6
    assert sorted(Path("run/checkpoints").iterdir()) == before


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"symmetric": "mean"}, {},
         "PretrainData has symmetric=False, and model.symmetric mean needs symmetric=True"),
        ({}, {"views": {"symmetric": True}},
         "PretrainData has symmetric=True, and model.symmetric none needs symmetric=False"),
        ({"query_bn": "split"}, {"views": {"shuffle": False}},
         "PretrainData has shuffle=False, and model.key_bn split needs shuffle=True"),
        ({"key_bn": "plain"}, {},
         "PretrainData has shuffle=True, and model.key_bn plain needs shuffle=False"),
        ({"key_bn": "shuffle"}, {}, "model.key_bn is shuffle: take split (shuffle as set would"),
        ({"symmetric": "mean", "queue_size": 24}, {"views": {"symmetric": True}},
         "model.queue_size 24 is below the 32 keys of one step"),
        ({"queues": 2}, {}, "model.queues is 2, one for the keys of each view: it needs"),
        ({"queue_size": 0, "key_bn": "plain"},
         {"views": {"shuffle": False}, "accumulate_grad_batches": 2},
         "trainer.accumulate_grad_batches is above 1 with model.queue_size 0"),
        ({"bn_splits": 3}, {}, "data.batch_size 16 does not divide by 3"),
        ({}, {"chunks": 2}, "MoCo has chunks=1 and DataConfig chunks=2: give both the same"),
    ],
)  # fmt: skip
def test_parts_that_contradict_one_another_are_refused(model, options, message):
    with pytest.raises(moco.UserError, match=re.escape(message)):
        fit("run", model=replace(MODEL, **model), **options)
