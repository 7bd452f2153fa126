"""Runs of MoCo v3: they resume, judge, export and start from weights as all others do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import TINY, assert_same_end, at, load, main_on_rank, run_tiny

import export
import moco
import train
from moco.config import UserError

pytestmark = pytest.mark.usefixtures("in_tmp")

V3 = [
    *("--model.queue_size", "0", "--model.head", "mlp_bn", "--model.head_hidden_dim", "24"),
    *("--model.predictor", "mlp", "--model.symmetric", "sum", "--data.views", "v3"),
    *("--model.key_momentum_schedule", "cosine", "--optim.schedule_per", "step"),
]
RESNET = [*V3, "--model.zero_init_residual", "true", "--optim.name", "lars", "--optim.lr", "0.3"]
VIT = [
    *("--model.backbone", "vit_tiny_patch16_224", "--model.stem", "imagenet"),
    *("--model.width", "0.125", "--model.patch_size", "4", "--model.depth", "2"),
    *("--model.num_heads", "4", "--model.positions", "sincos", "--model.vit_init", "xavier"),
    *("--model.freeze_patch_embed", "true", *V3, "--model.predictor_last_bn", "true"),
    *("--model.head_layers", "3", "--optim.name", "adamw", "--optim.clip_grad_norm", "1"),
    *("--data.chunks", "2", "--optim.lr", "0.001"),
]
KINDS = pytest.mark.parametrize("options", [RESNET, VIT], ids=["resnet", "vit"])
TWO_QUEUES = ["--model.queues", "2", "--model.queue_size", "24", "--model.symmetric", "mean"]


@pytest.mark.parametrize("resident", ["memory", "off"])
@pytest.mark.parametrize("options", [RESNET, VIT, TWO_QUEUES], ids=["resnet", "vit", "two queues"])
def test_a_run_resumes_to_the_same_bits(images, options, resident):
    options = [*options, "--data.resident", resident, "--data.num_workers", "0"]
    run_tiny(images, *options, run_dir="whole")
    for step in (1, 4):
        shutil.copytree("whole", f"from{step}")
        train.main(["--resume", f"from{step}/checkpoints/step_{step:09d}.ckpt"])
        assert_same_end("whole", f"from{step}")


@KINDS
def test_two_ranks_train_and_resume_to_the_same_bits(images, two_ranks, tmp_path, options):
    arguments = [*TINY, *options, "--data.root", str(images), "--trainer.max_epochs", "1"]
    two_ranks.run(main_on_rank, "train", [*arguments, "--run.dir", "whole"], str(tmp_path))
    assert at(1, "whole")["decided"]["key_bn"] == "plain"
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy("whole/config.yaml", "run/config.yaml")
    shutil.copy("whole/checkpoints/step_000000001.ckpt", "run/checkpoints/last.ckpt")
    two_ranks.run(main_on_rank, "train", ["--resume", "run"], str(tmp_path))
    assert_same_end("whole", "run")


@KINDS
def test_a_v3_run_loads_and_exports_with_equal_features(images, options):
    """Graphs of such networks are traced in tests/checkpoints/test_export.py."""
    run_tiny(images, *options, "--trainer.max_steps", "2")
    path = "run/checkpoints/last.ckpt"
    loaded = moco.load_backbone(path)
    state = load(path)["state_dict"]
    for name, value in loaded.state_dict().items():
        assert value.equal(state[f"query_encoder.backbone.{name}"]), name
    export.main(["--checkpoint", path, "--format", "safetensors", "--output", "out"])


def test_another_number_of_chunks_or_queues_is_another_run(images):
    run_tiny(images, *RESNET, "--trainer.max_steps", "1")
    for change in (["--data.chunks", "2"], ["--model.predictor", "none"]):
        with pytest.raises(UserError, match=rf"{change[0][2:]}"):
            train.main(["--resume", "run", *change])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.queue_size 0 --trainer.accumulate_grad_batches 2", r"data\.chunks instead"),
        ("--model.queues 2", r"model\.queues is 2.*model\.symmetric mean or sum"),
        ("--model.queues 2 --model.symmetric mean --model.queue_size 0", r"queue_size above 0"),
        ("--data.blur [0.1,0.2,0.3]", r"data\.blur is .*two, one for each view"),
        ("--data.chunks 5", r"does not divide by 5"),
        ("--model.positions sincos", r"model\.positions sincos needs a ViT"),
        ("--model.head_layers 1", r"head_layers is 1: it must be at least 2"),
    ],
)
def test_what_cannot_work_is_one_line(images, words, message):
    with pytest.raises(UserError, match=message):
        run_tiny(images, *words.split())
    assert not Path("run/checkpoints").exists()
