"""Scores against scikit-learn and by hand, and the networks that are judged."""

from dataclasses import replace

import pytest
import torch
from networks import V3_VIT, save_ours
from sklearn.metrics import recall_score, top_k_accuracy_score

from moco.checkpoints.export import export
from moco.checkpoints.load import load_encoder
from moco.config import DataConfig, UserError
from moco.evaluation import opening, subject
from moco.evaluation.scores import accuracies
from moco.judge_config import JudgeConfig


def test_accuracies_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 7, (500,), generator=generator)
    logits = torch.randn(500, 7, generator=generator)
    logits[torch.arange(500), targets] += 1
    found = accuracies(logits, targets, list("abcdefg"))
    for name, k in (("top1", 1), ("top5", 5)):
        expected = top_k_accuracy_score(targets, logits.double().numpy(), k=k)
        assert found[name] == pytest.approx(100 * expected, abs=0.0051)
    shares = recall_score(targets, logits.argmax(1), average=None)
    assert found["mean_per_class"] == pytest.approx(100 * shares.mean(), abs=0.0051)
    assert list(found["per_class"]) == list("abcdefg")
    assert list(found["per_class"].values()) == pytest.approx(100 * shares, abs=0.0051)


def test_of_equal_scores_the_class_listed_first_comes_first():
    logits = torch.zeros(6, 6)
    targets = torch.arange(6)
    found = accuracies(logits, targets, list("abcdef"))
    assert found["top1"] == 16.67 and found["top5"] == 83.33  # all but the sixth class
    assert list(found["per_class"].values()) == [100, 0, 0, 0, 0, 0]
    logits[5, 5] = 1
    found = accuracies(logits, targets, list("abcdef"))
    assert found["top5"] == 100 and found["per_class"]["f"] == 100


def test_scores_that_are_no_numbers_are_misses():
    logits = torch.full((4, 2), float("nan"))
    found = accuracies(logits, torch.tensor([0, 1, 0, 1]), ["a", "b"])
    assert found["top1"] == found["mean_per_class"] == 0 and found["top5"] is None
    assert found["per_class"] == {"a": 0, "b": 0}


def test_classes_without_a_score_are_no_hits():
    """One neighbour votes for one class: the best five hold that one alone."""
    generator = torch.Generator().manual_seed(0)
    targets, voted = torch.randint(0, 20, (2, 4000), generator=generator)
    logits = torch.full((4000, 20), -torch.inf).scatter_(1, voted[:, None], 0.0)
    found = accuracies(logits, targets, [str(n) for n in range(20)])
    share = 100 * (targets == voted).double().mean().item()
    assert found["top1"] == found["top5"] == pytest.approx(share, abs=0.0051)


def test_a_class_without_images_has_no_accuracy():
    logits = torch.eye(4)[[0, 0, 0, 1, 2]]
    found = accuracies(logits, torch.tensor([0, 0, 0, 0, 2]), list("abcd"))
    assert found["per_class"] == {"a": 75, "b": None, "c": 100, "d": None}
    assert (found["top1"], found["mean_per_class"]) == (80, 87.5)


def test_the_untrained_network_has_the_shape_of_the_judged_one(tmp_path):
    """An exported ViT keeps its width, depth, patches and heads outside the model's settings."""
    save_ours(tmp_path / "a.ckpt", V3_VIT)
    export(tmp_path / "a.ckpt", "safetensors", tmp_path / "a.safetensors")
    loaded = load_encoder(tmp_path / "a.safetensors")
    data = DataConfig(channels=3, image_size=32)
    networks = subject._networks(JudgeConfig(), loaded, data, draws=2)
    shapes = [
        {key: tensor.shape for key, tensor in networks[name].state_dict().items()}
        for name in ("encoder", "untrained", "untrained 2")
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    drawn = [networks[name].backbone for name in ("encoder", "untrained", "untrained 2")]
    assert [network.blocks[0].attn.num_heads for network in drawn] == [4, 4, 4]
    assert len({network.state_dict()["blocks.0.attn.qkv.weight"].sum() for network in drawn}) == 3


@pytest.mark.parametrize(
    "changes", [{"solarise": 0.5}, {"chunks": 2}, {"views": "v3"}, {"image_size_start": 4}]
)
@pytest.mark.parametrize("form", ["run", "safetensors"])
def test_settings_of_pretraining_are_refused_for_every_layout(tmp_path, changes, form):
    save_ours(tmp_path / "a.ckpt", V3_VIT)
    loaded = load_encoder(tmp_path / "a.ckpt")
    loaded = loaded if form == "run" else replace(loaded, config={})

    def read(stored):
        return replace(DataConfig(**stored), dataset="digits", **changes)

    with pytest.raises(UserError, match=rf"data\.{next(iter(changes))} is a setting of pretrain"):
        opening.data_settings(loaded, read)


def test_a_run_whose_views_grew_is_judged_at_any_size(tmp_path):
    save_ours(tmp_path / "a.ckpt", V3_VIT)
    loaded = load_encoder(tmp_path / "a.ckpt")
    loaded.config["data"]["image_size_start"] = 16

    def read(stored):
        return replace(DataConfig(**stored), image_size=8)

    assert opening.data_settings(loaded, read).image_size == 8
