"""The door for Python: every kind of images trains, and resumes to the same bits."""

import signal
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from door import PIXELS, STREAMED, TINY, assert_resumes, pretrain
from PIL import Image
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from runs import assert_same_end, load
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import RandomCrop
from tqdm import tqdm

import moco
from moco.command.words import words_of
from moco.config import DataConfig
from moco.images.own import open_own


class Labelled(Dataset):
    """Pairs of a PIL image and a label."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), index % 2


class Bands(Dataset):
    """Dictionaries with arrays of 16 bands."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        bands = np.random.default_rng(index).integers(0, 255, (16, 20, 20), dtype=np.uint8)
        return {"place": index, "bands": bands}


class Stream(IterableDataset):
    """Has no length and no places."""

    def __iter__(self):
        yield from PIXELS


def hugging_face():
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 24}).cast_column(
        "image", datasets.Image()
    )


def pictures_in_an_array():
    array = np.empty(len(PIXELS), object)
    array[:] = [Image.fromarray(pixels) for pixels in PIXELS]
    return array


KINDS = {
    "channels last": lambda folder: PIXELS,
    "blue, green, red": lambda folder: PIXELS[..., ::-1],
    "channels first": lambda folder: torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
    "grey": lambda folder: PIXELS[..., 0],
    "pictures": lambda folder: [Image.fromarray(pixels) for pixels in PIXELS],
    "pictures in an array": lambda folder: pictures_in_an_array(),
    "pairs": lambda folder: Labelled(),
    "dictionaries": lambda folder: Bands(),
    "paths": lambda folder: sorted(folder.glob("*.jpg")),
    "a directory": lambda folder: folder,
    "hugging face": lambda folder: hugging_face(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_images_trains_and_resumes_to_the_same_bits(kind, images, in_tmp):
    given = KINDS[kind](images)
    run = pretrain(given)
    assert run.metrics["steps"] == 6 and run.report is None
    assert repr(run) == f"Pretrained(run_dir='run', steps=6, loss={run.metrics['loss']})"
    channels = {"grey": 1, "dictionaries": 16}.get(kind, 3)
    features = run.encoder(torch.zeros(2, channels, 16, 16))
    assert features.shape[0] == 2 and not run.encoder.training
    assert run.checkpoint == "run/checkpoints/last.ckpt"
    assert_resumes(given)


@pytest.mark.parametrize("kind", ["channels last", "pairs", "paths"])
def test_streamed_images_resume_to_the_same_bits(kind, images, in_tmp, said):
    given = KINDS[kind](images)
    pretrain(given, **STREAMED)
    streamed = any("streamed by workers" in line for line in said)
    assert streamed == (kind != "channels last")  # an array is in memory already
    assert_resumes(given)


def test_items_read_as_the_arrays_that_they_are():
    pairs, array = open_own(Labelled(), DataConfig()), open_own(PIXELS, DataConfig())
    assert len(pairs) == len(array) == 48 and pairs.channels == 3
    assert all(pairs.read(i).equal(array.read(i)) for i in range(48))
    grey = open_own(Labelled(), DataConfig(channels=1))
    assert grey.read(0).shape == (1, 20, 20)
    bands = open_own(Bands(), DataConfig(channels="auto"))
    assert bands.channels == 16 and bands.items.column == "bands"
    some = pairs.rows(torch.tensor([5, 7])).rows(torch.tensor([1]))
    assert some.read(0).equal(array.read(7)) and some.called(0) == "item 7"


@pytest.mark.parametrize("bands", [3, 20])
def test_the_axis_that_differs_in_a_square_holds_its_bands(bands, tmp_path):
    first = np.random.default_rng(0).integers(0, 256, (6, bands, 9, 9), dtype=np.uint8)
    last, auto = np.ascontiguousarray(first.transpose(0, 2, 3, 1)), DataConfig(channels="auto")
    for each in (first, last):
        np.save(tmp_path / "a.npy", each[0])
        for given in (each, list(each), [tmp_path / "a.npy"]):
            source = open_own(given, auto)
            assert source.channels == bands
            assert source.read(0).equal(torch.from_numpy(first[0]))


def test_paths_in_arrays_and_columns_are_those_in_a_list(images):
    paths, auto = sorted(map(str, images.glob("*.jpg"))), DataConfig(channels="auto")
    named = pd.Series(paths, index=range(100, 100 + len(paths)))
    for given in (np.array(paths), np.array(paths, object), named, named[::-1][::-1]):
        assert open_own(given, auto).paths == paths
    turned = pd.Series([Image.fromarray(pixels) for pixels in PIXELS])[::-1]
    assert open_own(turned, auto).read(0).equal(open_own(PIXELS, auto).read(len(PIXELS) - 1))


def test_items_that_change_are_said(in_tmp, said):
    class Cropped(Labelled):
        """A data set with the transforms of training, as other libraries want it."""

        transform = RandomCrop(16)

        def __getitem__(self, index):
            picture, label = super().__getitem__(index)
            return self.transform(picture), label

    once = {"trainer.max_steps": 1}
    pretrain(Labelled(), **once)
    assert not any("when it is read again" in line for line in said)
    pretrain(Cropped(), "cropped", **once)
    assert any("another image when it is read again" in line for line in said)


def test_one_grey_picture_among_colours_does_not_make_all_grey():
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    for mixed in ([pictures[0].convert("L"), *pictures[1:]], [PIXELS[0, :, :, 0], *PIXELS[1:]]):
        assert open_own(mixed, DataConfig(channels="auto")).channels == 3


def test_a_recipe_counts_before_what_is_usual_and_a_setting_before_it(in_tmp):
    given = {"recipe": "quickstart", "trainer.max_steps": 1}
    with pytest.raises(moco.UserError, match=r"has 3 channels and data\.channels is 1"):
        pretrain(PIXELS, **given)
    run = pretrain(PIXELS, **given, **{"data.channels": 3})
    assert len(run.encoder(torch.zeros(2, 3, 16, 16))) == 2


def test_other_images_do_not_go_on(in_tmp):
    pretrain(PIXELS, **{"trainer.max_epochs": 1})
    with pytest.raises(moco.UserError, match="48 images as the run has, but others"):
        moco.pretrain(255 - PIXELS, resume="run", extend=1)
    with pytest.raises(moco.UserError, match="images come from Python"):
        moco.pretrain(resume="run", extend=1)


def test_an_item_that_cannot_be_read_is_named_and_skipped_where_that_is_allowed(in_tmp, said):
    class Broken(Labelled):
        def __getitem__(self, index):
            if index == 7:
                raise OSError("the slide is torn")
            return super().__getitem__(index)

    for settings in ({}, STREAMED):
        with pytest.raises(moco.UserError, match="item 7: cannot be read: OSError: the slide is"):
            pretrain(Broken(), **settings)
    pretrain(Broken(), **{"data.max_bad_fraction": 0.1, "data.batch_size": 16})
    assert any("item 7" in line and "left out" in line for line in said)
    assert "item 7" in Path("run/bad_files.txt").read_text()


@pytest.mark.parametrize(
    ("images", "line"),
    [
        ((pixels for pixels in PIXELS), "is a generator, which has no length: .*list"),
        (Stream(), "is a Stream, which has no length"),
        ({1, 2}, "is a set, which cannot be indexed"),
        (torch.utils.data.DataLoader(PIXELS), "is a DataLoader, .* give its data set"),
        ({"train": PIXELS}, "is a dict of 'train': give what one of these holds"),
        (pd.DataFrame({"path": ["a"]}), "is a DataFrame of 'path': give what one of these holds"),
        ([("a.png", 0)], "item 0: is of type str: give PIL .*, or paths alone in a list"),
        ([], "is a list of length 0"),
        (PIXELS > 99, r"holds bool values: give uint8, as 255 \* x"),
        ([PIXELS[0].astype(object)], r"item 0: holds object values: give numbers of one type"),
        (PIXELS[0, 0], "has the shape"),
        (np.zeros((20, 20, 3), np.uint8), "is one image H x W x C: give many, N x H x W x C"),
        (["no-such.png"], "no-such.png does not exist"),
        ([{"a": PIXELS[0], "b": PIXELS[1]}], "dictionaries of a, b, 2 of which are images: name"),
        (["/", "/"], "is a directory: give its path alone"),
        ([object()] * 20, "item 0: is of type object: give PIL images, arrays or tensors"),
    ],
)
def test_images_that_are_none_are_refused_in_one_line(images, line, in_tmp):
    with pytest.raises(moco.UserError, match=line) as error:
        pretrain(images)
    assert "\n" not in str(error.value)


def test_items_of_other_sizes_or_channels_are_refused_in_one_line(in_tmp):
    sizes = [Image.fromarray(pixels[: 18 + i % 3]) for i, pixels in enumerate(PIXELS)]
    with pytest.raises(moco.UserError, match=r"item 1 has .* pixels .* where others have .*: set"):
        pretrain(sizes, **{"data.resident": "memory"})
    run = pretrain(sizes, **{"data.num_workers": 0})  # streamed, as photographs of any sizes are
    assert run.metrics["steps"] == 6
    bands = [np.zeros((3 + i % 2 * 13, 20, 20), np.uint8) for i in range(48)]
    with pytest.raises(moco.UserError, match="24 of 48 images .* item 1: has 16 bands: set"):
        pretrain(bands, "other")
    with pytest.raises(moco.UserError, match="has 16 channels and data.channels is 3: set"):
        pretrain(np.zeros((48, 20, 20, 16), np.uint8), "other", **{"data.channels": 3})


def test_what_cannot_be_pickled_for_workers_is_refused_before_the_first_step(in_tmp, monkeypatch):
    class Held(Labelled):
        """A class of a function, which only forked workers can have."""

    assert pretrain(Held(), "forked", **STREAMED).metrics["steps"] == 6
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    with pytest.raises(moco.UserError, match=r"images cannot be pickled .*: define it in a module"):
        pretrain(Held(), **STREAMED)
    assert pretrain(Held(), **STREAMED | {"data.num_workers": 0}).metrics["steps"] == 6


def test_settings_are_those_of_the_command_line(in_tmp):
    with pytest.raises(moco.UserError, match=r"unknown option --optim.rl: did you mean --optim.lr"):
        pretrain(PIXELS, **{"optim.rl": 1})
    with pytest.raises(moco.UserError, match="optim.lr is -1.0: it must be above 0"):
        pretrain(PIXELS, **{"optim.lr": -1})
    with pytest.raises(moco.UserError, match="does not exist: did you mean quickstart"):
        moco.pretrain(PIXELS, "quickstat")
    short = {"trainer.max_steps": 1, "run.knn_every": 0, "run.report": False}
    run = moco.pretrain(recipe="quickstart", dir="q", **short)
    assert load(run.checkpoint)["config"]["data"]["dataset"] == "digits"
    plan = pretrain(PIXELS, "p", **{"run.plan": True, "optim.milestones": (1, 2)})
    assert plan.encoder is None and plan.checkpoint is None and "plan" in plan.metrics


@pytest.mark.parametrize(
    "value", [np.arange(1.0, 4) / 8, torch.arange(1.0, 4) / 8, (np.float32(0.125), 0.25, 0.375)]
)
def test_arrays_and_ranges_are_lists_of_settings(value):
    assert words_of({"data.mean": value}) == ["--data.mean=[0.125, 0.25, 0.375]"]
    assert words_of({"reference": [Path("a b"), "c"]}) == ["--reference", "a b", "c"]
    assert words_of({"k": range(1, 4), "seed": np.int64(3)}) == ["--k=[1, 2, 3]", "--seed=3"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_may_have_gradients_off(in_tmp, mode):
    with mode():
        run = pretrain(PIXELS, callbacks=Interrupts(step=99))
    assert run.metrics["steps"] == 6


def test_loggers_get_the_metrics(in_tmp):
    from pytorch_lightning.loggers import CSVLogger

    settings = TINY | {"trainer.log_every_n_steps": 1}
    run = moco.pretrain(PIXELS, dir="run", loggers=CSVLogger("own"), **settings)
    assert run.metrics["steps"] == 6
    assert "train/loss" in Path("own/lightning_logs/version_0/metrics.csv").read_text()
    assert "train/loss" in Path("run/metrics.csv").read_text()


class Interrupts(pl.Callback):
    """Press Ctrl-C in a step."""

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_leaves_a_run_that_can_be_resumed(in_tmp):
    pretrain(PIXELS, "whole")
    with pytest.raises(KeyboardInterrupt, match="go on with resume='run'"):
        pretrain(PIXELS, callbacks=[Interrupts()])
    assert load("run/checkpoints/last.ckpt")["global_step"] == 2
    assert moco.pretrain(PIXELS, resume="run").metrics["steps"] == 6
    assert_same_end("whole", "run")


def test_ctrl_c_is_told_by_every_rank(in_tmp, monkeypatch):
    """Rank 0 alone is told where the run lies."""
    monkeypatch.setattr("moco.training.run.pretrain", lambda **_: {"stopped_by": signal.SIGINT})
    with pytest.raises(KeyboardInterrupt) as stopped:
        pretrain(PIXELS)
    assert not stopped.value.args


class Stops(pl.Callback):
    """Stop after a step, or at the end of its epoch, as EarlyStopping and Timer do."""

    def __init__(self, step, hook):
        setattr(self, hook, lambda trainer, *_: self.stop(trainer, step))

    def stop(self, trainer, step):
        trainer.should_stop = trainer.should_stop or trainer.global_step == step


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"loggers": True}, "loggers holds True: give instances of Lightning's Logger"),
        ({"callbacks": EarlyStopping}, "callbacks holds the class EarlyStopping: give instances"),
        ({"callbacks": [EarlyStopping("train/loss"), None]}, "callbacks holds None: give inst"),
    ],
)
def test_parts_of_another_kind_are_refused_in_one_line(given, line, in_tmp):
    with pytest.raises(moco.UserError, match=line):
        pretrain(PIXELS, **given)
    assert not Path("run").exists()


