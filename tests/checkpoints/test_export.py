"""Each export loads where it is meant to and gives the same features there."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from consumers import LOADERS, fresh_weights_of_ones, load_official, load_timm
from networks import (
    CIFAR_HALF,
    PLAIN,
    V3,
    V3_VIT,
    V3_VIT_SMALL,
    VIT,
    distance,
    images,
    module_state,
    randomise,
    run_line,
    save_ours,
    torchvision_resnet,
)
from PIL import Image
from torch import nn
from torchvision import models

import moco
from moco.checkpoints import describe
from moco.checkpoints import export as room
from moco.checkpoints.load import load_encoder
from moco.checkpoints.matching import checksum
from moco.checkpoints.start import restore_pretraining
from moco.config import ModelConfig, UserError

CIFAR = dataclasses.replace(PLAIN, stem="cifar")
FAST = dataclasses.replace(
    V3, head="mlp_bn_affine", head_layers=3, predictor="bottleneck", patches=2, combine=2
)
TINY_CIFAR = ModelConfig(backbone="test_resnet", stem="cifar", queue_size=64)
TINY_PATCH = dataclasses.replace(TINY_CIFAR, stem="patch")
GRAPHS = ("onnx", "torch-export")
EVERYWHERE = ["safetensors", *GRAPHS]
OFFICIAL = ["official", "official-v3"]
FILES = {"onnx": "net.onnx", "torch-export": "net.pt2", "detectron2": "net.pkl"}
NETWORKS = {  # model, channels, formats that fit
    "resnet18": (PLAIN, 3, list(LOADERS)),
    "resnet50": (ModelConfig(backbone="resnet50"), 3, list(LOADERS)),
    "cifar-stem-one-channel": (TINY_CIFAR, 1, EVERYWHERE),
    "cifar-stem": (CIFAR, 1, [*EVERYWHERE, *OFFICIAL]),
    "patch-stem-tiny": (TINY_PATCH, 3, EVERYWHERE),
    "patch-stem": (dataclasses.replace(PLAIN, stem="patch"), 1, EVERYWHERE),
    "one-channel": (PLAIN, 1, [*EVERYWHERE, *OFFICIAL, "detectron2", "timm"]),
    "vit": (VIT, 3, [*EVERYWHERE, "timm"]),
    "v3-resnet": (V3, 3, list(LOADERS)),
    "fast": (FAST, 3, list(LOADERS)),
    "v3-vit": (V3_VIT, 3, [*EVERYWHERE, "timm"]),
    "v3-vit-small": (V3_VIT_SMALL, 3, [*EVERYWHERE, "timm", "official-v3"]),
}


@pytest.fixture(scope="module")
def written(folders):
    """Write a network's checkpoint once, and give its path and its backbone."""

    @functools.cache
    def write(name):
        model, channels, _ = NETWORKS[name]
        path = folders(name) / "last.ckpt"
        if name != "resnet50":
            return path, save_ours(path, model, channels)[0].backbone
        network = randomise(models.resnet50())  # foreign weights, classifier and all
        torch.save(network.state_dict(), path)
        network.fc = nn.Identity()
        return path, network

    return write


@pytest.fixture(scope="module")
def exported(written, folders):
    """Export a network in a format once, and give the path and the result."""

    @functools.cache
    def export(name, form):
        path = folders(f"{name}-{form}") / FILES.get(form, form)
        source = written(name)[0]
        with fresh_weights_of_ones():
            result = room.export(source, form, path, image_size=32)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        return path, result

    return export


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trips(written, exported, name):
    model, channels, fitting = NETWORKS[name]
    # Graphs are slow to trace. The tiny networks have these stems, one channel and a bottleneck, so
    # their graphs stand for those of the larger ones.
    traced = name in ("resnet18", "cifar-stem-one-channel", "patch-stem-tiny", "vit", "v3-vit")
    backbone = written(name)[1]
    for form in [form for form in fitting if traced or form not in GRAPHS]:
        path, result = exported(name, form)
        with fresh_weights_of_ones():
            found, about = LOADERS[form](path, model.backbone)
        allowed = 1e-4 if form == "onnx" else 1e-5
        assert result["max_feature_difference"] <= allowed
        for batch in (images(channels)[:1], images(channels).repeat(2, 1, 1, 1)):
            assert distance(backbone, found, batch) <= allowed, form
        assert result["feature_dim"] == backbone(batch).shape[1]
        if form in ("timm", "safetensors"):  # formats that we load again
            assert load_encoder(path).feature_dim == result["feature_dim"]
        assert all(Path(file).is_file() for file in result["files"])
        check_normalisation(about, form, channels, 32)


