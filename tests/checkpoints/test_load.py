"""A checkpoint of every layout, built by hand, gives the features of its network."""

import copy
import dataclasses
import json

import pytest
import timm
import torch
from networks import (
    SMALL,
    broken_files,
    distance,
    images,
    module_state,
    prefixed,
    save_ours,
    torchvision_resnet,
)
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import moco
from moco.algorithm.encoder import TORCHVISION_RESNETS, build_encoder
from moco.checkpoints.architecture import resnet_shape
from moco.checkpoints.load import load_encoder
from moco.checkpoints.matching import take
from moco.checkpoints.read import read_state
from moco.checkpoints.start import restore_pretraining
from moco.config import ModelConfig, UserError

# Our own


def test_ours_gives_the_query_encoder_unless_told_key(tmp_path):
    query, key = save_ours(tmp_path / "last.ckpt", SMALL, channels=1)
    before = torch.get_rng_state()
    loaded = load_encoder(tmp_path / "last.ckpt")
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.layout, loaded.encoder, loaded.epoch) == ("moco", "query", 3)
    assert loaded.model == dataclasses.replace(SMALL, head_hidden_dim=128)
    assert loaded.data == {"channels": 1, "image_size": 32, "mean": [0.5], "std": [0.25]}
    assert not loaded.backbone.training and loaded.feature_dim == 128
    batch = images(1)
    assert distance(query, lambda x: loaded.head(loaded.backbone(x)), batch) == 0
    other = load_encoder(tmp_path / "last.ckpt", "key")
    assert other.encoder == "key"
    assert distance(key, lambda x: other.head(other.backbone(x)), batch) == 0
    assert distance(query, key, batch) > 1e-3
    with pytest.raises(UserError, match="encoder is 'keys': give query or key"):
        load_encoder(tmp_path / "last.ckpt", "keys")
    assert distance(query.backbone, moco.load_backbone(tmp_path / "last.ckpt"), batch) == 0


def test_report_says_what_matched_what_was_left_and_what_is_missing(tmp_path):
    save_ours(tmp_path / "last.ckpt", SMALL)
    report = load_encoder(tmp_path / "last.ckpt").report
    assert "moco layout, epoch 3, query encoder, resnet18, cifar stem" in report
    assert "matched 120 of 120" in report and "missing: none" in report
    assert "key_encoder.backbone (120)" in report and "queue (2)" in report


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (ModelConfig(backbone="resnet18", head="linear", queue_size=8, width=0.25), 3),
        (ModelConfig(backbone="resnet26", stem="cifar", queue_size=8, width=0.5), 5),
        (ModelConfig(backbone="resnet18", stem="patch", queue_size=8, width=0.375), 3),
        (ModelConfig(backbone="resnet10t", stem="patch", queue_size=8, width=0.375), 1),
        (ModelConfig(backbone="test_vit", queue_size=8), 1),
    ],
)
def test_ours_without_its_settings_is_found_out_from_shapes(tmp_path, model, channels):
    state, query, _ = module_state(model, channels, 32)
    torch.save({"state_dict": state}, tmp_path / "bare.pth")
    forced = "" if model.backbone in ("resnet18", "resnet26") else model.backbone
    loaded = load_encoder(tmp_path / "bare.pth", backbone=forced)
    found = loaded.model
    assert (found.backbone, found.stem, found.width) == (model.backbone, model.stem, model.width)
    assert (found.head, found.queue_size) == (model.head, 8)
    assert distance(query.backbone, loaded.backbone, images(channels)) == 0


def test_settings_of_another_version_are_passed_over(tmp_path):
    save_ours(tmp_path / "last.ckpt", SMALL)
    raw = torch.load(tmp_path / "last.ckpt", weights_only=True)
    raw["config"]["model"]["of_tomorrow"] = 1
    del raw["config"]["model"]["bn_splits"]
    torch.save(raw, tmp_path / "last.ckpt")
    assert load_encoder(tmp_path / "last.ckpt").model.backbone == "resnet18"


# Foreign layouts


def official(network, head, key=None, key_head=None, place: int = 5):
    state = prefixed("module.encoder_q.", network.state_dict())
    state |= prefixed("module.encoder_q.fc.", head.state_dict())
    state |= prefixed("module.encoder_k.", (key or network).state_dict())
    state |= prefixed("module.encoder_k.fc.", (key_head or head).state_dict())
    state["module.queue"] = nn.functional.normalize(torch.randn(16, 64), dim=0)  # C K
    state["module.queue_ptr"] = torch.tensor([place])
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}