def test_a_run_goes_on_from_what_it_has_returned(in_tmp):
    several = (EarlyStopping("train/loss") for _ in range(1))
    run = pretrain(PIXELS, callbacks=several, loggers=None)
    again = moco.pretrain(PIXELS, resume=run, extend=1, yes=True)
    assert again.metrics["run_dir"] == "run" and again.metrics["steps"] > run.metrics["steps"]


@pytest.mark.parametrize(
    "step, hook", [(2, "on_train_batch_end"), (3, "on_train_batch_end"), (3, "on_train_epoch_end")]
)
def test_a_run_that_a_callback_stops_is_saved_and_goes_on(in_tmp, step, hook):
    pretrain(PIXELS, "whole")
    stopped = pretrain(PIXELS, callbacks=[Stops(step, hook)])
    assert stopped.metrics["steps"] == step
    assert load("run/checkpoints/last.ckpt")["global_step"] == step
    assert moco.pretrain(PIXELS, resume="run").metrics["steps"] == 6
    assert_same_end("whole", "run")


def test_callbacks_of_lightning_see_metrics_and_a_stop_is_said(in_tmp, said):
    """What one of them logs has no column in metrics.csv."""
    stops = EarlyStopping("train/spread", min_delta=9, patience=0, mode="max")
    own = ModelCheckpoint("own", monitor="train/loss", every_n_train_steps=2, save_top_k=-1)
    callbacks = [LearningRateMonitor(), stops, own]
    pretrain(PIXELS, callbacks=callbacks, **{"trainer.max_epochs": 3})
    assert "stopped by a callback after step 6 of 9: go on with --resume run" in said
    assert not any(line.startswith("No verdict") for line in said)
    rows = Path("run/metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,train/loss") and "lr-" not in rows[0]
    assert all(row.split(",")[2] for row in rows[1:])
    assert len(list(Path("own").glob("*.ckpt"))) == 3
    assert load("run/checkpoints/last.ckpt")["global_step"] == 6