@pytest.mark.parametrize("name", NETWORKS)
def test_formats_that_cannot_hold_a_network_are_refused(written, tmp_path, name):
    model, _, fitting = NETWORKS[name]
    for form in set(LOADERS) - set(fitting):
        with pytest.raises(UserError, match=f"cannot hold a?.*{model.backbone}") as caught:
            room.export(written(name)[0], form, tmp_path / form)
        assert name != "patch-stem" or "cannot hold a resnet18 with patch stem" in str(caught.value)
        offered = str(caught.value).rsplit("take one of ", 1)[1].split(", ")
        assert sorted(offered) == sorted(fitting)
    assert not list(tmp_path.iterdir())


def check_normalisation(about, form, channels, size):
    """Check that the file tells mean, std, size and channels, if its format has room for them."""
    if form == "torchvision":
        return
    told = about["preparation"]
    assert (told["mean"], told["std"]) == (about["mean"], about["std"])
    assert (told["channels"], told["image_size"], told["crop_pct"]) == (channels, size, 0.875)
    mean = [0.485, 0.456, 0.406] if channels == 3 else [0.5]
    assert (about["channels"], about["image_size"], about["mean"]) == (channels, size, mean)
    assert len(about["std"]) == channels


def test_what_a_name_does_not_tell_travels_along(tmp_path):
    pooled = timm.create_model("test_vit", num_classes=0, img_size=32, global_pool="avg").eval()
    told = {"model_args": {"global_pool": "avg"}, "safe_serialization": True}
    timm.models._hub.save_for_hf(pooled, str(tmp_path / "source"), **told)
    for form in ("timm", "safetensors"):
        room.export(tmp_path / "source", form, tmp_path / form)
        again = load_encoder(tmp_path / form)
        assert again.variant["global_pool"] == "avg"
        assert distance(pooled, again.backbone, images()) < 1e-5
    assert distance(pooled, load_timm(tmp_path / "timm", "")[0], images()) < 1e-5
    padded = torchvision_resnet(0, 2, width=1)  # solo-learn's CIFAR stem
    state = {f"backbone.{k}": v for k, v in padded.state_dict().items()}
    torch.save({"state_dict": state | {"projector.x": torch.ones(1)}}, tmp_path / "solo.ckpt")
    out = tmp_path / "solo-safetensors"
    room.export(tmp_path / "solo.ckpt", "safetensors", out, stem_padding=2)
    assert distance(padded, load_encoder(out).backbone, images()) < 1e-5


# What is printed, and what the files say, is enough to use them


@pytest.mark.parametrize("form", ["timm", "onnx", "safetensors", "torch-export"])
def test_a_picture_prepared_by_the_files_own_words_gives_our_features(written, exported, form):
    """Pillow alone prepares it, in floating point and channel by channel."""
    path, result = exported("vit", form)
    network, about = LOADERS[form](path, "test_vit")
    assert about["preparation"] == result["preparation"]
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    backbone = moco.load_backbone(written("vit")[0])
    with torch.no_grad():
        wanted = backbone(backbone.transform(picture)[None])
        found = network(by_hand(picture, about["preparation"]))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def by_hand(picture: Image.Image, told: dict) -> torch.Tensor:
    """Prepare a picture by numbers of a file alone; return a batch of one."""
    assert (told["channels"], told["exif"], told["interpolation"]) == (3, "apply", "bilinear")
    side, width, height = told["image_size"], *picture.size
    assert max(width, height) > told["whole_up_to"]
    square = round(min(width, height) * told["crop_pct"])
    left, top = (width - square) // 2, (height - square) // 2
    channels = []
    for number, channel in enumerate(picture.convert("RGB").split()):
        values = np.asarray(channel, dtype=np.float32) * told["scale"]
        cut = Image.fromarray(values.astype(np.float32)).crop(
            (left, top, left + square, top + square)
        )
        small = np.array(cut.resize((side, side), Image.Resampling.BILINEAR))
        channels.append((small - told["mean"][number]) / told["std"][number])
    return torch.from_numpy(np.stack(channels)[None].astype(np.float32))


