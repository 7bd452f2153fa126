"""Whole runs: every recipe, exact resuming from every step, stopping, and wrong input."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pictures import write_pictures
from processes import ROOT, finish, start, wait_for
from runs import TINY, main_on_rank, run_tiny

import train
from moco.algorithm.encoder import build_encoder
from moco.algorithm.optim import Plateau
from moco.config import TrainConfig, UserError
from moco.training.autoconfigure import Facts, autoconfigure
from moco.training.writing import AtomicCheckpointIO

SMALL = [
    *("--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.precision", "32-true"),
    *("--model.width", "0.125", "--model.queue_size", "500", "--data.batch_size", "400"),
    *("--model.key_bn", "split", "--trainer.log_every_n_steps", "1", "--run.knn_every", "1"),
    *("--trainer.max_epochs", "2", "--optim.warmup_epochs", "0", "--run.report", "false"),
]
UNREAD = ["--run.knn_every", "0"]  # for runs whose readings nobody looks at
TIMED = {"train/images_per_second", "train/wait_share"}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write colour images of 40 pixels in two classes: 48 in train/ and 8 in val/."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for name in ("cat", "dog"):
            names = [f"{i}.jpg" for i in range(count)]
            write_pictures(root / split / name, names, rng, size=(40, 40))
    return root


def run_small(run_dir, *arguments: str) -> dict:
    return train.main([*SMALL, "--run.dir", str(run_dir), *arguments])


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b, path="") -> list[str]:
    """List the places where two nested states differ by a bit."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys"]
        return [d for k in a for d in same(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, torch.Tensor):
        return [] if a.equal(b) else [path]
    if isinstance(a, list | tuple):
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in same(x, y, f"{path}[{i}]")
        ]
    return [] if a == b else [path]


def rows(run_dir) -> list[dict]:
    with (Path(run_dir) / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


RECIPES = pytest.mark.parametrize(
    "recipe", sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
)


@RECIPES
def test_every_recipe_runs_on_generated_data(recipe, images):
    """With a narrow network: what its size is matters to the test below alone."""
    text = (ROOT / f"configs/{recipe}.yaml").read_text()
    arguments = ["--config", str(ROOT / f"configs/{recipe}.yaml"), "--run.dir", "run"]
    arguments += ["--trainer.max_steps", "2", "--data.num_workers", "0", "--run.knn_k", "5"]
    arguments += ["--run.report", "false"]
    if recipe != "quickstart":
        arguments += ["--data.root", str(images), "--data.image_size", "16"]
        arguments += ["--data.batch_size", "16"]
        arguments += ["--model.queue_size", "32"] if "queue_size: 0" not in text else []
    if "image_size_start: " in text:
        arguments += ["--data.image_size_start", "8", "--data.image_size_end", "12"]
    arguments += ["--model.width", "0.25"] if "  width: " not in text else []
    arguments += ["--model.head_hidden_dim", "64"] if "head_hidden_dim: " in text else []
    if recipe.startswith("cifar10"):
        arguments += ["--data.dataset", "folder"]
    result = train.main(arguments)
    assert result["steps"] == 2
    assert 0 <= result["knn_top1"] <= 100
    assert np.isfinite(result["loss"])
    assert Path(result["checkpoint"]).is_file()
    reads_first = "knn_first: false" not in text
    first, *others = (row["val/knn_top1"] for row in rows("run"))
    assert (first != "") == reads_first and any(others)


@RECIPES
def test_every_recipe_builds_its_network_in_full_size(recipe):
    stored = yaml.safe_load((ROOT / f"configs/{recipe}.yaml").read_text())
    config = TrainConfig.from_dict(stored)
    config = autoconfigure(config, Facts(1_281_167, 224, 3, "cuda", 8)).config
    model, data = config.model, config.data
    with torch.device("meta"):  # where weights take neither memory nor time
        encoder = build_encoder(model, data.channels, data.image_size)
        features = encoder(torch.empty(2, data.channels, *[data.image_size] * 2))
    assert features.shape == (2, model.embedding_dim)


@pytest.mark.parametrize(("resident", "optimizer"), [("memory", "sgd"), ("off", "muon")])
def test_resume_from_every_step_ends_in_the_same_bits(images, resident, optimizer):
    arguments = [
        *("--data.dataset", "folder", "--data.root", str(images), "--data.channels", "3"),
        *("--data.image_size", "16", "--data.batch_size", "16", "--model.queue_size", "40"),
        *("--data.resident", resident, "--data.num_workers", "0", "--run.knn_k", "5"),
        *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "99", "--optim.lr", "0.01"),
        *("--optim.schedule", "plateau", "--optim.plateau_patience", "0"),
        *("--optim.name", optimizer),
        *("--trainer.deterministic", "true"),  # without it a GPU adds numbers in any order
    ]
    run_small("whole", *arguments)
    end, expected = load("whole/checkpoints/last.ckpt"), rows("whole")
    assert end["global_step"] == 6
    for step in range(1, 6):
        shutil.copytree("whole", f"from{step}")
        for later in range(step + 1, 7):
            Path(f"from{step}/checkpoints/step_{later:09d}.ckpt").unlink()
        result = train.main(["--resume", f"from{step}/checkpoints/step_{step:09d}.ckpt"])
        assert result["steps"] == 6
        again = load(f"from{step}/checkpoints/last.ckpt")
        for part in ("state_dict", "optimizer_states", "plateau", "epoch_loss", "global_step"):
            assert not same(end[part], again[part], part), f"resumed after step {step}"
        assert rows(f"from{step}") == expected


