"""Exports: each loads where it is meant to, gives the same features, or leaves nothing behind."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pickle
import pickletools
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from test_load import (
    Bomb,
    broken_files,
    distance,
    images,
    module_state,
    randomise,
    save_ours,
    torchvision_resnet,
)
from torch import nn
from torchvision import models

from moco.checkpoints import export as room
from moco.checkpoints.load import load_encoder, restore_pretraining
from moco.checkpoints.matching import checksum
from moco.command import cli
from moco.config import ModelConfig, UserError

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("export_script", ROOT / "export.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

PLAIN = ModelConfig(backbone="resnet18", queue_size=64, embedding_dim=16)
VIT = ModelConfig(backbone="test_vit", queue_size=64)  # the smallest network there is
CIFAR = dataclasses.replace(PLAIN, stem="cifar")
TINY_CIFAR = ModelConfig(backbone="test_resnet", stem="cifar", queue_size=64)
EVERYWHERE = ["safetensors", "onnx", "torch-export"]


def run_script(monkeypatch, *words) -> int:
    """Run export.py's main in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    try:
        cli.run_main(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


# The line that loads each format elsewhere; gives the network and what the file says about it


def load_timm(path, name):
    network = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    about = json.loads((path / "config.json").read_text())["pretrained_cfg"]
    channels, size, _ = about["input_size"]
    assert about["input_size"] == [channels, size, size]
    config = network.pretrained_cfg
    assert list(config["mean"]) == about["mean"] and config.get("license") is None
    return network, about | {"channels": channels, "image_size": size}


def load_torchvision(path, name):
    with torch.device("meta"):
        network = models.get_model(name, weights=None)
    return into_torchvision(network, torch.load(path, weights_only=True)), None


def into_torchvision(network, state):
    """Load as main_lincls does: exactly the classifier may be missing."""
    outcome = network.load_state_dict(state, strict=False, assign=True)
    assert set(outcome.missing_keys) == {"fc.weight", "fc.bias"} and not outcome.unexpected_keys
    network.fc = nn.Identity()
    return network.eval()


def load_safetensors(path, name):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["moco"])
        state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    options = {"img_size": about["image_size"]} if "vit" in name else {}
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0, in_chans=about["channels"], **options)
        if about["stem"] == "cifar":
            cifar_stem(network, about["channels"])
    network.load_state_dict(state, assign=True)
    return network.eval(), about


def load_onnx(path, name):
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    about = {k: json.loads(metadata[k]) for k in ("mean", "std", "image_size", "channels")}
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]), about


def load_torch_export(path, name):
    extra = {"moco.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["moco.json"])


def load_official(path, name):
    """Load as main_lincls does, with another first layer where the source has one."""
    content = torch.load(path, weights_only=True)
    about = content["moco"]
    with torch.device("meta"):
        network = models.__dict__[content["arch"]]()
        if about["stem"] == "cifar":
            cifar_stem(network, about["channels"])
        elif about["channels"] != 3:
            network.conv1 = nn.Conv2d(about["channels"], 64, 7, 2, 3, bias=False)
    state = content["state_dict"]
    for key in list(state):
        if key.startswith("module.encoder_q") and not key.startswith("module.encoder_q.fc"):
            state[key[len("module.encoder_q.") :]] = state[key]
        del state[key]
    return into_torchvision(network, state), about


def load_detectron2(path, name):
    """Load the pickle and fill a network by walking it with detectron2's names."""
    content = torch_free_pickle(path)
    assert content["matching_heuristics"] is True and content["__author__"]
    arrays = dict(content["model"])
    about = content["moco"]
    network = models.get_model(name, weights=None)
    if about["channels"] != 3:
        network.conv1 = nn.Conv2d(about["channels"], 64, 7, 2, 3, bias=False)
    network.fc = nn.Identity()
    for place, module in network.named_modules():
        parts = place.split(".")
        prefix = "stem" if parts[0] in ("conv1", "bn1") else None
        if prefix is None and parts[0].startswith("layer"):
            prefix = f"res{int(parts[0][5:]) + 1}.{parts[1]}" if len(parts) > 2 else None
            parts = parts[2:]
        if prefix is None or not list(module.parameters(recurse=False)):
            continue
        leaf = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}.get(".".join(parts))
        leaf = leaf or parts[0].replace("bn1", "conv1.norm").replace("bn2", "conv2.norm")
        leaf = leaf.replace("bn3", "conv3.norm")
        for kind in ("weight", "running_mean", "running_var", "bias"):
            if getattr(module, kind, None) is not None:
                array = arrays.pop(f"{prefix}.{leaf}.{kind}")
                getattr(module, kind).data.copy_(torch.from_numpy(array))
    assert not arrays
    return network.eval(), about


