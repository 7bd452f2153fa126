"""A run that is extended equals one that was as long from the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from runs import assert_same_end, copy_until, load, run_tiny, trained

import train
from moco.algorithm.optim import decay_start, learning_rate
from moco.config import OptimConfig, UserError

pytestmark = pytest.mark.usefixtures("in_tmp")
STABLE = [
    *("--optim.schedule", "stable", "--optim.decay_share", "0.34", "--optim.warmup_epochs", "0.5")
]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Train two epochs of three steps, and four; every checkpoint is kept."""
    folder = tmp_path_factory.mktemp("extend")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_tiny(images, *STABLE, run_dir="short")
        run_tiny(images, *STABLE, "--trainer.max_epochs", "4", run_dir="long")
    return folder


def test_stable_stays_and_then_falls_linearly():
    config = OptimConfig(schedule="stable", lr=1.0, decay_share=0.25, warmup_epochs=1)
    rates = [learning_rate(config, step, 4, 16) for step in range(16)]
    assert rates[:4] == [0, 0.25, 0.5, 0.75] and rates[4:13] == [1.0] * 9
    assert rates[13:] == [0.75, 0.5, 0.25]
    assert decay_start(config, 16) == 12
    assert decay_start(OptimConfig(decay_share=0.01), 3) == 2  # it falls at the last step at least


@pytest.mark.parametrize("step", range(1, 7))
def test_extended_equals_longer(runs, step):
    run_dir = copy_until(runs / "short", step, decay=4)
    found = train.main(["--resume", run_dir, "--extend", "2"])
    assert found["steps"] == 12
    assert_same_end("run", str(runs / "long"))
    kept = load("run/checkpoints/before_decay.ckpt")
    assert kept["global_step"] == 8  # of the longer run
    content = yaml.safe_load(Path("run/config.yaml").read_text())
    assert content["trainer"]["max_epochs"] == 2
    assert content["decided"]["settings"]["trainer.max_epochs"] == 4
    rows = Path("run/metrics.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, 13))


def test_an_extended_run_resumes(runs):
    run_dir = copy_until(runs / "short", 6, decay=4)
    train.main(["--resume", run_dir, "--extend", "2"])
    for step in range(7, 13):
        Path(f"run/checkpoints/step_{step:09d}.ckpt").unlink()
    shutil.copyfile("run/checkpoints/step_000000006.ckpt", "run/checkpoints/last.ckpt")
    train.main(["--resume", run_dir])
    assert_same_end("run", str(runs / "long"))


def test_a_cosine_is_extended_only_knowingly(images):
    trained(images)
    with pytest.raises(UserError, match=r"--extend 1: after step 6 the rate would jump from 0 to "):
        train.main(["--resume", "run", "--extend", "1"])
    assert train.main(["--resume", "run", "--extend", "1", "--yes"])["steps"] == 9


def test_what_cannot_be_extended_is_refused(images):
    run_tiny(images, "--trainer.max_steps", "2", "--optim.schedule", "constant")
    with pytest.raises(UserError, match=r"trainer\.max_steps 2, so epochs do not matter"):
        train.main(["--resume", "run", "--extend", "1"])
    with pytest.raises(UserError, match="that --resume names"):
        train.main(["--data.root", str(images), "--extend", "1"])
    with pytest.raises(UserError, match="--yes is about --extend"):
        train.main(["--resume", "run", "--yes"])


def test_what_an_extension_does_not_make_longer_is_said(images, said):
    """A run that long from the start would have warmed up for two epochs."""
    run_tiny(images, *STABLE, "--optim.warmup_epochs", "2", "--trainer.max_epochs", "1")
    assert train.main(["--resume", "run", "--extend", "2"])["steps"] == 9
    kept = "optim.warmup_epochs stays 0.1, which a run that long from the start need not have had"
    assert kept in said
    momentum = ["--model.key_momentum_schedule", "cosine", "--optim.schedule", "constant"]
    run_tiny(images, *momentum, run_dir="other")
    with pytest.raises(UserError, match=r"the key momentum would jump from 1 to 0\.99"):
        train.main(["--resume", "other", "--extend", "1"])


def test_damage_to_the_checkpoint_before_the_decay_is_said(runs):
    run_dir = copy_until(runs / "short", 6, decay=4)
    Path("run/checkpoints/before_decay.ckpt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"before_decay\.ckpt is damaged"):
        train.main(["--resume", run_dir, "--extend", "2"])