def test_early_stopping_sees_each_epoch_and_goes_on_with_the_run(in_tmp):
    """Readings are rarer than epochs here; one that is repeated would look like no progress."""
    seen = []

    class Watches(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(float(trainer.callback_metrics["train/loss"]))

    given = {"trainer.log_every_n_steps": 50, "trainer.max_epochs": 3}
    stops = EarlyStopping("train/loss", patience=9)
    pretrain(PIXELS, callbacks=[stops, Watches()], **given)
    assert len(set(seen)) == 3
    moco.pretrain(
        PIXELS, resume="run/checkpoints/step_000000002.ckpt", callbacks=[stops, Watches()]
    )
    assert seen[3:] == seen[:3]


def test_a_notebook_has_a_bar(in_tmp, monkeypatch, capsys):
    class ZMQInteractiveShell:
        """What IPython has in a kernel."""

    kernel = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setattr("tqdm.auto.tqdm", tqdm)
    pretrain(PIXELS)
    assert "100%|" in capsys.readouterr().err


class Lines:
    """What takes the place of standard error in a program that logs it: no more than is needed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_a_program_may_put_what_it_likes_in_the_place_of_standard_error(in_tmp, monkeypatch):
    monkeypatch.setattr(sys, "stderr", lines := Lines())
    assert pretrain(PIXELS).metrics["steps"] == 6 and "run directory: run" in lines.text
    monkeypatch.setattr(sys, "stderr", None)
    assert pretrain(PIXELS, "other").metrics["steps"] == 6