def torch_free_pickle(path):
    """Read a pickle that holds nothing but arrays, by names that any numpy knows."""
    content = path.read_bytes()
    operations = [(op[0].name, op[1]) for op in pickletools.genops(content)]
    assert not [name for kind, name in operations if kind == "GLOBAL"]
    strings = [text for kind, text in operations if "UNICODE" in kind]
    assert not any("_core" in s or "numpy." in s for s in strings)
    return pickle.loads(content)


def cifar_stem(network, channels):
    network.conv1 = nn.Conv2d(channels, network.bn1.num_features, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()


LOADERS = {
    "timm": load_timm,
    "torchvision": load_torchvision,
    "safetensors": load_safetensors,
    "official": load_official,
    "detectron2": load_detectron2,
    "onnx": load_onnx,
    "torch-export": load_torch_export,
}
FILES = {"onnx": "net.onnx", "torch-export": "net.pt2", "detectron2": "net.pkl"}
NETWORKS = {  # model, channels, formats that fit
    "resnet18": (PLAIN, 3, list(LOADERS)),
    "resnet50": (ModelConfig(backbone="resnet50"), 3, list(LOADERS)),
    "cifar-stem-one-channel": (TINY_CIFAR, 1, EVERYWHERE),
    "cifar-stem": (CIFAR, 1, [*EVERYWHERE, "official"]),
    "one-channel": (PLAIN, 1, [*EVERYWHERE, "official", "detectron2", "timm"]),
    "vit": (VIT, 3, [*EVERYWHERE, "timm"]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a network's checkpoint once; gives its path and its backbone."""

    @functools.cache
    def write(name):
        model, channels, _ = NETWORKS[name]
        path = tmp_path_factory.mktemp(name) / "last.ckpt"
        if name != "resnet50":
            return path, save_ours(path, model, channels)[0].backbone
        network = randomise(models.resnet50())  # foreign weights, classifier and all
        torch.save(network.state_dict(), path)
        network.fc = nn.Identity()
        return path, network

    return write


@contextlib.contextmanager
def fresh_weights_of_ones():
    """Draw no weights that a file overwrites: that takes half of the time of loading one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "uniform_", "normal_"):
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor.data.fill_(1))
        yield


@pytest.fixture(scope="module")
def exported(written, tmp_path_factory):
    """Export a network in a format once; gives the path and the result."""

    @functools.cache
    def export(name, form):
        path = tmp_path_factory.mktemp(f"{name}-{form}") / FILES.get(form, form)
        source = written(name)[0]
        with fresh_weights_of_ones():
            result = room.export(source, form, path, image_size=32)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        return path, result

    return export


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trips(written, exported, name):
    model, channels, fitting = NETWORKS[name]
    # Graphs are slow to trace: those of this stem and of one channel come from the tiny network.
    skipped = ("onnx", "torch-export") if name in ("one-channel", "cifar-stem") else ()
    backbone = written(name)[1]
    for form in [form for form in fitting if form not in skipped]:
        path, result = exported(name, form)
        with fresh_weights_of_ones():
            found, about = LOADERS[form](path, model.backbone)
        allowed = 1e-4 if form == "onnx" else 1e-5
        assert result["max_feature_difference"] <= allowed
        for batch in (images(channels)[:1], images(channels).repeat(2, 1, 1, 1)):
            assert distance(backbone, found, batch) <= allowed, form
        assert result["feature_dim"] == backbone(batch).shape[1]
        assert all(Path(file).is_file() for file in result["files"])
        check_normalisation(about, form, channels, 32)


@pytest.mark.parametrize("name", NETWORKS)
def test_formats_that_cannot_hold_a_network_are_refused(written, tmp_path, name):
    model, _, fitting = NETWORKS[name]
    for form in set(LOADERS) - set(fitting):
        with pytest.raises(UserError, match=f"cannot hold a?.*{model.backbone}") as caught:
            room.export(written(name)[0], form, tmp_path / form)
        offered = str(caught.value).rsplit("take one of ", 1)[1].split(", ")
        assert sorted(offered) == sorted(fitting)
    assert not list(tmp_path.iterdir())


def check_normalisation(about, form, channels, size):
    """Mean, std, size and channels are in the file, where the format has a place for them."""
    if form == "torchvision":
        return
    mean = [0.485, 0.456, 0.406] if channels == 3 else [0.5]
    assert (about["channels"], about["image_size"], about["mean"]) == (channels, size, mean)
    assert len(about["std"]) == channels


def test_what_a_name_does_not_tell_travels_along(tmp_path):
    pooled = timm.create_model("test_vit", num_classes=0, img_size=32, global_pool="avg").eval()
    timm.models._hub.save_for_hf(pooled, str(tmp_path / "source"), safe_serialization=True)
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


# official


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


# What can go wrong


@pytest.fixture
def source(tmp_path):
    save_ours(tmp_path / "last.ckpt", VIT)
    (tmp_path / "out").mkdir()
    return tmp_path / "last.ckpt"


def test_nothing_is_overwritten_unless_asked_for(source, monkeypatch, capsys):
    out = source.parent / "out"
    (out / "a").write_text("precious")
    words = ["--checkpoint", source, "--format", "safetensors", "--output"]
    assert run_script(monkeypatch, *words, out / "a") == 2
    assert "exists" in capsys.readouterr().err
    assert (out / "a").read_text() == "precious"
    assert run_script(monkeypatch, *words, out / "a", "--overwrite") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["format"] == "safetensors"
    assert load_encoder(out / "a").model.backbone == "test_vit"
    for place, reason in (
        (source, "is the checkpoint itself"),
        (out, "is no regular file"),
        (out / "b" / "c", "there is no directory"),
        (Path("/dev/null"), "is no regular file"),
        (Path(".."), "is no name"),
    ):
        assert run_script(monkeypatch, *words, place, "--overwrite") == 2
        assert reason in capsys.readouterr().err
    (out / "thesis.tex").write_text("precious")
    for place, reason in ((out, "also holds"), (out / "thesis.tex", "is no directory")):
        with pytest.raises(UserError, match=reason):
            room.export(source, "timm", place, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["a", "thesis.tex"]


def test_broken_checkpoints_end_with_code_2_and_one_line(source, written, monkeypatch, capfd):
    folder = source.parent
    for name in [*broken_files(folder), "wrong-architecture"]:
        path, extra = folder / name, []
        if "://" in name:
            path = name
        elif name == "wrong-architecture":
            path, extra = written("resnet18")[0], ["--backbone", "resnet34"]
        capfd.readouterr()
        words = ["--checkpoint", path, "--format", "timm", "--output", folder / "out" / "a"]
        assert run_script(monkeypatch, *words, *extra) == 2, name
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err.startswith("error: "), name
        assert captured.err.count("\n") == 1, captured.err
    assert not list((folder / "out").iterdir()) and not (folder / "EXPLODED").exists()
    assert Bomb("true").__reduce__()[0] is os.system


def files_below(folder):
    return sorted(str(p) for p in folder.rglob("*"))


@pytest.mark.parametrize("form", ["safetensors", "timm"])
def test_file_size_limit_ends_with_code_1_and_leaves_nothing(source, monkeypatch, capfd, form):
    before = files_below(source.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["--checkpoint", source, "--format", form, "--output", source.parent / "out" / "a"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        code = run_script(monkeypatch, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    check_disk_error(capfd, before, source.parent)


def check_disk_error(capfd, before, folder):
    captured = capfd.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot be written" in errors[0], captured.err
    assert "Traceback" not in captured.err
    assert files_below(folder) == before


def test_full_disk_ends_with_code_1_and_keeps_the_earlier_export(
    written, tmp_path, monkeypatch, capfd
):
    source, out = written("resnet18")[0], tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root; the limit on file sizes is tested instead")
    try:
        (out / "a").write_text("precious")
        before = files_below(tmp_path)
        for form in ("safetensors", "official", "detectron2"):
            words = ["--checkpoint", source, "--format", form, "--output", out / "a", "--overwrite"]
            assert run_script(monkeypatch, *words) == 1
            check_disk_error(capfd, before, tmp_path)
        assert (out / "a").read_text() == "precious"
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("harm", ["noise", "nan", "crash"])
def test_export_that_reads_back_otherwise_leaves_nothing(source, monkeypatch, harm):
    write, read, tolerance = room.FORMATS["safetensors"]

    def harmed(loaded, *rest):
        weight = loaded.backbone.norm.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(float("nan") if harm == "nan" else 1.001)
        files = write(loaded, *rest)
        weight.data.copy_(kept)
        return files

    def crash(path, loaded):
        raise OSError(5, "Input/output error")

    formats = {"safetensors": (harmed, crash if harm == "crash" else read, tolerance)}
    monkeypatch.setattr(room, "FORMATS", formats)
    before = files_below(source.parent)
    with pytest.raises((UserError, room.DiskError), match=r"features differ by|cannot be written"):
        room.export(source, "safetensors", source.parent / "out" / "a")
    assert files_below(source.parent) == before


def test_writer_that_fails_is_one_line(source, monkeypatch):
    def fail(*rest):
        raise RuntimeError("no such operator\n  deep inside")

    for formats in ((fail, None, 0), (lambda *rest: {"": b"x"}, fail, 0)):
        monkeypatch.setattr(room, "FORMATS", {"onnx": formats})
        with pytest.raises(UserError, match=r"test_vit.*no such operator deep inside$"):
            room.export(source, "onnx", source.parent / "out" / "a")
    assert not list((source.parent / "out").iterdir())


def test_weights_that_are_no_numbers_are_refused(source):
    raw = torch.load(source, weights_only=True)
    raw["state_dict"]["query_encoder.backbone.patch_embed.proj.weight"][0] = float("nan")
    torch.save(raw, source)
    with pytest.raises(UserError, match="not finite"):
        room.export(source, "safetensors", source.parent / "out" / "a")
    assert not list((source.parent / "out").iterdir())


@pytest.mark.parametrize("name", ["with space", "a#b?c=d", "ünï", "-x"])
def test_odd_names_of_places(source, name):
    place = source.parent / name
    place.mkdir()
    room.export(source, "timm", place / name)
    assert load_timm(place / name, "")[0] and load_encoder(place / name)


def test_missing_onnx_is_said_in_one_line(source, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        room.export(source, "onnx", source.parent / "out" / "a")


def test_images_of_the_comparison_are_real_and_differ(source):
    loaded = load_encoder(source)
    batch = room.example_images(loaded)
    assert batch.shape == (6, 3, 32, 32)
    assert torch.pdist(batch.flatten(1)).min() > 1
    loaded.data |= {"channels": 5, "mean": [0.5] * 5, "std": [0.25] * 5}
    assert room.example_images(loaded).shape == (6, 5, 32, 32)


# The command


def test_command_parses_before_torch_and_knows_every_format():
    assert set(get_args(script.Format)) == set(room.FORMATS) == set(LOADERS)
    code = "import sys, export\ntry: export.main(['--format', 'onnxx'])\n"
    code += "except ValueError as e: print(e)\n"
    code += "print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    first, second = done.stdout.splitlines()
    assert "'torch-export'" in first and second == "[]"


def test_command_prints_one_json_line_and_progress_elsewhere(source):
    out = source.parent / "a.safetensors"
    words = ["--checkpoint", source, "--format", "safetensors", "--output", out]
    done = subprocess.run(
        [sys.executable, ROOT / "export.py", *words], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["format"], result["layout"]) == ("safetensors", "moco")
    assert result["files"] == [str(out)]
    assert result["max_feature_difference"] <= 1e-5 and result["feature_dim"] == 64
    assert "matched 78 of 78" in done.stderr