def mlp(dim: int = 128, width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width))


def numbered(network, children: list[str]):
    """Name tensors as an `nn.Sequential` of some children does."""
    places = {name: str(i) for i, name in enumerate(children)}
    split = {k: k.partition(".") for k in network.state_dict()}
    state = network.state_dict()
    return {f"{places[a]}.{b}": state[k] for k, (a, _, b) in split.items() if a in places}


STAGES = ["layer1", "layer2", "layer3", "layer4"]
TORCHVISION_CHILDREN = ["conv1", "bn1", "relu", "maxpool", *STAGES]
LIGHTLY_CHILDREN = ["conv1", "bn1", *STAGES]
DEMO_CHILDREN = ["conv1", "bn1", "relu", *STAGES]


def layouts():
    """Yield layout, file content, network, and key network where the file has one."""
    net, key, demo = torchvision_resnet(0), torchvision_resnet(1), torchvision_resnet(2, 1)
    state, other = net.state_dict(), key.state_dict()
    yield "official", official(net, nn.Linear(128, 16), key), net, key
    yield "official", official(net, mlp(), key), net, key
    content = prefixed("encoder_q.net.", numbered(demo, DEMO_CHILDREN))
    content |= {
        "encoder_q.net.9.weight": torch.randn(16, 128),
        "encoder_q.net.9.bias": torch.ones(16),
    }
    yield "official", {"epoch": 9, "state_dict": content, "optimizer": {}}, demo, None
    projector = nn.Sequential(nn.Linear(128, 8, bias=False), nn.BatchNorm1d(8))
    content = prefixed("module.base_encoder.", state)
    content |= prefixed("module.base_encoder.fc.", projector.state_dict())
    content |= prefixed("module.momentum_encoder.", other)
    content |= prefixed("module.predictor.", projector.state_dict())
    yield "official-v3", {"epoch": 300, "arch": "resnet18", "state_dict": content}, net, key
    content = prefixed("backbone.", numbered(net, TORCHVISION_CHILDREN))
    content |= prefixed("backbone_momentum.", numbered(key, TORCHVISION_CHILDREN))
    content |= prefixed("projection_head.layers.", mlp().state_dict())
    yield "lightly", {"state_dict": content, "epoch": 1}, net, key
    lost = copy.deepcopy(demo)  # a Sequential of these children has no first ReLU
    lost.relu = nn.Identity()
    content = prefixed("backbone.", numbered(demo, LIGHTLY_CHILDREN))
    content = {k.replace("downsample", "shortcut"): v for k, v in content.items()}
    content = {  # its split BatchNorm repeats the statistics
        k: v.repeat(8) if "running" in k else v for k, v in content.items()
    }
    yield "lightly", {"state_dict": content}, lost, None
    yield "lightly", prefixed("backbone.", state), net, None
    for query in ("query", "student"):  # its benchmarks, where `backbone` follows by momentum
        content = prefixed(f"{query}_backbone.", state) | prefixed("backbone.", other)
        content |= prefixed(f"{query}_projection_head.layers.", mlp().state_dict())
        content |= prefixed("projection_head.layers.", mlp().state_dict())
        content |= {"criterion.memory_bank.bank": torch.ones(16, 64)}
        yield "lightly", {"state_dict": content, "epoch": 1}, net, key
    for name in ("backbone", "encoder"):
        content = prefixed(f"{name}.", state) | prefixed(f"momentum_{name}.", other)
        content |= prefixed("projector.", mlp().state_dict()) | {"queue": torch.zeros(2, 16, 64)}
        content["classifier.weight"] = torch.zeros(10, 128)
        yield "solo-learn", {"state_dict": content, "epoch": 1}, net, key
    classifier = {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
    yield "torchvision", state | classifier, net, None
    yield "torchvision", {"model": prefixed("module.", state)}, net, None
    yield "torchvision", {"state_dict": prefixed("model._orig_mod.", state), "epoch": 4}, net, None
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    yield "torchvision", old, net, None


def test_foreign_layouts_give_their_networks_features(tmp_path):
    seen = set()
    for number, (layout, content, network, key) in enumerate(layouts()):
        path = tmp_path / "file.pth.tar"
        # The official files are older than torch's zip format.
        torch.save(content, path, _use_new_zipfile_serialization=number % 2 == 1)
        loaded = load_encoder(path)
        assert loaded.layout == layout and loaded.model.backbone == "resnet18", loaded.report
        assert distance(network, loaded.backbone, images()) < 1e-5, loaded.report
        if key is not None:
            other = load_encoder(path, "key")
            assert distance(key, other.backbone, images()) < 1e-5, other.report
            assert distance(network, key, images()) > 1e-3
        else:
            with pytest.raises(UserError, match="holds no key encoder"):
                load_encoder(path, "key")
        seen.add(layout)
    assert seen == {"official", "official-v3", "lightly", "solo-learn", "torchvision"}


def test_a_file_of_the_key_encoder_alone_is_read_as_such(tmp_path):
    network, path = torchvision_resnet(1), tmp_path / "a.pth"
    weights, head = network.state_dict(), mlp().state_dict()
    files = {
        "moco": prefixed("key_encoder.backbone.", weights),
        "official": prefixed("encoder_k.", weights) | prefixed("encoder_k.fc.", head),
        "official-v3": prefixed("module.momentum_encoder.", weights),
        "openselfsup": prefixed("encoder_k.0.", weights) | prefixed("encoder_k.1.mlp.", head),
        "mmpretrain": prefixed("encoder_k.module.0.", weights)
        | prefixed("encoder_k.module.1.fc.", {"weight": torch.ones(16, 128)}),
        "solo-learn": prefixed("momentum_backbone.", weights),
        "lightly": prefixed("backbone_momentum.", weights),
    }
    for layout, state in files.items():
        torch.save({"state_dict": state}, path)
        loaded = load_encoder(path, "key")
        assert (loaded.layout, loaded.encoder) == (layout, "key")
        assert (loaded.head is not None) == (layout in ("official", "openselfsup"))
        assert distance(network, loaded.backbone, images()) < 1e-5, layout
        with pytest.raises(UserError, match="only a key encoder: give --encoder key"):
            load_encoder(path)


def test_a_child_that_no_resnet_has_is_not_taken_for_a_classifier(tmp_path):
    content = prefixed("backbone.", numbered(torchvision_resnet(), TORCHVISION_CHILDREN))
    content["backbone.8.weight"] = torch.ones(32, 128, 1, 1)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"unknown: 8\.weight"):
        load_encoder(tmp_path / "a.ckpt")


