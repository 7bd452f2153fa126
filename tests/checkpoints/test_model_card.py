"""Model cards: they list this encoder's scores and nobody else's."""

import json

import pytest
import torch
from networks import VIT, prefixed, save_ours, torchvision_resnet

from moco.checkpoints.export import export
from moco.checkpoints.load import load_encoder
from moco.checkpoints.matching import checksum
from moco.checkpoints.model_card import model_card
from moco.evaluation.subject import Layer


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save_ours(tmp_path / "checkpoints" / "last.ckpt", VIT)
    return tmp_path


def test_scores_of_other_weights_are_not_listed(run):
    path = run / "checkpoints" / "last.ckpt"
    query, key = load_encoder(path), load_encoder(path, "key")
    sums = {
        "query": checksum(Layer(query.backbone, None, False)),
        "head": checksum(Layer(query.backbone, query.head, False)),
        "key": checksum(Layer(key.backbone, None, False)),
        "unsigned": None,
    }
    assert len(set(sums.values())) == 4
    for number, (name, sha) in enumerate(sums.items()):
        content = {"top1": 50.5 + number} | ({"backbone_sha256": sha} if sha else {})
        (path.parent / f"last.ckpt.{name}.json").write_text(json.dumps(content))
    (run / "list.json").write_text("[1]")
    card = model_card(query, path, "")
    assert "query: top1: 50.5" in card and "head: top1: 51.5" in card
    assert "key: top1" not in card and "unsigned" not in card
    assert "key: top1: 52.5" in model_card(key, path, "")


@pytest.mark.parametrize(
    ("prefix", "is_moco"), [("", False), ("backbone.", False), ("module.encoder_q.", True)]
)
def test_only_what_was_trained_by_moco_is_called_so(tmp_path, prefix, is_moco):
    torch.save(prefixed(prefix, torchvision_resnet().state_dict()), tmp_path / "a.pth")
    card = model_card(load_encoder(tmp_path / "a.pth"), tmp_path / "a.pth", "")
    assert ("Momentum Contrast" in card) == is_moco
    assert ("Self-supervised" in card) == is_moco and ("- moco\n" in card) == is_moco
    assert ("does not say how it was trained" in card) != is_moco


@pytest.mark.parametrize("is_begun", [True, False])
def test_weights_from_before_the_run_are_told_without_their_place(run, is_begun):
    path = run / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"callbacks": {"KNNMonitor": {"is_loaded": is_begun}}}, path)
    card = model_card(load_encoder(path), path, "mit")
    assert ("began from weights that were there before" in card) == is_begun


def test_what_a_partial_file_left_random_is_told(tmp_path):
    state = dict(torchvision_resnet(width=1).state_dict())
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "a.pth")
    export(tmp_path / "a.pth", "timm", tmp_path / "hub", allow_partial=True)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "matched 119 of 120; missing: layer4.1.conv2.weight" in card
    assert str(tmp_path) not in card
