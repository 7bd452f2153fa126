"""Starting a run from other weights fits them as loading does: one road for both."""

import dataclasses
from dataclasses import replace

import pytest
import timm
import torch
from networks import (
    SMALL,
    V3,
    V3_VIT,
    V3_VIT_SMALL,
    distance,
    images,
    module_state,
    prefixed,
    save_ours,
    torchvision_resnet,
)
from test_load import mlp
from torch import nn

from moco.algorithm.encoder import build_encoder
from moco.checkpoints.export import export
from moco.checkpoints.load import load_encoder
from moco.checkpoints.matching import take
from moco.checkpoints.start import restore_pretraining
from moco.config import ModelConfig, UserError

IMAGENET = dataclasses.replace(SMALL, stem="imagenet")


def fresh_module(model: ModelConfig, channels: int = 3, size: int = 32):
    """Return a fresh encoder and a module's state dict made of it."""
    encoder = build_encoder(model, channels, size)
    state = prefixed("query_encoder.", encoder.state_dict())
    return encoder, state | prefixed("key_encoder.", encoder.state_dict())


def start(path, model: ModelConfig, channels: int = 3, size: int = 32, **options):
    """Start a run's encoder from a file; returns it and the report."""
    encoder, fresh = fresh_module(model, channels, size)
    state, report = restore_pretraining(path, fresh, encoder.backbone, **options)
    encoder.load_state_dict(take(state, "query_encoder."))
    return encoder.eval(), report


# OpenSelfSup and mmselfsup before 1.0


@pytest.mark.parametrize(("neck", "head"), [("mlp", mlp()), ("fc", nn.Linear(128, 16))])
def test_openselfsup_gives_both_encoders_heads_and_queue(tmp_path, neck, head):
    query, key = torchvision_resnet(0), torchvision_resnet(1)
    state = prefixed("encoder_q.0.", query.state_dict())
    state |= prefixed("backbone.", query.state_dict())  # the same module under a second name
    state |= prefixed(f"encoder_q.1.{neck}.", head.state_dict())
    state |= prefixed("encoder_k.0.", key.state_dict())
    state |= prefixed(f"encoder_k.1.{neck}.", head.state_dict())
    queue = nn.functional.normalize(torch.randn(16, 64), dim=0)
    state |= {"queue": queue, "queue_ptr": torch.tensor([5])}
    torch.save({"meta": {"epoch": 200}, "state_dict": state}, tmp_path / "a.pth")
    loaded = load_encoder(tmp_path / "a.pth")
    assert loaded.layout == "openselfsup" and loaded.model.queue_size == 64
    together = nn.Sequential(query, head).eval()
    assert distance(together, lambda x: loaded.head(loaded.backbone(x)), images()) < 1e-5
    other = load_encoder(tmp_path / "a.pth", "key")
    assert distance(key, other.backbone, images()) < 1e-5
    model = dataclasses.replace(IMAGENET, head="mlp" if neck == "mlp" else "linear")
    fresh, _, _ = module_state(model, seed=7)
    filled, report = restore_pretraining(tmp_path / "a.pth", fresh)
    assert "openselfsup layout, backbone: both encoders" in report and "queue of 64x16" in report
    assert torch.equal(filled["queue.keys"], queue.T)


# What loading fits, starting fits as well


def test_positions_are_resampled_to_the_runs_image_size(tmp_path):
    network = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    encoder, report = start(tmp_path / "a.pth", ModelConfig(backbone="test_vit"), size=96)
    assert "positions resampled to 6x6" in report
    loaded = load_encoder(tmp_path / "a.pth", backbone="test_vit", image_size=96)
    assert distance(loaded.backbone, encoder.backbone, images(3, 96)) == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_rgb_weights_are_fitted_to_other_channels_as_timm_does(tmp_path, channels):
    network = torchvision_resnet()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    encoder, report = start(tmp_path / "a.pth", IMAGENET, channels)
    assert f"first convolution fitted from 3 channels to {channels}" in report
    wanted = timm.models.adapt_input_conv(channels, network.conv1.weight)
    assert torch.equal(encoder.backbone.conv1.weight, wanted)
    grey = images(1)
    if channels == 1:  # the same images in grey give the same features
        colour = grey.repeat(1, 3, 1, 1)
        assert distance(lambda x: network(colour), encoder.backbone, grey) < 1e-5


def test_rgb_weights_are_fitted_where_a_stem_took_the_place_of_timms(tmp_path):
    model = dataclasses.replace(IMAGENET, backbone="resnet10t", stem="patch")
    query, _ = save_ours(tmp_path / "a.ckpt", model)
    encoder, _ = start(tmp_path / "a.ckpt", model, channels=1)
    wanted = timm.models.adapt_input_conv(1, query.backbone.conv1.weight)
    assert torch.equal(encoder.backbone.conv1.weight, wanted)