@pytest.mark.parametrize(("name", "make"), [("linear", lambda: nn.Linear(128, 16)), ("mlp", mlp)])
def test_official_heads_are_rebuilt(tmp_path, name, make):
    network, head = torchvision_resnet(), make()
    torch.save(official(network, head), tmp_path / "a.pth.tar")
    loaded = load_encoder(tmp_path / "a.pth.tar")
    assert (loaded.model.head, loaded.model.embedding_dim, loaded.epoch) == (name, 16, 200)
    together = nn.Sequential(network, head).eval()
    assert distance(together, lambda x: loaded.head(loaded.backbone(x)), images()) < 1e-5


def test_official_v3_vit_small_has_twelve_heads(tmp_path):
    options = {"num_classes": 0, "img_size": 32}
    twelve = timm.create_model("vit_small_patch16_224", num_heads=12, **options).eval()
    state = prefixed("module.base_encoder.", twelve.state_dict())
    state["module.base_encoder.head.0.weight"] = torch.zeros(8, 384)
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "v3.pth.tar")
    loaded = load_encoder(tmp_path / "v3.pth.tar")
    assert loaded.layout == "official-v3" and loaded.head is None
    assert distance(twelve, loaded.backbone, images()) < 1e-5
    six = timm.create_model("vit_small_patch16_224", **options).eval()
    six.load_state_dict(twelve.state_dict())
    assert distance(twelve, six, images()) > 1e-3
    with pytest.raises(UserError, match="12 attention heads"):
        restore_pretraining(tmp_path / "v3.pth.tar", {})


def test_timm_state_dict_directory_and_safetensors(tmp_path):
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=48, in_chans=1
    ).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    folder = tmp_path / "folder"
    told = {"model_args": {"img_size": 48, "in_chans": 1}, "safe_serialization": True}
    timm.models._hub.save_for_hf(network, str(folder), **told)
    network.reset_classifier(0)
    for name in ("vit.pth", "vit.safetensors", "folder"):
        loaded = load_encoder(tmp_path / name)
        layout = "safetensors" if name.endswith("safetensors") else "timm"
        assert (loaded.layout, loaded.model.backbone) == (layout, "vit_tiny_patch16_224")
        assert (loaded.data["channels"], loaded.data["image_size"]) == (1, 48)
        assert distance(network, loaded.backbone, images(1, 48)) < 1e-5
    larger = load_encoder(tmp_path / "vit.pth", image_size=64)
    assert "positions resampled to 4x4" in larger.report
    assert larger.backbone(images(1, 64)).shape == (2, 192)