def test_plateau_on_knn_counts_each_reading_once_and_names_the_labels(monkeypatch, said):
    shown = []
    read = Plateau.read
    monkeypatch.setattr(Plateau, "read", lambda self, x: (shown.append(x), read(self, x)))
    knn = ["--optim.schedule", "plateau", "--optim.plateau_metric", "val/knn_top1"]
    run_small("run", *knn, "--run.knn_every", "2", "--trainer.max_epochs", "5")
    found = [row["val/knn_top1"] for row in rows("run") if row["val/knn_top1"]]
    assert shown == [float(value) for value in found[1:]], "epochs 2, 4 and 5"
    assert len(shown) == 3
    assert sum("labels of the test images steer the rate" in line for line in said) == 1


def test_dropping_a_piece_of_state_changes_the_result(images):
    """The comparison of the test above can fail: this is its negative control."""
    run_tiny(images, run_dir="whole")
    end = load("whole/checkpoints/last.ckpt")
    for name in ("queue.keys", "momentum_buffer"):
        shutil.copytree("whole", f"without-{name}")
        path = Path(f"without-{name}/checkpoints/step_000000003.ckpt")
        state = load(path)
        if name == "queue.keys":
            state["state_dict"][name] = state["state_dict"][name].roll(1, 0)
        else:
            for slot in state["optimizer_states"][0]["state"].values():
                slot[name].zero_()
        torch.save(state, path)
        train.main(["--resume", str(path)])
        again = load(f"without-{name}/checkpoints/last.ckpt")
        assert same(end["state_dict"], again["state_dict"]), name