def test_a_run_does_not_start_from_another_stem(tmp_path):
    patch = dataclasses.replace(SMALL, stem="patch")
    query, _ = save_ours(tmp_path / "a.ckpt", patch)
    encoder, _ = start(tmp_path / "a.ckpt", patch)
    assert distance(query, encoder, images()) == 0
    with pytest.raises(UserError, match="conv1.weight .16x3x4x4 for 16x3x3x3..*stem and width as"):
        start(tmp_path / "a.ckpt", SMALL)


def test_harmless_extras_are_left_out_on_both_roads(tmp_path):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    state = network.state_dict() | {"mask_token": torch.zeros(1, 1, 64)}
    torch.save(state, tmp_path / "a.pth")
    assert (
        "left out: mask_token (1)" in load_encoder(tmp_path / "a.pth", backbone="test_vit").report
    )
    _, report = start(tmp_path / "a.pth", ModelConfig(backbone="test_vit"))
    assert "missing: none" in report


def test_a_part_is_taken_only_where_that_is_allowed(tmp_path):
    state = dict(torchvision_resnet().state_dict())
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="only in part.*or give --allow_partial"):
        start(tmp_path / "a.pth", IMAGENET)
    encoder, report = start(tmp_path / "a.pth", IMAGENET, allow_partial=True)
    assert "missing: layer2.0.conv1.weight" in report
    assert torch.equal(encoder.backbone.conv1.weight, state["conv1.weight"])


# mmpretrain, and mmselfsup from 1.0 on


def mm_vit(name: str) -> str:
    """Return mmpretrain's name of a tensor of timm's ViT."""
    pairs = (
        ("patch_embed.proj.", "patch_embed.projection."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        (".norm1.", ".ln1."),
        (".norm2.", ".ln2."),
        ("blocks.", "layers."),
    )
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return f"ln1.{name.removeprefix('norm.')}" if name.startswith("norm.") else name


def mm_neck(name: str) -> str:
    """Return mmpretrain's name of a tensor in a Sequential of Linear, BatchNorm and ReLU."""
    number, leaf = name.split(".", 1)
    return f"{('fc', 'bn')[int(number) % 3]}{int(number) // 3}.{leaf}"


@pytest.mark.parametrize("model", [V3_VIT, V3], ids=["vit", "resnet"])
def test_mmpretrains_v3_gives_both_encoders_heads_and_predictor(tmp_path, model):
    state, query, key = module_state(model)
    rename = mm_vit if model is V3_VIT else str
    theirs = {}
    for place, network in (("", query), ("momentum_encoder.module.", key)):
        at = ("0.", "1.") if place else ("backbone.", "neck.")
        theirs |= {
            f"{place}{at[0]}{rename(n)}": t for n, t in network.backbone.state_dict().items()
        }
        theirs |= {f"{place}{at[1]}{mm_neck(n)}": t for n, t in network.head.state_dict().items()}
    for name, tensor in state.items():
        if name.startswith("predictor."):
            theirs[f"head.predictor.{mm_neck(name.removeprefix('predictor.'))}"] = tensor
    theirs["momentum_encoder.steps"] = torch.tensor(7)
    torch.save({"meta": {}, "state_dict": theirs}, tmp_path / "mm.pth")
    fresh = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    restored, report = restore_pretraining(tmp_path / "mm.pth", fresh, query.backbone)
    assert "mmpretrain layout, backbone: both encoders" in report and "heads; predictor" in report
    assert [name for name in state if not restored[name].equal(state[name])] == []


@pytest.mark.parametrize(("neck", "head"), [("mlp", "mlp"), ("fc", "linear")])
def test_mmpretrains_v1_and_v2_give_both_encoders_heads_and_queue(tmp_path, neck, head):
    state, query, key = module_state(replace(SMALL, stem="imagenet", head=head))
    theirs = prefixed("backbone.", query.backbone.state_dict())
    theirs |= prefixed(f"neck.{neck}.", query.head.state_dict())
    theirs |= prefixed("encoder_k.module.0.", key.backbone.state_dict())
    theirs |= prefixed(f"encoder_k.module.1.{neck}.", key.head.state_dict())
    theirs |= {"queue": state["queue.keys"].T.contiguous(), "queue_ptr": torch.tensor([40])}
    torch.save({"state_dict": theirs}, tmp_path / "mm.pth")
    loaded = load_encoder(tmp_path / "mm.pth", "key")
    assert (loaded.layout, loaded.model.head) == ("mmpretrain", head)
    assert distance(key.backbone, loaded.backbone, images()) == 0
    fresh = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    restored, report = restore_pretraining(tmp_path / "mm.pth", fresh, query.backbone)
    assert "mmpretrain layout, backbone: both encoders" in report and "queue of 64x16" in report
    kept = [name for name in state if name != "queue.num_enqueued"]
    assert [name for name in kept if not restored[name].equal(state[name])] == []


def test_mmpretrains_vit_of_v3_is_read_with_12_heads(tmp_path):
    model = replace(V3_VIT_SMALL, depth=12)
    query = module_state(model)[1]
    theirs = {f"backbone.{mm_vit(n)}": t for n, t in query.backbone.state_dict().items()}
    theirs |= {f"neck.{mm_neck(n)}": t for n, t in query.head.state_dict().items()}
    torch.save({"state_dict": theirs}, tmp_path / "mm.pth")
    loaded = load_encoder(tmp_path / "mm.pth")
    assert loaded.model.backbone == "vit_small_patch16_224"
    assert distance(query.backbone, loaded.backbone, images()) == 0


def test_a_run_with_other_attention_heads_is_refused_with_the_number(tmp_path):
    state, query, _ = module_state(V3_VIT_SMALL)
    path = tmp_path / "v3.pth.tar"
    theirs = prefixed("module.base_encoder.", query.backbone.state_dict())
    torch.save({"arch": "vit_small", "state_dict": theirs}, path)
    other = module_state(replace(V3_VIT_SMALL, num_heads=6))[1].backbone
    with pytest.raises(UserError, match=r"12 attention heads, and the run's has 6.*num_heads 12"):
        restore_pretraining(path, state, other)
    restore_pretraining(path, state, other, allow_partial=True)
    restored, _ = restore_pretraining(path, state, query.backbone)
    assert "blocks.0.attn.qkv.weight" in query.backbone.state_dict()
    assert all(restored[f"key_encoder.backbone.{n}"].equal(t) for n, t in
               query.backbone.state_dict().items())  # fmt: skip


@pytest.mark.parametrize("form", ["run", "safetensors", "bare"])
def test_heads_that_only_settings_or_a_name_tell_count_too(tmp_path, form):
    path, heads = tmp_path / "a.ckpt", 4 if form == "run" else 3
    model = replace(V3_VIT, num_heads=heads if form == "run" else 0)
    if form == "bare":
        model = replace(V3_VIT, width=1.0, depth=12, num_heads=0, positions="learned")
        model = replace(model, patch_size=16)
    query, _ = save_ours(path, model)
    if form == "safetensors":
        path = tmp_path / "a.safetensors"
        export(tmp_path / "a.ckpt", form, path)
    elif form == "bare":
        torch.save(query.backbone.state_dict(), path)
    state, other, _ = module_state(replace(model, num_heads=2))
    message = rf"{heads} attention heads, and the run's has 2: set model.num_heads {heads}"
    with pytest.raises(UserError, match=message):
        restore_pretraining(path, state, other.backbone)
    _, report = restore_pretraining(path, state, other.backbone, allow_partial=True)
    assert f"not kept: {heads} attention heads" in report
    _, report = restore_pretraining(path, state, query.backbone)
    assert "not kept" not in report


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        ({}, {"queues": 2}, "queue of 64x16; the second queue stays fresh, the file's: matched 0"),
        ({"queues": 2}, {}, "queue of 64x16; left out: the file's second queue"),
        ({"queues": 2}, {"queues": 2}, "heads; queue of 64x16; second queue of 64x16"),
        ({"predictor": "mlp"}, {}, "heads; left out: the file's predictor; queue of 64x16"),
        ({}, {"queue_size": 0}, "heads; left out: the file's queue"),
    ],
    ids=["one queue for two", "two for one", "two for two", "predictor", "no queue"],
)
def test_the_report_names_every_part_that_stays_behind(tmp_path, given, wanted, said):
    save_ours(tmp_path / "a.ckpt", replace(SMALL, **given))
    state, _, key = module_state(replace(SMALL, **wanted), seed=7)
    _, report = restore_pretraining(tmp_path / "a.ckpt", state, key.backbone)
    assert said in report


