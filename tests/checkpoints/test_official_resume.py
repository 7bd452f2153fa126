"""The official script goes on from an official export, with the velocities of the optimiser."""

import dataclasses
import zlib

import pytest
import torch
from networks import PLAIN, V3, save_ours
from torch import nn
from torchvision import models

from moco.algorithm.optim import build_optimizer
from moco.checkpoints import export as room
from moco.config import ModelConfig, OptimConfig

SGD = OptimConfig(lr=0.3, weight_decay=0.01, sgd_momentum=0.8)
WIDE = dataclasses.replace(PLAIN, head="mlp", key_momentum=0.99)


class OfficialMoCo(nn.Module):
    """The modules of the official model in their order (facebookresearch/moco, builder.py)."""

    def __init__(self, dim: int, keys: int, mlp: bool) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (models.resnet18(num_classes=dim) for _ in range(2))
        for encoder in (self.encoder_q, self.encoder_k):
            if mlp:
                encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, keys))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


def give_gradients(named):
    """Give each parameter a gradient that its official name tells."""
    for name, parameter in named:
        seed = zlib.crc32(name.encode())
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


def run_checkpoint(path, model: ModelConfig, config: OptimConfig):
    """Write a run's checkpoint after a step, and return its query encoder and optimiser."""
    query, _ = save_ours(path, model)
    query = type(query)(query.backbone, query.head, query.feature_dim)
    optimizer = build_optimizer(query.parameters(), config)
    give_gradients(official_names(query))
    kept = {name: tensor.clone() for name, tensor in query.state_dict().items()}
    optimizer.step()
    raw = torch.load(path, weights_only=True)
    raw["state_dict"] |= {f"query_encoder.{n}": t.clone() for n, t in query.state_dict().items()}
    raw["optimizer_states"] = [optimizer.state_dict()]
    raw["config"]["optim"] = dataclasses.asdict(config)
    torch.save(raw, path)
    return query, optimizer, kept


def official_names(query):
    named = [(name.removeprefix("backbone."), p) for name, p in query.named_parameters()]
    return [(name.replace("head.", "fc.", 1), p) for name, p in named]


@pytest.mark.parametrize("model", [WIDE, dataclasses.replace(WIDE, head="linear")])
def test_the_official_script_takes_the_same_next_step(tmp_path, capsys, model):
    query, ours, kept = run_checkpoint(tmp_path / "a.ckpt", model, SGD)
    try:
        room.export(tmp_path / "a.ckpt", "official", tmp_path / "a.pth.tar")
        mlp = model.head == "mlp"
        said = capsys.readouterr().err
        words = "-a resnet18 --moco-dim 16 --moco-k 64 --moco-m 0.99 --moco-t 0.2"
        assert f"go on with: main_moco.py {words}{' --mlp' if mlp else ''} --lr 0.3 --r" in said
        content = torch.load(tmp_path / "a.pth.tar", weights_only=True)
        assert (content["arch"], content["epoch"]) == ("resnet18", 3)
        network = OfficialMoCo(16, 64, mlp)
        wrapped = nn.ModuleDict({"module": network})  # as DistributedDataParallel names it
        wrapped.load_state_dict(content["state_dict"])
        theirs = torch.optim.SGD(wrapped.parameters(), 1.0, momentum=0.5, weight_decay=1.0)
        theirs.load_state_dict(content["optimizer"])
        give_gradients(official_names(query))
        give_gradients(network.encoder_q.named_parameters())
        ours.step()
        theirs.step()
        stepped = dict(network.encoder_q.named_parameters())
        for name, parameter in official_names(query):
            torch.testing.assert_close(stepped[name], parameter)
    finally:  # other tests share the network
        query.load_state_dict(kept)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (WIDE, OptimConfig(name="lars"), "the run's is lars, theirs is SGD"),
        (WIDE, OptimConfig(name="adamw"), "the run's is adamw, theirs is SGD"),
        (WIDE, dataclasses.replace(SGD, decay_norm_and_bias=False), "spares norms and biases"),
        (dataclasses.replace(WIDE, head_hidden_dim=24), SGD, "as wide as the features"),
    ],
)
def test_what_the_official_script_cannot_go_on_with_is_left_out_and_said(
    tmp_path, capsys, model, config, reason
):
    query, _, kept = run_checkpoint(tmp_path / "a.ckpt", model, config)
    query.load_state_dict(kept)
    room.export(tmp_path / "a.ckpt", "official", tmp_path / "a.pth.tar")
    assert "optimizer" not in torch.load(tmp_path / "a.pth.tar", weights_only=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "no --resume" in line]
    assert len(said) == 1 and reason in said[0]


def test_the_second_queue_that_official_code_does_not_have_is_told(tmp_path, capsys):
    save_ours(tmp_path / "a.ckpt", dataclasses.replace(PLAIN, queues=2, symmetric="mean"))
    room.export(tmp_path / "a.ckpt", "official", tmp_path / "a.pth.tar")
    assert "the run's second one is left out" in capsys.readouterr().err
    save_ours(tmp_path / "b.ckpt", PLAIN)
    room.export(tmp_path / "b.ckpt", "official", tmp_path / "b.pth.tar")
    assert "second one" not in capsys.readouterr().err


def test_a_network_of_v3_is_no_matter_of_the_first_script(tmp_path, capsys):
    save_ours(tmp_path / "a.ckpt", V3)
    room.export(tmp_path / "a.ckpt", "official", tmp_path / "a.pth.tar")
    assert "go on with" not in capsys.readouterr().err
