"""`python -m moco COMMAND`: the same mains as the scripts', under a name of their own."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from processes import ROOT

import moco
from moco import __main__ as program

SCRIPTS = {"train": "train", "knn": "eval_knn", "linear": "eval_linear", "export": "export"}
OTHERS = ("embed", "search", "select", "report", "views", "replay", "shards", "quality", "recipes")


def run(monkeypatch, *words: str, program_name: str = "/x/moco/__main__.py") -> int:
    monkeypatch.setattr(sys, "argv", [program_name, *words])
    try:
        program.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_script_runs_a_command_of_the_table():
    mains = {name: import_module(module).main for name, (module, _) in program.COMMANDS.items()}
    scripts = {name: import_module(script).main for name, script in SCRIPTS.items()}
    assert scripts == {name: main for name, main in mains.items() if name not in OTHERS}
    assert mains.keys() == {*SCRIPTS, *OTHERS}


def test_help_lists_the_commands(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m moco COMMAND")
    assert all(name in out and about in out for name, (_, about) in program.COMMANDS.items())


@pytest.mark.parametrize("name", [*SCRIPTS, *OTHERS])
@pytest.mark.parametrize(
    ("called", "shown"), [("/x/moco/__main__.py", "python -m moco"), ("/bin/moco", "moco")]
)
def test_the_help_of_a_command_bears_its_name(monkeypatch, capsys, name, called, shown):
    assert run(monkeypatch, name, "--help", program_name=called) == 0
    assert capsys.readouterr().out.startswith(f"usage: {shown} {name}")


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["trian"], "did you mean train?"), (["x"], "there are train, knn"), ([], "there are train")],
)
def test_an_unknown_command_is_one_line(monkeypatch, capsys, words, hint):
    assert run(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and hint in err


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moco", "--version"])
    program.main()
    assert capsys.readouterr().out == f"moco {moco.__version__}\n"


def test_wrong_settings_of_a_command_are_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--model.temprature", "1") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "--model.temperature" in err


def test_help_does_not_import_torch():
    code = (
        "import runpy, sys\n"
        "for words in (['--help'], *([name, '--help'] for name in sys.argv[1:])):\n"
        "    sys.argv = ['moco', *words]\n"
        "    try: runpy.run_module('moco', run_name='__main__')\n"
        "    except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'numpy', 'timm', 'pyarrow', 'pytorch_lightning'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *SCRIPTS, *OTHERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
