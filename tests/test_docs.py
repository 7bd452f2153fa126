"""README and docs: every command is run word for word, every link and name in them exists.

Words in capitals stand for the reader's own files, and the test puts small ones in their place.
Training commands are made short by options behind them. What this machine cannot run is parsed, or
listed by name: no command is passed over.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from processes import ROOT

from moco.command import cli, judge, train
from moco.config import EvalDataConfig, JudgeConfig, LinearConfig, TrainConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = [
    *("--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--run.knn_every", "0"),
    *("--model.backbone", "resnet10t", "--model.stem", "cifar", "--model.width", "0.125"),
    *("--model.embedding_dim", "16", "--model.queue_size", "32", "--model.bn_splits", "2"),
    *("--data.batch_size", "16", "--data.image_size", "16", "--data.upscale", "2"),
]
MANY = ("torchrun", "srun")  # start several ranks, on machines that have them
ELSEWHERE = {  # needs the network
    "uv venv .venv && UV_TORCH_BACKEND=cpu uv pip install --python .venv/bin/python torch "
    "torchvision",
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in fences} <= {"bash", "python", "text"}, "a block names its language"
    return [body for name, body in fences if name == language]


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    bare = [re.sub(r"\s+#\s.*", "", line).strip() for line in lines]
    return [line for line in bare if line]


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A place like the reader's: recipes, labelled pictures (PATH) and a run on them (RUN)."""
    place = tmp_path_factory.mktemp("reader")
    (place / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name in ("cat", "dog"):
            write_pictures(place / "PATH" / split / name, [f"{i}.png" for i in range(count)], rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        data = ["--data.root", "PATH", "--run.dir", "RUN", "--optim.warmup_epochs", "0"]
        train.main(["--config", "configs/folder.yaml", *data, *SHORT])
    return place


def run(line: str) -> None:
    """Run a command of a page, or check what of it can be checked here."""
    words = shlex.split(line)
    if line in ELSEWHERE:
        return
    if words[0] == "make":
        made = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{re.escape(words[1])}:", made, re.MULTILINE), f"make {words[1]}"
        return
    while words[0] in MANY:
        words = words[words.index("python") if "python" in words else words.index("train.py") - 1 :]
        words[0] = "python"
    assert words[0] == "python", f"what is {line!r}? Run it, or list it"
    script, arguments = words[1], words[2:]
    if script.startswith("benchmarks/"):
        source = (ROOT / script).read_text(encoding="utf-8")
        source += (ROOT / "benchmarks" / "harness.py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--")), line
        return
    name = {"eval_knn.py": "knn", "eval_linear.py": "linear"}.get(script, script[:-3])
    if "8" in arguments or "IMAGENET" in arguments:
        parse(name, arguments)
        return
    others = {"OTHER": "runs/mine/checkpoints/last.ckpt"}
    arguments = [others.get(word, word) for word in arguments]
    if name == "train" and "--resume" not in arguments:
        arguments += [*SHORT, "--optim.warmup_epochs", "0"]
    if name == "linear":
        arguments += ["--epochs", "2", "--batch_size", "8"]
    if name == "knn":
        arguments += ["--k", "[5]"]
    import_module(f"moco.command.{name}").main(arguments)


def parse(name: str, arguments: list[str]) -> None:
    """Parse a command that needs more than this machine has."""
    if name == "train":
        parser = cli.build_parser("", TrainConfig, train.EXTRAS)
        cli.parse(parser, TrainConfig, arguments)
    else:
        options = judge.flat_options(JudgeConfig, LinearConfig)
        cli.parse(cli.build_parser("", EvalDataConfig, options), EvalDataConfig, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs(page, own_files, monkeypatch):
    monkeypatch.chdir(own_files)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for line in commands(page):
        run(line)
    for block in blocks(page, "python"):
        exec(block, {"images": torch.zeros(2, 3, 16, 16)})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "BENCHMARKS.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_settings_are_written_from_the_code():
    spec = importlib.util.spec_from_file_location("settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    written = settings.PAGE.read_text(encoding="utf-8")
    assert written == settings.page(), "run: python docs/settings.py"


def test_what_architecture_names_exists():
    """`moco/WING/ROOM.py: name` and `Class.name` are there; so is every path."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+)`(?:: `([\w.]+)`)?", text)
    paths = [(path, name) for path, name in named if "/" in path]
    assert len(paths) > 20
    for path, name in paths:
        assert (ROOT / path).exists(), path
        if name:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            defined = names_in(tree)
            assert name in defined, f"{path}: {name}"


def names_in(tree: ast.Module) -> set[str]:
    """List what a file defines: functions, classes, methods as Class.name, constants."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{name}" for name in inner}
        if isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found