PRINTED = {"resnet18": ["torchvision", "safetensors", "timm"], "vit": ["timm", "torch-export"]}


@pytest.mark.parametrize("name", PRINTED)
def test_the_line_that_is_printed_loads_the_file(written, exported, name):
    for form in PRINTED[name]:
        _, result = exported(name, form)
        network = run_line(result["load_with"])["network"]
        assert distance(written(name)[1], network, images()) <= 1e-5, form


def test_the_line_of_onnx_takes_numpy_images(written, exported):
    path, result = exported("vit", "onnx")
    found = run_line(result["load_with"], images=images())["features"]
    wanted = written("vit")[1](images())
    assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert "run(None, {'images': images.numpy()})" in result["load_with"] and path.is_file()


def test_the_words_of_other_commands_name_the_first_layers_that_they_need(exported):
    words = exported("cifar-stem", "official")[1]["load_with"]
    assert words.startswith("main_lincls.py -a resnet18 --pretrained ")
    assert "model.conv1 = torch.nn.Conv2d(1, 64, 3, 1, 1, bias=False); model.maxpool =" in words
    words = exported("v3-vit-small", "official-v3")[1]["load_with"]
    assert words.startswith("main_lincls.py -a vit_small --pretrained ") and "after" not in words
    words = exported("resnet18", "detectron2")[1]["load_with"]
    assert "MODEL.PIXEL_MEAN [123.675, " in words and "INPUT.FORMAT RGB" in words
    assert "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.PIXEL_MEAN" in words


@pytest.mark.parametrize(
    ("name", "depth", "groups", "width", "first_stage"),
    [
        ("resnet34", 34, 1, 64, 64),
        ("resnet50", 50, 1, 64, 256),
        ("resnet152", 152, 1, 64, 256),
        ("resnext101_32x8d", 101, 32, 8, 256),
        ("wide_resnet50_2", 50, 1, 128, 256),
    ],
)
def test_detectron2_is_told_the_shape_of_a_network(name, depth, groups, width, first_stage):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    block = network.layer1[0]
    middle = block.conv2
    assert (middle.groups, middle.out_channels) == (groups, groups * width)
    assert network.layer2[0].conv1.in_channels == first_stage
    words = describe._detectron2_shape(name).split()
    told = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    usual = {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 256}
    wanted = dict(zip(usual, (depth, groups, width, first_stage), strict=True))
    assert {**{f"MODEL.RESNETS.{key}": v for key, v in usual.items()}, **told} == {
        f"MODEL.RESNETS.{key}": v for key, v in wanted.items()
    }


def test_a_safetensors_file_holds_the_line_that_fits_it(tmp_path):
    """timm alone builds no CIFAR stem and no other width; the line that it holds does."""
    source, _ = save_ours(tmp_path / "a.ckpt", CIFAR_HALF)
    room.export(tmp_path / "a.ckpt", "safetensors", tmp_path / "b")
    _, about = LOADERS["safetensors"](tmp_path / "b", None)
    line = about["load_with"].replace("FILE", str(tmp_path / "b"))
    assert distance(source.backbone, run_line(line)["network"], images()) <= 1e-5


# official


@pytest.mark.parametrize("name", ["v3-resnet", "v3-vit-small", "fast"])
def test_official_v3_carries_both_encoders_heads_and_predictor(exported, tmp_path, name):
    model = NETWORKS[name][0]
    state, _, _ = module_state(model)
    path, _ = exported(name, "official-v3")
    fresh = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    backbone = load_encoder(path).backbone
    restored, report = restore_pretraining(path, fresh, backbone)
    assert restored.keys() == state.keys()
    assert all(restored[key].equal(tensor) for key, tensor in state.items())
    assert "both encoders" in report and "heads; predictor" in report
    loaded = load_encoder(path)
    assert loaded.model.head == model.head and loaded.model.head_layers == model.head_layers
    with torch.no_grad():
        assert loaded.head(loaded.backbone(images())).shape == (2, 16)


