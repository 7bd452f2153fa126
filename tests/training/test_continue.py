"""Going on from weights: the backbone waits for the head, and then all of it trains."""

from __future__ import annotations

import pytest
import torch
from runs import as_after, assert_same_end, at, load, run_tiny, trained

import moco
import train
from moco.algorithm.optim import learning_rate
from moco.checkpoints.load import load_encoder
from moco.config import OptimConfig, TrainConfig, UserError
from moco.training.autoconfigure import Settings, choose_length

pytestmark = pytest.mark.usefixtures("in_tmp")
FREEZE = ["--optim.freeze_backbone_epochs", "1", "--optim.warmup_epochs", "0.34"]
GROUPS = {
    "sgd": ["--optim.weight_decay", "0.1"],
    "adamw": ["--optim.name", "adamw"],
    "lars": ["--optim.name", "lars"],
    "muon": ["--optim.name", "muon", "--optim.nesterov", "true"],
    "clipped": ["--optim.clip_grad_norm", "0.1"],
}


def backbone(step: int, side: str, run_dir: str = "run") -> dict[str, torch.Tensor]:
    prefix = f"{side}_encoder.backbone."
    state = at(step, run_dir)["state_dict"]
    return {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def started(images, tmp_path_factory):
    """Return the checkpoint of a run that ended."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_tiny(images, "--trainer.max_epochs", "1")
    return folder / "run/checkpoints/last.ckpt"


@pytest.mark.parametrize("name", GROUPS)
def test_a_frozen_backbone_keeps_its_weights_and_takes_the_images_statistics(images, started, name):
    run_tiny(images, *FREEZE, *GROUPS[name], "--init_from", str(started))
    before = torch.load(started, weights_only=True)["state_dict"]
    first, frozen, thawed = (backbone(step, "query") for step in (1, 3, 5))
    moved = {key for key in frozen if not frozen[key].equal(thawed[key])}
    for key, value in frozen.items():
        is_statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert value.equal(before[f"query_encoder.backbone.{key}"]) != is_statistic, key
        assert value.equal(first[key]) != is_statistic
        assert key in moved
    heads = [at(step)["state_dict"]["query_encoder.head.0.weight"] for step in (1, 3)]
    assert not heads[0].equal(heads[1])
    assert (
        at(3)["optimizer_states"][0]["state"].keys() < at(5)["optimizer_states"][0]["state"].keys()
    )


def test_the_key_encoder_stays_with_it(images, started):
    fresh = torch.load(started, weights_only=True)
    fresh["state_dict"] |= {
        name.replace("query", "key", 1): value
        for name, value in fresh["state_dict"].items()
        if name.startswith("query_encoder.backbone.")
    }
    torch.save(fresh, "both.ckpt")
    run_tiny(images, *FREEZE, "--init_from", "both.ckpt")
    query, key = backbone(3, "query"), backbone(3, "key")
    assert all(key[n].equal(v) for n, v in query.items() if "running" not in n)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_it_resumes_in_and_after_the_frozen_epochs(images, started, step):
    trained(images, *FREEZE, "--init_from", str(started), run_dir="whole")
    as_after(step, "whole")
    train.main(["--resume", "run"])
    assert_same_end("whole", "run")
    assert load_encoder("run/checkpoints/last.ckpt").is_begun  # as its model card says


def test_a_run_from_nothing_is_not_called_begun_from_weights(started):
    assert not load_encoder(started).is_begun


def test_images_are_normalised_as_the_weights_take_them(images, started, said):
    cifar = ["--data.mean", "[0.5,0.4,0.3]", "--data.std", "[0.2,0.2,0.1]"]
    run_tiny(images, *cifar, "--trainer.max_epochs", "1", run_dir="first")
    first = "first/checkpoints/last.ckpt"
    run_tiny(images, "--init_from", first)
    assert "data.mean: [0.5, 0.4, 0.3] (as the weights of --init_from have it)" in said
    seen = moco.load_backbone("run/checkpoints/last.ckpt").transform
    assert [seen.mean, seen.std] == [[0.5, 0.4, 0.3], [0.2, 0.2, 0.1]]
    run_tiny(images, *cifar, "--init_from", first, run_dir="told")
    assert_same_end("run", "told")
    as_after(3, "run", "again")
    train.main(["--resume", "again"])
    assert_same_end("run", "again")
    said.clear()
    own = ["--data.mean", "[0.1,0.1,0.1]", "--trainer.max_steps", "1"]
    run_tiny(images, *own, "--init_from", first, run_dir="own")
    run_tiny(images, "--init_from", str(started), "--trainer.max_steps", "1", run_dir="usual")
    assert not any(line.startswith("data.mean") for line in said)


def test_the_warm_up_begins_where_the_backbone_thaws():
    config = OptimConfig(
        lr=1.0, freeze_backbone_epochs=1, warmup_epochs=1, warmup_start=0.2, schedule="constant"
    )
    rates = [learning_rate(config, step, 4, 16) for step in range(10)]
    assert rates == pytest.approx([1.0] * 4 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 2)
    cosine = OptimConfig(lr=1.0, freeze_backbone_epochs=1, warmup_epochs=1, schedule_per="step")
    assert learning_rate(cosine, 12, 4, 16) == pytest.approx(0.5)  # half of what is left after it


@pytest.mark.parametrize(
    ("asked", "epochs", "come_to"),
    [((1.0, 1.0), 2, (1.0, 1.0)), ((1.0, 1.0), 1, (0.1, 0.1)), ((3.0, 0.1), 2, (0.2, 0.1))],
)
def test_a_short_try_freezes_shortly(asked, epochs, come_to):
    names = ("optim.freeze_backbone_epochs", "optim.warmup_epochs")
    wanted = dict(zip(names, asked, strict=True)) | {"trainer.max_epochs": epochs}
    own = Settings(TrainConfig().changed(wanted))
    choose_length(own, 100)
    assert tuple(own.config.value(name) for name in names) == come_to


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_network_is_that_of_the_weights_where_it_is_auto(images, kind, said):
    vit = [
        *("--model.backbone", "vit_tiny_patch16_224", "--model.stem", "imagenet"),
        *("--model.patch_size", "4", "--model.depth", "1", "--model.num_heads", "2"),
    ]
    run_tiny(images, *(vit if kind == "vit" else []), "--trainer.max_steps", "1", run_dir="first")
    auto = [word for name in ("backbone", "stem", "width") for word in (f"--model.{name}", "auto")]
    words = ["--init_from", "first/checkpoints/last.ckpt", "--trainer.max_steps", "1"]
    run_tiny(images, *auto, *words)
    before, after = (load(f"{run}/checkpoints/last.ckpt") for run in ("first", "run"))
    shapes = [{n: v.shape for n, v in c["state_dict"].items()} for c in (before, after)]
    assert shapes[0] == shapes[1]
    assert "model.width: 0.125 (as the weights of --init_from have it)" in said
    assert moco.load_backbone("run/checkpoints/last.ckpt").num_features
    with pytest.raises(UserError, match="set model.backbone, stem and width as in the file"):
        run_tiny(images, *words, "--model.backbone", "resnet18", run_dir="other")
