"""What a file says to a run that starts from its weights: its network, its images, what is open."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from networks import SMALL, V3_VIT, prefixed, save_ours
from test_open_points import SIZE, v3_positions, vit

from moco.algorithm.encoder import build_backbone
from moco.checkpoints.export import export
from moco.checkpoints.load import load_encoder
from moco.checkpoints.origin import describe
from moco.checkpoints.start import restore_pretraining
from moco.config import ModelConfig, TrainConfig, UserError
from moco.training.settling import _as_weights

AUTO = ModelConfig(backbone="auto", stem="auto", width="auto")


def built(path, size=32, **asked):
    """Build the network that a run with these settings would have."""
    found = describe(path).settings(ModelConfig(**{**vars(AUTO), **asked}))
    values = {name.removeprefix("model."): value for name, value in found.items()}
    return build_backbone(ModelConfig(**values), 3, size)[0]


@pytest.mark.parametrize(
    ("model", "form"),
    [(SMALL, ""), (SMALL, "safetensors"), (V3_VIT, ""), (V3_VIT, "safetensors"), (V3_VIT, "timm")],
)
def test_a_run_builds_the_network_of_its_own_files(tmp_path, model, form):
    path = tmp_path / "a.ckpt"
    query, _ = save_ours(path, model)
    if form:
        path = tmp_path / {"safetensors": "a.safetensors", "timm": "hub"}[form]
        export(tmp_path / "a.ckpt", form, path)
    own = {name: value.shape for name, value in query.backbone.state_dict().items()}
    assert {name: value.shape for name, value in built(path).state_dict().items()} == own
    if model is V3_VIT:
        network = built(path)
        assert network.blocks[0].attn.num_heads == query.backbone.blocks[0].attn.num_heads
        assert not network.pos_embed.requires_grad, "fixed sines and cosines stay fixed"


def test_v3s_positions_stay_fixed_and_its_heads_are_told(tmp_path):
    network = vit("tiny", 12, v3_positions(192, SIZE // 16))
    torch.save({"model": network.state_dict()}, tmp_path / "v3.pth")
    found = describe(tmp_path / "v3.pth").settings(AUTO)
    assert found["model.num_heads"] == 12 and found["model.positions"] == "sincos"


def test_only_what_is_left_open_is_taken(tmp_path):
    path = tmp_path / "a.ckpt"
    save_ours(path, SMALL)
    origin = describe(path)

    def taken(**asked):
        return origin.settings(ModelConfig(**{**vars(AUTO), **asked})).keys()

    assert taken() == {"model.backbone", "model.stem", "model.width"}
    assert taken(stem="imagenet") == {"model.backbone", "model.width"}, "as the user says"
    assert taken(backbone="resnet18", width=1.0) == {"model.stem"}
    assert taken(backbone="resnet34") == set()


def unclear(folder: Path, kind: str) -> Path:
    path = folder / "a.pth"
    if kind == "heads":
        network = vit("tiny", 12, v3_positions(192, SIZE // 16, exchanged=True))
        torch.save({"model": network.state_dict()}, path)
    elif kind == "padding":
        network, _ = build_backbone(SMALL, 3, 32)
        torch.save(network.state_dict(), path)
    elif kind == "own":
        save_ours(path, SMALL)
        content = torch.load(path, weights_only=True)
        content["config"]["model"]["backbone"] = "own:Net"
        torch.save(content, path)
    elif kind == "wrong":
        save_ours(path, SMALL)
        content = torch.load(path, weights_only=True)
        content["config"]["model"]["width"] = "wide"
        torch.save(content, path)
    elif kind == "activation":
        network = timm.create_model("test_vit", num_classes=0)
        arguments = {"act_layer": "relu", "drop_path_rate": 0.1}
        save = {"architecture": "test_vit", "model_args": arguments, "num_classes": 0}
        (folder / "hub").mkdir()
        (folder / "hub/config.json").write_text(json.dumps(save))
        torch.save(network.state_dict(), folder / "hub/pytorch_model.bin")
        return folder / "hub"
    else:
        torch.save(prefixed("net.", torch.nn.Linear(3, 4).state_dict()), path)
    return path


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            "heads",
            "does not tell its attention heads, which model.num_heads sets: name the network",
        ),
        ("padding", "does not tell its padding of a 3x3 stem: name the network with"),
        ("own", "is of own:Net, a module that only Python has: give it to moco.pretrain"),
        ("wrong", "describes itself wrongly"),
        ("activation", "act_layer relu, which no setting of a run has: give --model.backbone to"),
        ("nothing", "does not tell its network|holds no"),
    ],
)
def test_what_a_file_leaves_open_is_asked_and_not_guessed(tmp_path, kind, line):
    path = unclear(tmp_path, kind)
    with pytest.raises(UserError, match=line):
        describe(path).settings(AUTO)
    if kind == "heads":
        assert "model.backbone" in describe(path).settings(
            ModelConfig(**vars(AUTO) | {"num_heads": 12})
        )
    if kind == "activation":
        network, _ = build_backbone(ModelConfig(backbone="test_vit"), 3, 160)
        state = {
            f"{side}_encoder.backbone.{name}": value
            for side in ("query", "key")
            for name, value in network.state_dict().items()
        }
        _, report = restore_pretraining(path, state, network)
        assert "not kept: act_layer relu" in report and "drop" not in report
    if kind in ("padding", "activation"):
        assert describe(path).settings(ModelConfig()) == {}, "the user names a network"
        assert load_encoder(path, stem_padding=1 if kind == "padding" else 0)


def test_a_normalisation_of_other_channels_is_told_and_not_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_ours(tmp_path / "a.ckpt", SMALL)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["config"]["data"] |= {"mean": [0.1, 0.2, 0.3], "max_value": [4095.0]}
    torch.save(content, tmp_path / "a.ckpt")
    path = str(tmp_path / "a.ckpt")
    assert _as_weights(TrainConfig(), 3, path) == {"data.mean": [0.1, 0.2, 0.3]}
    assert _as_weights(TrainConfig(), 1, path) == {}
    lines = [line for line in caplog.messages if "is not taken" in line]
    assert [line.split()[0] for line in lines] == ["data.max_value", "data.mean", "data.max_value"]
    config = TrainConfig().changed({"data.mean": [0.5, 0.5, 0.5]})
    assert _as_weights(config, 3, path) == {}
