"""An export that fails ends with its exit code and one line, and leaves nothing behind."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from consumers import LOADERS, load_timm
from networks import PLAIN, VIT, Bomb, broken_files, save_ours
from processes import ROOT, finish, start, start_command

from moco.checkpoints import export as room
from moco.checkpoints import places
from moco.checkpoints.load import load_encoder
from moco.command import cli
from moco.command import export as script
from moco.config import RunError, UserError
from moco.judge_config import ExportConfig


def run_script(monkeypatch, *words) -> int:
    """Run export.py's main in this process; return the exit code."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    try:
        cli.run_main(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def source(tmp_path):
    """Write a small checkpoint beside an empty folder `out`."""
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
        (out / "a" / "c", "a is a file: give another path"),
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


def test_broken_checkpoints_end_with_code_2_and_one_line(source, monkeypatch, capfd):
    folder = source.parent
    save_ours(folder / "plain.ckpt", PLAIN)
    for name in [*broken_files(folder), "wrong-architecture"]:
        path, extra = folder / name, []
        if "://" in name:
            path = name
        elif name == "wrong-architecture":
            path, extra = folder / "plain.ckpt", ["--backbone", "resnet34"]
        capfd.readouterr()
        words = ["--checkpoint", path, "--format", "timm", "--output", folder / "out" / "a"]
        assert run_script(monkeypatch, *words, *extra) == 2, name
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err.startswith("error: "), name
        assert captured.err.count("\n") == 1, captured.err
    assert not list((folder / "out").iterdir()) and not (folder / "EXPLODED").exists()
    assert Bomb("true").__reduce__()[0] is os.system


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(source, monkeypatch, capfd, number):
    before = files_below(source.parent)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(room, "_difference", lambda *_: os.kill(os.getpid(), number))
    words = ["--checkpoint", source, "--format", "safetensors", "--output"]
    try:
        assert run_script(monkeypatch, *words, source.parent / "out" / "a") == 128 + number
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert capfd.readouterr().err.endswith(f"stopped by {number.name}\n")
    assert files_below(source.parent) == before


def test_a_link_is_followed(source, monkeypatch, capfd):
    (source.parent / "real").write_text("before")
    (source.parent / "link").symlink_to("real")
    words = ["--checkpoint", source, "--format", "safetensors", "--overwrite", "--output"]
    assert run_script(monkeypatch, *words, source.parent / "link") == 0
    assert (source.parent / "link").is_symlink() and load_encoder(source.parent / "real")


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


def test_full_disk_ends_with_code_1_and_keeps_the_earlier_export(tmp_path, monkeypatch, capfd):
    source, out = tmp_path / "plain.ckpt", tmp_path / "out"
    save_ours(source, PLAIN)
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
    with pytest.raises((UserError, RunError), match=r"features differ by|cannot be written"):
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
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        room.export(source, "onnx", source.parent / "out" / "a")


def test_images_of_the_comparison_are_real_and_differ(source):
    loaded = load_encoder(source)
    batch = room.example_images(loaded, 32, 32)
    assert batch.shape == (6, 3, 32, 32)
    assert torch.pdist(batch.flatten(1)).min() > 1
    loaded.data |= {"channels": 5, "mean": [0.5] * 5, "std": [0.25] * 5}
    assert room.example_images(loaded, 64, 32).shape == (6, 5, 64, 32)


# The command


def test_command_parses_before_torch_and_knows_every_format():
    formats = get_args(get_type_hints(ExportConfig)["format"])
    assert set(formats) == set(room.FORMATS) == set(LOADERS)
    code = "import sys, export\ntry: export.main(['--format', 'onnxx'])\n"
    code += "except ValueError as e: print(e)\n"
    code += "print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    _, out, _ = finish(start_command("-c", code, cwd=ROOT))
    first, second = out.splitlines()
    assert "'torch-export'" in first and second == "[]"


BEYOND = {"image_size": 10**9, "stem_padding": 4, "num_heads": 10**30}


@pytest.mark.parametrize("name, value", [*BEYOND.items(), ("image_size", -5), ("num_heads", -1)])
def test_command_refuses_a_size_that_no_network_has(monkeypatch, capsys, name, value):
    """The absent file shows that the sizes are judged before anything is read."""
    words = ["--checkpoint", "absent", "--format", "timm", "--output", "a", f"--{name}={value}"]
    assert run_script(monkeypatch, *words) == 2
    assert f"error: {name} is {value}: it must be at" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-5, 10**30])
def test_sizes_told_in_python_have_the_same_bounds(source, value):
    for name in ("image_size", "num_heads", "stem_padding"):
        with pytest.raises(UserError, match=f"{name} is {value}: at most .* is possible, and abo"):
            load_encoder(source, **{name: value})


def test_command_prints_one_json_line_and_progress_elsewhere(source):
    out = source.parent / "a.safetensors"
    words = ["--checkpoint", str(source), "--format", "safetensors", "--output", str(out)]
    code, said, err = finish(start(*words, script=ROOT / "export.py"))
    assert code == 0, err
    (line,) = said.splitlines()
    result = json.loads(line)
    assert (result["format"], result["layout"]) == ("safetensors", "moco")
    assert result["files"] == [str(out)]
    assert result["max_feature_difference"] <= 1e-5 and result["feature_dim"] == 64
    assert "matched 78 of 78" in err