def test_a_finished_run_has_nothing_to_do_and_another_recipe_is_refused():
    run_small("run", *UNREAD)
    before = Path("run/checkpoints/last.ckpt").stat().st_mtime_ns
    assert train.main(["--resume", "run"])["steps"] == 6
    assert Path("run/checkpoints/last.ckpt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"model\.temperature is 0\.5 but the run has 0\.2"):
        train.main(["--resume", "run", "--model.temperature", "0.5"])
    with pytest.raises(UserError, match="holds a run already"):
        run_small("run")


def test_resume_auto_starts_anew_and_then_goes_on():
    first = run_small("run", *UNREAD, "--resume", "auto", "--trainer.max_epochs", "1")
    assert first["steps"] == 3
    written = Path("run/checkpoints/last.ckpt").stat().st_mtime_ns
    again = run_small("run", *UNREAD, "--resume", "auto", "--trainer.max_epochs", "1")
    assert (again["steps"], again["run_dir"]) == (3, "run")
    assert Path("run/checkpoints/last.ckpt").stat().st_mtime_ns == written, "it was finished"
    os.truncate("run/checkpoints/last.ckpt", 1000)  # and the newest step_N, which is the same file
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        train.main(["--resume", "run"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(images, number, code):
    epochs = ["--trainer.max_epochs", "5000", "--run.checkpoint_every=-1"]
    process = start(*TINY, "--data.root", str(images), "--run.dir", "run", *epochs)
    wait_for("run/checkpoints/last.ckpt", process)
    process.send_signal(number)
    ended, out, err = finish(process)
    assert ended == code, err
    stopped = json.loads(out.strip().splitlines()[-1])
    assert "go on with --resume run" in err
    assert load("run/checkpoints/last.ckpt")["global_step"] == stopped["steps"]


def test_two_devices_train_the_quickstart(two_ranks, tmp_path):
    words = [*SMALL, "--run.dir", "run", "--trainer.max_epochs", "1", "--model.key_bn", "auto"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    (result, said), (other, _) = two_ranks.run(main_on_rank, "train", words, str(tmp_path))
    assert (result["steps"], other) == (3, {})
    lines = "\n".join(said)
    assert "key BatchNorm: shuffle (auto: 2 devices" in lines
    assert "global batch 400, per device 200" in lines


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("forced", ["0", "1"])
@pytest.mark.parametrize("weights_only", [False, True, None])
def test_loading_a_checkpoint_runs_no_code_whatever_is_asked(monkeypatch, forced, weights_only):
    """Lightning reads through this plug-in what `read_stored` has read before."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint("bomb.ckpt", weights_only=weights_only)
    assert not Path("exploded").exists()


WRONG = {
    "unknown key": (["--model.temprature", "1"], "did you mean --model.temperature"),
    "misspelt recipe": (["--config", str(ROOT / "configs/quikstart.yaml")], "did you mean"),
    "missing folder": (["--data.dataset", "folder", "--data.root", "nowhere"], "data.root"),
    "empty folder": (["--data.dataset", "folder", "--data.root", "."], "data.root"),
    "no root": (["--data.dataset", "folder"], "data.root is empty"),
    "long queue": (
        ["--model.queue_size", "4096"],
        "model.queue_size 4096 is above the 1257 images",
    ),
    "short queue": (["--model.queue_size", "100"], "model.queue_size 100 is below the 400 keys"),
    "large batch": (
        ["--data.batch_size", "2000", "--model.queue_size", "2000"],
        "take data.batch_size 128 and model.queue_size 144",
    ),
    "odd batch": (["--data.batch_size", "300", "--model.bn_splits", "7"], "data.batch_size 300"),
    "large view": (["--data.image_size", "32"], "data.image_size 32 is above the images' 8"),
    "unknown backbone": (["--model.backbone", "resnet5O"], "did you mean 'resnet50'"),
    "negative temperature": (["--model.temperature", "-1"], "model.temperature is -1.0"),
    "no such devices": (["--trainer.devices", "99"], "trainer.devices is 99"),
    "no gpu": (["--trainer.accelerator", "gpu"], "trainer.accelerator is gpu"),
    "fp16": (
        ["--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu"],
        "trainer.precision is 16-mixed",
    ),
    "grey": (["--data.grey", "0.5"], "data.grey is 0.5"),
    "no such run": (["--resume", "nowhere"], "--resume nowhere does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_names_field_value_and_remedy(case, monkeypatch):
    arguments, expected = WRONG[case]
    if case == "no gpu":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        train.main([*SMALL, "--run.dir", "run", *arguments])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("run").exists()


def test_wandb_without_a_key_stays_offline_and_leaves_the_last_line_to_the_result(images):
    words = ["--data.root", str(images), "--trainer.max_epochs", "1", "--run.wandb", "true"]
    process = start(*TINY, "--run.dir", "run", *words)
    code, out, err = finish(process)
    assert code == 0, err
    assert json.loads(out.strip().splitlines()[-1])["steps"] == 3
    assert list(Path("run/wandb").glob("offline-run-*"))