@pytest.mark.parametrize("name", ["resnet18", "v3-resnet", "fast"])
def test_a_run_s_own_head_comes_back(written, name):
    model = NETWORKS[name][0]
    path, _ = written(name)
    loaded = load_encoder(path)
    assert (loaded.model.head, loaded.model.head_layers) == (model.head, model.head_layers)
    with torch.no_grad():
        assert loaded.head(loaded.backbone(images())).shape == (2, model.embedding_dim)


def test_official_v3_of_another_image_size_resamples_both_encoders(written, tmp_path):
    path = tmp_path / "a.pth.tar"
    room.export(written("v3-vit-small")[0], "official-v3", path, image_size=48)
    for side in ("query", "key"):
        found = load_encoder(path, side).backbone.state_dict()
        wanted = load_encoder(written("v3-vit-small")[0], side, image_size=48).backbone.state_dict()
        assert [name for name in wanted if not found[name].equal(wanted[name])] == []
    positions = [t for n, t in torch.load(path)["state_dict"].items() if n.endswith("pos_embed")]
    assert [tuple(each.shape) for each in positions] == [(1, 10, 384)] * 2


def test_official_carries_both_encoders_and_the_queue(exported):
    state, _, _ = module_state(PLAIN)
    path, _ = exported("resnet18", "official")
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["arch"]) == (3, "resnet18")
    written = content["state_dict"]
    assert written["module.queue"].shape == (16, 64)
    assert written["module.queue_ptr"].tolist() == [40]
    assert all(name.startswith("module.") for name in written)
    names = {"module.encoder_q.fc.2.weight": "query_encoder.head.2.weight"}
    names |= {"module.encoder_k.layer1.0.bn1.bias": "key_encoder.backbone.layer1.0.bn1.bias"}
    assert all(torch.equal(written[theirs], state[ours]) for theirs, ours in names.items())
    fresh, _, _ = module_state(PLAIN, seed=7)
    again, _ = restore_pretraining(path, fresh)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_official_of_the_key_encoder_is_read_as_the_scripts_read(written, tmp_path):
    _, _, key = module_state(PLAIN)
    room.export(written("resnet18")[0], "official", tmp_path / "a.pth.tar", encoder="key")
    assert distance(key.backbone, load_official(tmp_path / "a.pth.tar", "")[0], images()) < 1e-5
    with pytest.raises(UserError, match="holds no key encoder"):
        load_encoder(tmp_path / "a.pth.tar", "key")


def test_foreign_weights_can_be_exported(exported):
    _, result = exported("resnet50", "official")  # whose features the round trip compares
    assert (result["layout"], result["encoder"]) == ("torchvision", "backbone")
    assert result["left_to_the_consumer"] == ["fc.weight", "fc.bias"]


# timm


def test_timm_directory_is_ready_for_the_hub(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    query, _ = save_ours(tmp_path / "checkpoints" / "last.ckpt", VIT)
    scores = {"knn_top1": 88.7, "note": "x", "seconds": 3}
    scores["backbone_sha256"] = checksum(nn.ModuleDict({"backbone": query.backbone}))
    (tmp_path / "knn.json").write_text(json.dumps(scores))
    (tmp_path / "broken.json").write_text("{")
    out = tmp_path / "hub"
    room.export(tmp_path / "checkpoints" / "last.ckpt", "timm", out, licence="cc-by-4.0")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    network = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=10).eval()
    assert network(images()).shape == (2, 10)
    assert (
        distance(
            query.backbone,
            lambda x: network.forward_head(network.forward_features(x), pre_logits=True),
            images(),
        )
        < 1e-5
    )
    card = (out / "README.md").read_text()
    assert card.startswith("---\ntags:\n") and "\nlicense: cc-by-4.0\n---\n" in card
    assert "library_name: timm" in card and "knn: knn_top1: 88.7" in card
    assert "| model.temperature | `0.2` |" in card and "| dataset | `digits` |" in card
    assert "seconds" not in card and "/private/place" not in card
    everything = b"".join(p.read_bytes() for p in out.iterdir())
    assert b"/private/place" not in everything and b"in1k" not in everything
    room.export(tmp_path / "checkpoints" / "last.ckpt", "timm", out, overwrite=True)
    assert "\nlicense: unknown\n" in (out / "README.md").read_text()
