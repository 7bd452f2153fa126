"""What no tensor shows, heads of a ViT and padding of a 3x3 stem: told by a fact, or asked for."""

import json
import math

import pytest
import timm
import torch
from networks import (
    distance,
    images,
    module_state,
    prefixed,
    run_line,
    save_ours,
    torchvision_resnet,
)
from safetensors import safe_open
from test_load import mlp
from torch import nn

from moco.checkpoints import export as room
from moco.checkpoints.load import load_encoder
from moco.config import ModelConfig, UserError

SIZE = 64


def v3_positions(width: int, side: int, exchanged: bool = False) -> torch.Tensor:
    """Compute the fixed positions by loops (vits.py of MoCo v3; exchanged: those of MAE)."""
    rows = [[0.0] * width]
    for i in range(side):
        for j in range(side):
            first, second = (j, i) if exchanged else (i, j)
            row = []
            for place in (first, second):
                angles = [place / 10000 ** (d / (width // 4)) for d in range(width // 4)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    return torch.tensor([rows])


def vit(size: str, heads: int, positions=None) -> nn.Module:
    """Build a ViT of two blocks' weight in features: few pixels, all widths as published."""
    generator = torch.Generator().manual_seed(heads)
    network = timm.create_model(
        f"vit_{size}_patch16_224", num_classes=0, img_size=SIZE, num_heads=heads
    ).eval()
    with torch.no_grad():
        for block in network.blocks:
            block.attn.qkv.weight.normal_(std=0.1, generator=generator)
        if positions is not None:
            network.pos_embed.copy_(positions)
    return network


def v3_files(network: nn.Module, width: int):
    """Yield layout and content of files that v3's ViTs come in."""
    state = network.state_dict()
    head = {f"projector.{n}": v for n, v in mlp(width).state_dict().items()}
    yield "solo-learn", {"state_dict": prefixed("backbone.", state) | head, "epoch": 9}
    if width == 384:
        return
    yield "timm", {"model": state}  # as convert_to_deit.py writes it
    half = {name: value.half() for name, value in state.items()}
    yield "timm", {"model": half}


@pytest.mark.parametrize(("size", "width"), [("tiny", 192), ("small", 384)])
def test_v3s_fixed_positions_tell_its_twelve_heads(tmp_path, size, width):
    network = vit(size, 12, v3_positions(width, SIZE // 16))
    for layout, content in v3_files(network, width):
        torch.save(content, tmp_path / "a.pth")
        loaded = load_encoder(tmp_path / "a.pth")
        assert (loaded.layout, loaded.variant) == (layout, {"num_heads": 12})
        half = content.get("model", {}).get("pos_embed", torch.ones(1)).dtype == torch.float16
        assert distance(network, loaded.backbone, images(3, SIZE)) < (0.05 if half else 1e-5)
    assert load_encoder(tmp_path / "a.pth", num_heads=6).variant == {"num_heads": 6}


def test_learnt_positions_are_timms_own_heads(tmp_path):
    network = vit("small", 6)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert distance(network, load_encoder(tmp_path / "a.pth").backbone, images(3, SIZE)) < 1e-5


def test_positions_that_come_with_several_numbers_of_heads_are_asked_about(tmp_path):
    network = vit("tiny", 12, v3_positions(192, SIZE // 16, exchanged=True))
    torch.save({"model": network.state_dict()}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="does not tell the attention heads.*--num_heads"):
        load_encoder(tmp_path / "mae.pth")
    loaded = load_encoder(tmp_path / "mae.pth", num_heads=12)
    assert distance(network, loaded.backbone, images(3, SIZE)) < 1e-5
    with pytest.raises(UserError, match="does not take"):
        load_encoder(tmp_path / "mae.pth", num_heads=7)


# The line that loads a safetensors export with timm alone


@pytest.mark.parametrize("kind", ["v3", "narrow", "grey", "patch", "both", "lost"])
def test_the_line_that_an_export_prints_loads_its_network(tmp_path, capsys, kind):
    path, out, size, channels = tmp_path / "a.ckpt", tmp_path / "a.safetensors", 32, 3
    if kind == "v3":
        size = SIZE
        torch.save({"model": vit("tiny", 12, v3_positions(192, 4)).state_dict()}, path)
    elif kind == "lost":
        state = torchvision_resnet(4, 1, width=1).state_dict()
        names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
        places = {name: str(n) for n, name in enumerate(names)}
        state = {f"{places[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in state.items()}
        state = {k.replace("downsample", "shortcut"): v for k, v in state.items()}
        torch.save(prefixed("backbone.", state), path)
    else:
        stem = {"narrow": "imagenet", "patch": "patch"}.get(kind, "cifar")
        width = 1 if kind in ("grey", "patch") else 0.5
        channels = 1 if kind == "grey" else 3
        save_ours(path, ModelConfig(backbone="resnet18", stem=stem, width=width), channels)
    result = room.export(path, "safetensors", out)
    line = result["load_with"]
    assert f"load with: {line}" in capsys.readouterr().err
    source = load_encoder(path).backbone
    assert distance(source, run_line(line)["network"], images(channels, size)) < 1e-5
    again = load_encoder(out)
    assert distance(source, again.backbone, images(channels, size)) < 1e-5
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["moco"])["variant"] == again.variant


# The padding of a 3x3 stem


def test_a_stem_whose_padding_is_not_told_is_asked_about(tmp_path):
    """solo-learn pads by 2, most other code by 1, and files of both have these same names."""
    network, path = torchvision_resnet(2, 2), tmp_path / "a.pth"
    head = prefixed("projector.", mlp().state_dict())
    for prefix in ("backbone.", "", "encoder_q.", "base_encoder."):
        torch.save({"state_dict": prefixed(prefix, network.state_dict()) | head}, path)
        if prefix == "":
            torch.save(network.state_dict(), path)
        with pytest.raises(UserError, match="does not tell how its 3x3 stem pads: give --stem_pad"):
            load_encoder(path)
        loaded = load_encoder(path, stem_padding=2)
        assert distance(network, loaded.backbone, images()) < 1e-5
    wrong = load_encoder(path, stem_padding=1)
    assert distance(network, wrong.backbone, images()) > 1e-3


def test_padding_is_not_told_of_a_stem_that_has_none(tmp_path):
    patch = module_state(ModelConfig(backbone="resnet18", stem="patch"))[1].backbone
    for network in (patch, torchvision_resnet()):
        torch.save(network.state_dict(), tmp_path / "a.pth")
        with pytest.raises(UserError, match="no 3x3 stem: leave --stem_padding out"):
            load_encoder(tmp_path / "a.pth", stem_padding=2)
    with pytest.raises(UserError, match="stem_padding is 9"):
        load_encoder(tmp_path / "a.pth", stem_padding=9)


def test_a_stem_that_pads_by_two_does_not_become_official(tmp_path):
    state = prefixed("backbone.", torchvision_resnet(2, 2, width=1).state_dict())
    torch.save(state | prefixed("projector.", mlp(512).state_dict()), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="cannot hold a resnet18 whose first layers.*safetensors"):
        room.export(tmp_path / "a.ckpt", "official", tmp_path / "a.pth.tar", stem_padding=2)
    room.export(tmp_path / "a.ckpt", "official", tmp_path / "a.pth.tar", stem_padding=1)
    assert load_encoder(tmp_path / "a.pth.tar").model.stem == "cifar"  # its note tells the rest
