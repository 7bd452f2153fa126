"""knn, linear and export from Python: plain values, on images of a folder or of Python's own."""

import numpy as np
import pytest
import torch
from door import PIXELS, TINY, pretrain
from PIL import Image
from torch import nn

import moco
from moco.command.judge import read_settings
from moco.images.items import open_items
from moco.judge_config import KNNConfig

FEW = {"k": [3], "shots": [1], "gallery": False, "baselines": False}
LABELS = np.arange(48) % 3


class Pixels(nn.Module):
    """Averages 4 x 4 pixels, and has one weight to train."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images * self.scale, 4).flatten(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    return pretrain(PIXELS, folder / "run", **{"trainer.max_steps": 1})


def test_own_images_are_judged(run, tmp_path):
    test = [(Image.fromarray(p), int(label)) for p, label in zip(PIXELS, LABELS, strict=True)]
    score = moco.knn(run, ((PIXELS, LABELS), test), output=tmp_path, **FEW | {"k": [1]})
    assert score["top1"] == 100.0 and score["data"]["classes"] == 3, "each image finds itself"
    assert (score["data"]["train_images"], score["data"]["dataset"]) == (48, "own")
    options = {"epochs": 2, "baselines": False, "output": tmp_path}
    score = moco.linear(run.checkpoint, (test, test), learning_rates=(0.1, 1), **options)
    assert 0 <= score["top1"] <= 100 and score["protocol"] == "cached"


def test_results_on_other_arrays_and_labels_that_are_mapped(run, tmp_path):
    class Mapped:
        """Items whose labels a `target_transform` has changed, as torchvision's sets have it."""

        targets = LABELS.tolist()
        target_transform = staticmethod(lambda label: label // 2)

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            return Image.fromarray(PIXELS[index]), self.target_transform(self.targets[index])

    class Vectors(Mapped):
        """Whose items have one-hot labels beside the numbers."""

        target_transform = None

        def __getitem__(self, index):
            return Image.fromarray(PIXELS[index]), torch.eye(3)[self.targets[index]]

    assert open_items(Vectors()).labels() == LABELS.tolist()

    class Permuted(Mapped):
        target_transform = None

        def __getitem__(self, index):
            return Image.fromarray(PIXELS[index]), "ab"[index % 2]

    for images in (Mapped(), Permuted()):
        score = moco.knn(run, (images, images), output=tmp_path, **FEW)
        assert score["data"]["classes"] == 2
    for array in (PIXELS, PIXELS[::-1]):
        moco.knn(run, ((array, LABELS), (array, LABELS)), output=tmp_path, **FEW)
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_a_module_of_the_users_own_is_judged_beside_the_untrained_one(tmp_path):
    pair = ((PIXELS, LABELS), (PIXELS, LABELS))
    names = ("model.backbone", "model.stem", "model.width")
    settings = {"backbone": Pixels(), "trainer.max_steps": 1}
    usual = {name: value for name, value in TINY.items() if name not in names}
    run = moco.pretrain(PIXELS, dir=tmp_path / "run", **{**usual, **settings})
    score = moco.knn(run, pair, backbone=Pixels(), **FEW | {"baselines": True})
    assert score["backbone"] == "own:Pixels"
    assert set(score["baselines"]) == {"untrained", "raw_pixels"}
    with pytest.raises(moco.UserError, match="a module of the user's own: give it in Python"):
        moco.knn(run, pair, **FEW)


LABELLED = (PIXELS, LABELS)


def test_a_number_alone_in_the_place_of_several_is_a_list_of_one(run, tmp_path):
    (tmp_path / "own.yaml").write_text("k: 3\nshots: 1\n")
    words = ["--checkpoint", str(run.checkpoint), "--config", str(tmp_path / "own.yaml")]
    assert read_settings(words, KNNConfig, "")[1] == KNNConfig(k=[3], shots=[1])
    assert read_settings([*words, "--k", "5"], KNNConfig, "")[1].k == [5]
    one, several = (
        moco.knn(run, (LABELLED, LABELLED), output=tmp_path, **FEW | {"k": k}) for k in (5, [5])
    )
    assert one | {"seconds": 0} == several | {"seconds": 0}
    with pytest.raises(moco.UserError, match=r"k is 'five': give a list such as"):
        moco.knn(run, k="five")
    with pytest.raises(moco.UserError, match=r"k is \[0\]: give whole numbers from 1 up"):
        moco.knn(run, k=0)


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (([Image.fromarray(p) for p in PIXELS],) * 2, "list of 48 items has no labels: give items"),
        (((PIXELS, LABELS[:5]), (PIXELS, LABELS)), "has 48 images and 5 labels"),
        (PIXELS, "images is a ndarray: give training and test images as a pair"),
        (((PIXELS, LABELS * 0), (PIXELS, LABELS * 0)), "are one class: give images of two"),
        (
            ((PIXELS, np.eye(3)[LABELS]), (PIXELS, LABELS)),
            r"the label of image 0 is array\(\[1., 0., 0.\]\): give one number or name for each",
        ),
        (((PIXELS, [*LABELS[1:], None]), (PIXELS, LABELS)), "the label of image 47 is None"),
        (((PIXELS, [*LABELS[1:], np.nan]), (PIXELS, LABELS)), "the label of image 47 is nan"),
        (None, "data.dataset is own, so the images come from Python: give them"),
    ],
)
def test_images_without_labels_are_refused_in_one_line(images, line, run):
    with pytest.raises(moco.UserError, match=line) as error:
        moco.knn(run, images, **FEW)
    assert "\n" not in str(error.value)


def test_an_export_is_told_in_plain_values(run, tmp_path):
    told = moco.export(run, "safetensors", tmp_path / "a.safetensors")
    assert told["format"] == "safetensors" and told["max_feature_difference"] < 1e-5
    with pytest.raises(moco.UserError, match="exists: choose another, or give --overwrite"):
        moco.export(run, "safetensors", tmp_path / "a.safetensors")
    moco.export(run, "safetensors", tmp_path / "a.safetensors", overwrite=True, allow_partial=False)
    with pytest.raises(moco.UserError, match="unknown option --overwrit"):
        moco.export(run, "safetensors", tmp_path / "b", overwrit=True)
