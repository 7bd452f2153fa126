"""Runs that read shards: from a disk and from a store, stopped and resumed, on one rank and two."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from ranks import Ranks
from runs import TINY, assert_same_end, at, main_on_rank, run_tiny
from webserver import WebServer

import eval_knn
import moco
import train
from moco.command import replay
from moco.config import UserError
from moco.images.packing import pack
from moco.images.streamed import Cuts

pytestmark = pytest.mark.usefixtures("in_tmp")

SHARDS = ["--data.dataset", "shards", "--data.streams", "8", "--data.window", "4"]
# Without BatchNorm, whose statistics are those of a rank.
PLAIN = [
    *("--model.backbone", "vit_tiny_patch16_224", "--model.stem", "imagenet"),
    *("--model.width", "0.125", "--model.patch_size", "8", "--model.depth", "1"),
    *("--model.num_heads", "4", "--model.key_bn", "plain", "--trainer.max_epochs", "1"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """48 images of two classes in shards of some each, and 8 that are held out."""
    root = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for name in ("cat", "dog"):
            names = [f"{i}.png" for i in range(count)]
            write_pictures(root / "files" / split / name, names, rng)
    pack(str(root / "files"), str(root / "set"), 0.006)
    return root / "set"


@pytest.mark.skipif(not find_spec("aiohttp"), reason="needs aiohttp")
def test_a_run_ends_alike_from_a_disk_and_from_a_store_and_resumes_on_either(packed):
    run_tiny(packed, *SHARDS, run_dir="whole")
    count = len(list(packed.glob("train-*")))
    with WebServer(packed) as server:
        remote = f"{server.address}/train-{{00000..{count - 1:05d}}}.tar"
        run_tiny(remote, *SHARDS, run_dir="store")
        assert_same_end("whole", "store")
        for step in (2, 4):  # within an epoch
            shutil.copytree("whole", f"from{step}")
            path = f"from{step}/checkpoints/step_{step:09d}.ckpt"
            train.main(["--resume", path, "--data.root", remote])
            assert_same_end("whole", f"from{step}")
        assert server.asked


def test_what_makes_the_order_is_kept_by_a_resumed_run(packed):
    run_tiny(packed, *SHARDS, "--trainer.max_steps", "1")
    for change in (["--data.streams", "4"], ["--data.window", "8"]):
        with pytest.raises(UserError, match=rf"{change[0][2:]} is {change[1]} but the run has"):
            train.main(["--resume", "run", *change])


def test_two_ranks_end_as_one_and_a_run_goes_on_on_one_rank(packed, two_ranks, tmp_path):
    words = [*TINY, *PLAIN, *SHARDS, "--data.root", str(packed)]
    two_ranks.run(main_on_rank, "train", [*words, "--run.dir", "two"], str(tmp_path))
    run_tiny(packed, *PLAIN, *SHARDS, run_dir="one")
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy("two/config.yaml", "run/config.yaml")
    shutil.copy("two/checkpoints/step_000000001.ckpt", "run/checkpoints/last.ckpt")
    assert train.main(["--resume", "run", "--trainer.devices", "1"])["steps"] == 3
    assert not any("running_mean" in name for name in at(1, "two")["state_dict"])
    first = at(3, "one")["state_dict"]
    for run_dir in ("two", "run"):
        other = at(3, run_dir)["state_dict"]
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0, msg=name)


WIDE = [*TINY, *PLAIN, "--data.dataset", "shards", "--data.batch_size", "64"]
WIDE += ["--model.queue_size", "128"]


def rows_on_rank(words: list[str], folder: str) -> list[list[int]]:
    """Train on each rank, and return the rows of the batches that it has cut."""
    taken: list[list[int]] = []
    cut = Cuts.__getitems__

    def watched(self, batch):
        taken.append(batch[1].tolist())
        return cut(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cuts, "__getitems__", watched)
        patch.setattr("moco.training.hardware.os.cpu_count", lambda: 8)
        main_on_rank("train", [*words, "--data.num_workers", "0"], folder)
    return taken


def assert_same_weights(first: str, second: str) -> None:
    for name, value in at(3, first)["state_dict"].items():
        other = at(3, second)["state_dict"][name]
        torch.testing.assert_close(other, value, atol=1e-6, rtol=0, msg=f"{second}: {name}")


def test_one_two_and_four_ranks_read_64_streams_alike_and_four_go_on_as_two(tmp_path, two_ranks):
    """The same global batches, and the same weights of an encoder without BatchNorm."""
    write_pictures(
        tmp_path / "files", [f"{i:03d}.png" for i in range(200)], np.random.default_rng(1)
    )
    pack(str(tmp_path / "files"), str(tmp_path / "set"), 0.01)
    words = [*WIDE, "--data.root", str(tmp_path / "set")]
    batches, worlds = {}, (Ranks(1), two_ranks, Ranks(4))
    for ranks in worlds:
        told = [*words, "--run.dir", f"of{ranks.world}"]
        shares = ranks.run(rows_on_rank, told, str(tmp_path))
        batches[ranks.world] = [[*chain(*parts)] for parts in zip(*shares, strict=True)]
        if ranks is not two_ranks:
            ranks.close()
    assert [len(batch) for batch in batches[1]] == [64, 64, 64]
    assert batches[1] == batches[2] == batches[4]
    shutil.copytree("of4", "rest", ignore=shutil.ignore_patterns("step_*2*", "step_*3*"))
    shutil.copy("of4/checkpoints/step_000000001.ckpt", "rest/checkpoints/last.ckpt")
    resumed = ["--resume", "rest", "--trainer.devices", "2"]
    rest = two_ranks.run(rows_on_rank, resumed, str(tmp_path))
    assert [[*chain(*parts)] for parts in zip(*rest, strict=True)] == batches[1][1:]
    for run_dir in ("of2", "of4", "rest"):
        assert_same_weights("of1", run_dir)


def test_knn_reads_shards_while_training_and_afterwards(packed):
    result = run_tiny(packed, *SHARDS, "--run.knn_every", "1", "--trainer.max_epochs", "1")
    assert result["comparison"]["test_images"] == 8
    checkpoint = ["--checkpoint", "run/checkpoints/last.ckpt", "--accelerator", "cpu"]
    judged = eval_knn.main([*checkpoint, "--baselines", "false", "--k", "[5]"])
    assert (judged["data"]["train_images"], judged["data"]["test_images"]) == (48, 8)
    assert judged["per_class"].keys() == {"cat", "dog"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.root", "nowhere/x-{0..3}.tar"], "x-0.tar is not there"),
        (["--data.root", "s3://me:c0ffee@x/y.tar"], "holds a user or a password"),
        (["--data.streams", "0"], "data.streams is 0"),
        (["--data.window", "0"], "data.window is 0"),
        (["--data.cache_gib", "0"], "data.cache_gib is 0"),
    ],
)
def test_wrong_settings_of_shards_are_one_line(packed, words, said):
    with pytest.raises(UserError, match=said) as caught:
        run_tiny(packed, *SHARDS, *words)
    assert "c0ffee" not in str(caught.value) and not Path("run").exists()


def test_a_run_on_shards_from_python_has_its_page_and_its_batches_and_lists_no_features(packed):
    words = zip(TINY[::2], TINY[1::2], strict=True)
    settings = {name.removeprefix("--"): value for name, value in words}
    own = {"data.dataset": "shards", "data.streams": 8, "data.window": 4, "run.report": True}
    run = moco.pretrain(str(packed), dir="run", **{**settings, **own})
    page = Path(run.report).read_text(encoding="utf-8")
    assert "The page lacks" not in page and "neighbours" in page
    told = replay.main(["run", "--step", "2"])
    assert told["exact"] and told["loss"] == pytest.approx(told["logged_loss"], abs=1e-4)
    with pytest.raises(UserError, match="embed reads files: name a folder"):
        moco.embed(run, None, "features", accelerator="cpu")
