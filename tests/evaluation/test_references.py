"""References: other weights beside the encoder, and test images that were pretrained on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SMALL, save_ours
from pictures import write_pictures
from PIL import Image
from runs import main_on_rank, run_tiny

import eval_knn
import eval_linear
import export
from moco.config import UserError
from moco.evaluation.references import Renormalise
from moco.evaluation.verdict import RAW_PIXELS, compare, resampled
from moco.images import aside
from moco.images.image_source import ImageSource

CHECKPOINT, OTHER, FILE = (
    "run/checkpoints/last.ckpt",
    "other/checkpoints/last.ckpt",
    "a.safetensors",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make two runs on a set two of whose test images are training images, and an export."""
    folder = tmp_path_factory.mktemp("references")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        for kind in "ab":
            write_pictures(folder / "set" / split / kind, [f"{n}.png" for n in range(count)], rng)
    with Image.open(folder / "set/train/a/3.png") as image:
        image.save(folder / "set/test/a/again.png")
    with Image.open(folder / "set/train/b/5.png") as image:
        image.save(folder / "set/test/b/again.bmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_tiny("set", "--trainer.max_epochs", "1")
        run_tiny("set", "--trainer.max_epochs", "1", "--run.seed", "1", run_dir="other")
        words = ["--checkpoint", CHECKPOINT, "--format", "safetensors", "--output", FILE]
        export.main(words)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


KNN = ["--checkpoint", CHECKPOINT, "--k", "[5]", "--shots", "[1]", "--gallery", "false"]
KNN += ["--accelerator", "cpu", "--reference", OTHER, FILE]


def test_other_weights_stand_beside_the_encoder(inside, said):
    result = eval_knn.main(KNN)
    rows = result["comparison"]
    same, other = rows["reference_a.safetensors"], rows["reference_other"]
    assert same["top1"] == rows["trained"]["top1"]
    assert (same["ahead_by"], same["ahead_by_interval_95"]) == (0, [0, 0])
    assert other["top1"] == eval_knn.main(["--checkpoint", OTHER, *KNN[2:10]])["top1"]
    low, high = other["ahead_by_interval_95"]
    assert low < other["ahead_by"] < high
    assert [each["name"] for each in result["references"]] == [
        "reference other",
        "reference a.safetensors",
    ]
    assert result["references"][1]["backbone_sha256"] != result["references"][0]["backbone_sha256"]
    assert rows["sentence"].count(". ") == 0
    start = next(n for n, line in enumerate(said) if line.startswith("kNN (k 5), 22 test images"))
    table = said[start : start + 8]
    assert max(map(len, table)) <= 60 and sum("95 % of resamplings" in line for line in table) == 2


def test_test_images_that_were_pretrained_on_are_named_by_their_pixels(inside, said):
    seen = eval_knn.main(KNN)["test_images_in_pretraining"]
    assert seen[FILE] is None and seen[CHECKPOINT] == seen[OTHER]
    assert (seen[OTHER]["pool"], seen[OTHER]["count"]) == (48, 2)
    names = {Path(name).name for name in seen[OTHER]["images"].values()}
    assert names == {"again.png", "again.bmp"}
    with Image.open("set/train/a/3.png") as image:
        pixels = np.asarray(image).transpose(2, 0, 1)
    told = repr(pixels.shape).encode() + pixels.tobytes()
    assert hashlib.sha256(told).hexdigest() in seen[OTHER]["images"]
    assert any(line.startswith("2 of 22 test images are among them: ") for line in said)
    assert any(line == f"{FILE} does not say which images it was trained on" for line in said)


def test_images_that_a_run_set_aside_are_not_among_those_it_trained_on(inside, said, tmp_path):
    """And two test images of the same pixels are two."""
    names = sorted((Path("set/train")).rglob("*.png"))
    held = aside.set_aside(ImageSource("", None, [*map(str, names)], None, [], 3), 4, 7)[1].paths
    stored = torch.load(OTHER, weights_only=True)
    own = {"root": str(tmp_path / "set"), "labels": ""}
    for name in names:
        (tmp_path / "set/train" / name.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(name, tmp_path / "set/train" / name.parent.name)
    stored["config"]["data"] |= own
    stored["config"]["run"]["seed"] = 7
    for number, name in enumerate([*held, str(names[1]), str(names[1])]):
        folder = tmp_path / "judged/test" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, folder / f"{number}.png")
    shutil.copytree("set/train", tmp_path / "judged/train")
    counts = []
    for stored["decided"]["held_out"] in (0, 4):
        torch.save(stored, "aside.ckpt")
        words = [*KNN[:-2], "aside.ckpt", "--data.root", str(tmp_path / "judged")]
        seen = eval_knn.main([*words, "--k", "[5]"])["test_images_in_pretraining"]["aside.ckpt"]
        counts.append((seen["pool"], seen["count"]))
    assert counts == [(48, 6), (44, 2)] and str(names[1]) not in held
    shutil.copy(names[0], tmp_path / "set/train/a/one_more.png")  # and others would be set aside
    assert (
        eval_knn.main([*words, "--k", "[5]"])["test_images_in_pretraining"]["aside.ckpt"]["count"]
        == 6
    )
    assert any("set images aside of a set that has changed since" in line for line in said)


def test_images_that_are_gone_are_said(inside, said, tmp_path):
    stored = torch.load(OTHER, weights_only=True)
    stored["config"]["data"]["root"] = str(tmp_path / "gone")
    torch.save(stored, "moved.ckpt")
    seen = eval_knn.main([*KNN[:-2], "moved.ckpt"])["test_images_in_pretraining"]
    assert seen["moved.ckpt"] is None and seen[CHECKPOINT]["count"] == 2
    assert any("trained on cannot be read: data.root" in line for line in said)


@pytest.mark.parametrize("protocol", ["cached", "paper", "finetune"])
def test_references_go_through_every_protocol(inside, protocol):
    words = ["--checkpoint", CHECKPOINT, "--protocol", protocol, "--epochs", "1", "--baselines"]
    words += ["false", "--accelerator", "cpu", "--batch_size", "16", "--reference", OTHER]
    words += ["--learning_rates", "[0.01]"]
    result = eval_linear.main(words)
    assert result["comparison"]["reference_other"]["draws"] == 1
    assert result["comparison"]["is_better"] is not None


def test_two_ranks_compare_as_one(inside, folder, two_ranks):
    alone = eval_knn.main(KNN)
    (result, _), (rest, _) = two_ranks.run(main_on_rank, "eval_knn", KNN, str(folder))
    assert rest == {} and result["comparison"] == alone["comparison"]
    assert result["test_images_in_pretraining"] == alone["test_images_in_pretraining"]


def test_without_references_nothing_is_compared_with_the_pretraining(inside):
    result = eval_knn.main([*KNN[:-3]])
    assert "references" not in result and "test_images_in_pretraining" not in result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.ckpt"], r"missing\.ckpt.* does not exist"),
        (["https://x/y.pth"], "is an address"),
        (["grey.ckpt"], "takes images of 1 channels and the checkpoint 3"),
        ([FILE, "--layer", "head"], r"a\.safetensors holds no projection head"),
    ],
)
def test_what_cannot_be_judged_beside_it_is_refused(inside, words, message):
    save_ours("grey.ckpt", SMALL, channels=1)
    with pytest.raises(UserError, match=message):
        eval_knn.main([*KNN[:-2], *words])