def test_timm_directory_cannot_reach_beyond_the_shape_of_a_model(tmp_path):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    told = {"model_args": {"img_size": 32}, "safe_serialization": True}
    timm.models._hub.save_for_hf(network, str(tmp_path), **told)
    about = json.loads((tmp_path / "config.json").read_text())
    about["model_args"] |= {"checkpoint_path": "/etc/passwd", "pretrained": True, "cache_dir": "/"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert load_encoder(tmp_path).model.backbone == "test_vit"
    about["model_args"]["no_such_argument"] = 1
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not take"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", TORCHVISION_RESNETS)
def test_architecture_is_read_off_shapes(name):
    with torch.device("meta"):
        state = models.get_model(name, weights=None).state_dict()
    assert resnet_shape(state) == {"backbone": name, "stem": "imagenet", "width": 1}


def test_half_precision_weights_load_as_float(tmp_path):
    network = torchvision_resnet(width=1)
    torch.save({k: v.half() for k, v in network.state_dict().items()}, tmp_path / "half.pth")
    loaded = load_encoder(tmp_path / "half.pth")
    assert loaded.backbone.conv1.weight.dtype == torch.float32
    assert distance(network, loaded.backbone, images()) < 1e-2


# Matches that are none, or half


def test_no_match_is_an_error_even_if_a_part_is_allowed(tmp_path):
    torch.save({"a.weight": torch.ones(3), "b.bias": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="do not tell the architecture"):
        load_encoder(tmp_path / "a.pth")
    with pytest.raises(UserError, match="nothing in it fits resnet18"):
        load_encoder(tmp_path / "a.pth", backbone="resnet18", allow_partial=True)


def test_half_match_is_an_error_unless_allowed(tmp_path):
    state = torchvision_resnet().state_dict()
    lacking = {k: v for k, v in state.items() if k != "layer2.0.conv1.weight"}
    beyond = state | {"layer2.0.attention.weight": torch.ones(2)}
    misshapen = state | {"layer1.0.conv1.weight": torch.ones(16, 16, 1, 1)}
    for content, words in (
        (lacking, "matched 119 of 120; missing: layer2.0.conv1.weight"),
        (beyond, "unknown: layer2.0.attention.weight"),
        (misshapen, "of other shape: layer1.0.conv1.weight .16x16x1x1 for 16x16x3x3."),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError, match=words):
            load_encoder(tmp_path / "a.pth")
        assert words.split(";")[0].split(".")[0] in load_encoder(
            tmp_path / "a.pth", allow_partial=True
        ).report.replace("matched 120 of 120; ", "")


def test_another_architecture_is_an_error(tmp_path):
    torch.save(official(torchvision_resnet(), mlp()) | {"arch": "resnet34"}, tmp_path / "a.pth.tar")
    with pytest.raises(UserError, match="fits resnet34 only in part"):
        load_encoder(tmp_path / "a.pth.tar")
    assert load_encoder(tmp_path / "a.pth.tar", backbone="resnet18").model.backbone == "resnet18"
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        load_encoder(tmp_path / "a.pth.tar", backbone="resnet_18")


# Files that are broken or dangerous


def test_broken_and_dangerous_files_are_refused_in_one_line(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    files = broken_files(tmp_path)
    recwarn.clear()
    for name, words in files.items():
        path = name if "://" in name else tmp_path / name
        with pytest.raises(UserError, match=words) as caught:
            load_encoder(path)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "EXPLODED").exists()
    assert not recwarn.list
    torch.load(tmp_path / "bomb.pth", weights_only=False)  # the bomb was real
    assert (tmp_path / "EXPLODED").exists()


def test_run_directory_is_told_where_its_checkpoint_is(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"give .*last\.ckpt"):
        read_state(tmp_path)


# Going on from other weights


def test_restore_from_ours_is_exact(tmp_path):
    save_ours(tmp_path / "last.ckpt", SMALL)
    written = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    fresh, _, _ = module_state(SMALL, seed=7)
    before = {k: v.clone() for k, v in fresh.items()}
    state, report = restore_pretraining(tmp_path / "last.ckpt", fresh)
    assert list(state) == list(fresh)
    assert all(torch.equal(state[k], written[k]) for k in written)
    assert all(torch.equal(fresh[k], before[k]) for k in fresh)
    assert "both encoders" in report and "queue of 64x16" in report


def test_restore_from_official_takes_both_encoders_and_the_queue(tmp_path):
    net, key, head, key_head = torchvision_resnet(0), torchvision_resnet(1), mlp(), mlp()
    content = official(net, head, key, key_head, place=5)
    torch.save(content, tmp_path / "a.pth.tar")
    model = dataclasses.replace(SMALL, stem="imagenet")
    state, _ = restore_pretraining(tmp_path / "a.pth.tar", module_state(model, seed=7)[0])
    encoder, other = build_encoder(model, 3, 32), build_encoder(model, 3, 32)
    for target, side in ((encoder, "query_encoder."), (other, "key_encoder.")):
        target.load_state_dict(take(state, side))
    assert distance(nn.Sequential(net, head), encoder.eval(), images()) < 1e-5
    assert distance(nn.Sequential(key, key_head), other.eval(), images()) < 1e-5
    queue = content["state_dict"]["module.queue"]  # C K
    assert torch.equal(state["queue.keys"], queue.T)
    assert int(state["queue.num_enqueued"]) % 64 == 5
    assert int(state["queue.num_enqueued"]) >= 64  # full: no warning of an empty queue


def test_restore_keeps_a_queue_fresh_that_does_not_fit(tmp_path):
    torch.save(official(torchvision_resnet(), mlp()), tmp_path / "a.pth.tar")
    larger = dataclasses.replace(SMALL, stem="imagenet", queue_size=128)
    fresh, _, _ = module_state(larger, seed=7)
    state, report = restore_pretraining(tmp_path / "a.pth.tar", fresh)
    assert "the queue stays fresh" in report and "64x16 for 128x16" in report
    assert all(torch.equal(state[k], fresh[k]) for k in ("queue.keys", "queue.num_enqueued"))
    assert not torch.equal(
        state["query_encoder.head.2.weight"], fresh["query_encoder.head.2.weight"]
    )
    wider = dataclasses.replace(SMALL, stem="imagenet", embedding_dim=32)
    fresh, _, _ = module_state(wider, seed=7)
    state, report = restore_pretraining(tmp_path / "a.pth.tar", fresh)
    assert "heads and queue stay fresh" in report
    kept = [name for name in fresh if ".head." in name or name.startswith("queue")]
    assert len(kept) == 10 and all(torch.equal(state[k], fresh[k]) for k in kept)


def test_restore_from_a_bare_backbone_copies_it_to_the_key_encoder(tmp_path):
    network = torchvision_resnet()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    fresh, _, _ = module_state(dataclasses.replace(SMALL, stem="imagenet"), seed=7)
    state, report = restore_pretraining(tmp_path / "a.pth", fresh)
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[f"query_encoder.backbone.{name}"], tensor)
        assert torch.equal(state[f"key_encoder.backbone.{name}"], tensor)
    assert (
        "its copy" in report and "heads and queue stay fresh, the file has no query head" in report
    )
    with pytest.raises(UserError, match=r"only in part.*conv1\.weight"):
        restore_pretraining(tmp_path / "a.pth", module_state(SMALL)[0])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_weights_of_a_timm_directory_are_of_the_network_that_it_names(tmp_path, name):
    arguments = {"img_size": 32, "num_heads": 6}  # which no tensor shows
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments).eval()
    network.pretrained_cfg = network.pretrained_cfg | {"mean": [0.1, 0.2, 0.3]}
    told = {"model_args": arguments, "safe_serialization": "both"}
    timm.models._hub.save_for_hf(network, str(tmp_path), **told)
    loaded = load_encoder(tmp_path / name)
    assert distance(network, loaded.backbone, images()) < 1e-5
    assert (loaded.layout, loaded.data["mean"]) == ("timm", [0.1, 0.2, 0.3])
    for about in ("{", '{"architectures": ["ViTModel"]}', '{"architecture": "no_such_network"}'):
        (tmp_path / "config.json").write_text(about)  # somebody else's
        assert load_encoder(tmp_path / name).variant == {}
