"""How a script ends: its last line and its exit code, with no traceback for a user's fault."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, finish, start_command

from moco.command import cli, launch, train
from moco.config import UserError


def end_of(main, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    code = 0
    try:
        cli.run_main(main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("interrupted", [False, True])
def test_ctrl_c_while_python_shuts_down_ends_it_without_a_traceback(
    monkeypatch, capsys, interrupted
):
    def main(argv):
        if interrupted:
            raise KeyboardInterrupt
        return {"steps": 1, "stopped_by": signal.SIGINT}

    before = signal.getsignal(signal.SIGINT)
    try:
        assert end_of(main, monkeypatch, capsys)[0] == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_result_is_one_json_line(monkeypatch, capsys):
    code, out, err = end_of(lambda argv: {"loss": 1.5, "argv": argv}, monkeypatch, capsys, "a")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1 and json.loads(out) == {"loss": 1.5, "argv": ["a"]}


def test_a_stopped_run_says_so_and_keeps_its_result(monkeypatch, capsys):
    result = {"steps": 3, "stopped_by": 15}
    code, out, _ = end_of(lambda argv: dict(result), monkeypatch, capsys)
    assert code == 143 and json.loads(out) == {"steps": 3}


@pytest.mark.parametrize(
    ("closed", "wanted"),
    [(True, ""), (False, "error: standard output does not take the result: No space left on dev")],
    ids=["by its reader", "a full disk"],
)
def test_a_result_that_nobody_takes_is_no_traceback(closed, wanted):
    code = "from moco.command import cli; cli.run_main(lambda argv: {'a': 1})"
    if closed:
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.run(
        [sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(out)
    assert process.returncode == 1
    assert process.stderr.strip().startswith(wanted) and process.stderr.count("\n") == bool(wanted)


def test_wrong_input_is_one_printable_line(monkeypatch, capsys):
    def main(argv):
        raise UserError("data.root 'a\nb\udcff' is\n  missing")

    code, out, err = end_of(main, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err == "error: data.root 'a b\\udcff' is missing\n"


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    def main(argv):
        raise UserError("wrong")

    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)  # for rank 0 to speak
    monkeypatch.setenv("RANK", "1")
    assert end_of(main, monkeypatch, capsys) == (2, "", "")


def test_the_end_does_not_look_for_garbage():
    """In all that torch has made that takes seconds."""
    code = (
        "class Garbage:\n"
        "    def __init__(self): self.itself = self\n"
        "    def __del__(self): print('found')\n"
        "from moco.command import cli\n"
        "import gc\n"
        "gc.disable()\n"
        "Garbage()\n"
        "cli.run_main(lambda argv: {'a': 1})\n"
    )
    assert finish(start_command("-c", code, cwd=ROOT)) == (0, '{"a": 1}\n', "")


def test_what_happens_is_said_before_torch_is_imported():
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit(7)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from moco.command import train\n"
        "train.main(['--data.dataset', 'digits'])\n"
    )
    told = "importing torch, Lightning and timm takes some seconds\n"
    assert finish(start_command("-c", code, cwd=ROOT)) == (7, "", told)


def test_ctrl_c_is_130(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert end_of(main, monkeypatch, capsys)[0] == 130


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch, capsys):
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end_of(main, monkeypatch, capsys)


# Wrong input that takes the images, the network or the devices to see

DIGITS = ("--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.accelerator", "cpu")
RUNS = {
    "negative temperature": (["--model.temperature", "-1"], "model.temperature is -1"),
    "no images of that name": (["--data.dataset", "folder"], "data.root is empty"),
    "a missing folder": (["--data.dataset", "folder", "--data.root", "nowhere"], "nowhere"),
    "a folder without images": (["--data.dataset", "folder", "--data.root", "empty"], "empty"),
    "a queue above the data": (["--model.queue_size", "1000000"], "model.queue_size 1000000"),
    "a batch above the data": (
        ["--data.batch_size", "4096", "--model.queue_size", "4096"], "data.batch_size 4096"
    ),
    "a batch above the folder": (
        [
            "--data.dataset", "folder", "--data.root", "few", "--data.channels", "3",
            "--data.batch_size", "16", "--model.queue_size", "16",
        ],
        "16",
    ),
    "images below a view": (["--data.image_size", "64"], "64"),
    "an unknown backbone": (["--model.backbone", "resnet5O"], "model.backbone 'resnet5O'"),
    "a stem that does not fit": (["--model.backbone", "vit_tiny_patch16_224"], "model.stem"),
    "devices that do not exist": (["--trainer.devices", "1000"], "trainer.devices is 1000"),
    "machines without a launcher": (["--trainer.num_nodes", "2"], "trainer.num_nodes is 2"),
    "a batch that does not divide": (["--data.batch_size", "102"], "data.batch_size 102"),
    "fp16 on a CPU": (["--trainer.precision", "16-mixed"], "trainer.precision is 16-mixed"),
    "a run that is not there": (["--resume", "nowhere"], "--resume nowhere"),
    "a directory that is a file": (["--run.dir", "file"], "run.dir file"),
    "greyscale of grey images": (["--data.grey", "0.5"], "data.grey is 0.5"),
    "a seed that is too large": (["--run.seed", "5000000000000000000000"], "run.seed"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_wrong_runs_end_before_the_first_step(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("x")
    Path("few").mkdir()
    for number in range(4):
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(f"few/{number}.png")
    argv, part = RUNS[name]
    monkeypatch.setattr("moco.training.run.set_up_logging", lambda: None)
    monkeypatch.setattr(logging.getLogger("moco"), "handlers", [logging.NullHandler()])
    code, out, err = end_of(train.main, monkeypatch, capsys, *DIGITS, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert part in err
    assert not Path("runs").exists()