def test_images_are_normalised_as_the_reference_was_trained():
    images = torch.rand(2, 3, 4, 4)

    def normalised(mean: list[float], std: list[float]) -> torch.Tensor:
        return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    first, other = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(Renormalise(first, other)(normalised(*first)), normalised(*other))


def test_resamplings_of_pairs_are_those_of_the_images():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.rand(400, generator=generator) < share for share in (0.7, 0.62))
    difference = own.double() - other.double()
    rows = torch.randint(0, 400, (4000, 400), generator=generator)
    drawn = 100 * difference[rows].mean(1)
    expected = [drawn.quantile(share).item() for share in (0.025, 0.975)]
    assert resampled(difference) == pytest.approx(expected, abs=0.4)


def test_a_reference_is_beaten_where_its_interval_says_so():
    labels, own = torch.arange(1000) % 4, torch.zeros(1000, dtype=torch.int8)
    own[:700] = 1
    for other, side in ((own.roll(0), 0), (own * 0, 1), (own * 0 + 1, -1)):
        found = compare("kNN", labels, own, {RAW_PIXELS: [own * 0], "reference x.pth": [other]})
        assert found.baselines[1].side == side and found.is_better == (side == 1)
        assert "reference x.pth" in found.sentence()
        assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
        assert max(map(len, found.lines())) <= 60