def test_a_network_of_another_name_and_the_same_tensors_is_told(tmp_path):
    state = torchvision_resnet().state_dict()  # as of resnetblur18, which blurs where it pools
    for arch, is_told in (("resnetblur18", True), ("resnet18", False), ("mine", False)):
        torch.save({"arch": arch, "state_dict": state}, tmp_path / "a.pth")
        _, report = start(tmp_path / "a.pth", IMAGENET)
        assert (f"the file says that its network is {arch}; " in report) == is_told, arch


@pytest.mark.parametrize("size", [8, 12])
def test_learned_positions_are_not_taken_for_fixed_ones(tmp_path, size):
    learned = replace(V3_VIT, positions="learned", vit_init="timm", freeze_patch_embed=False)
    source = build_encoder(learned, 3, size).eval()
    torch.save(source.backbone.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="learned positions.*set model.positions learned, or give"):
        start(tmp_path / "a.pth", V3_VIT, size=8)
    _, report = start(tmp_path / "a.pth", V3_VIT, size=8, allow_partial=True)
    assert "not kept: learned positions, now fixed" in report
    _, report = start(tmp_path / "a.pth", learned, size=8)
    assert "not kept" not in report
    fixed = build_encoder(V3_VIT, 3, size).eval()
    torch.save(fixed.backbone.state_dict(), tmp_path / "b.pth")
    assert "fixed" not in start(tmp_path / "b.pth", V3_VIT, size=8)[1]
    save_ours(tmp_path / "c.ckpt", V3_VIT, size=size)
    assert "fixed" not in start(tmp_path / "c.ckpt", V3_VIT, size=8)[1]
