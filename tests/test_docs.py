"""README and docs say what is so: every command runs, every link, file and name exists.

A command is a line of a fenced bash block, or inline code that begins like one. Words in capitals
stand for the reader's own files; here they become small ones. Training is cut to a few steps by
options behind the command. A line that no rule knows fails.
"""

import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pictures import write_pictures
from test_architecture import WINGS

from docs import settings
from moco.command import cli
from moco.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MAINS = {"train": "train", "knn": "eval_knn", "linear": "eval_linear", "export": "export"}
WORDS = {"PATH": "path", "RUN": "runs/done", "FILE": "r18.safetensors"}
TINY = [
    *("--model.backbone", "resnet10t", "--model.stem", "cifar", "--model.width", "0.125"),
    *("--model.queue_size", "32", "--model.bn_splits", "2", "--data.batch_size", "16"),
    *("--data.image_size", "16", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.precision", "32-true"),
]
SHORT = {"paper": ["--epochs", "1"], "finetune": ["--epochs", "1"]}  # by --protocol
# What this machine cannot do is only parsed: the command, and what it needs.
ELSEWHERE = {
    "python train.py --config configs/imagenet_v2.yaml --data.root IMAGENET --trainer.devices 8": (
        "8 GPUs"
    ),
    "torchrun --standalone --nproc-per-node 8 train.py --config configs/imagenet_v2.yaml "
    "--data.root IMAGENET": "8 GPUs",
    "srun --nodes 2 --ntasks-per-node 8 python train.py --config configs/imagenet_v2.yaml "
    "--data.root IMAGENET --trainer.num_nodes 2": "SLURM",
    "python eval_linear.py --checkpoint RUN/checkpoints/last.ckpt --protocol paper --devices 8": (
        "8 GPUs"
    ),
    "torchrun --standalone --nproc-per-node 8 eval_linear.py "
    "--checkpoint RUN/checkpoints/last.ckpt --protocol paper": "8 GPUs",
}
# Inline code that names an option of somebody else's command, or a form and not a command.
NOT_OURS = {
    "sbatch --signal=USR1@60": "an option of SLURM",
    "python train.py --config configs/NAME.yaml": "a form: NAME is any recipe",
}
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|make|pip|uv|torchrun|srun|sbatch|source) .+")


def text(page):
    return page.read_text(encoding="utf-8")


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.M | re.S)


def prose(page):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.M | re.S)


def commands(page):
    """Commands of a page, in its order, without comments."""
    lines = [line for block in fenced(page, "bash") for line in block.splitlines() if line]
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose(page)) if COMMAND.fullmatch(code)]
    return [
        " ".join(shlex.split(line, comments=True))
        if '="' not in line
        else line.split("  #")[0].strip()
        for line in lines
    ] + inline


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Labelled pictures, a finished run and an exported file, under the names in WORDS."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 104), ("test", 10)):
        for name in ("a", "b"):
            files = [f"{i:03d}.png" for i in range(count)]
            write_pictures(folder / "path" / split / name, files, rng, size=(32, 32))
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        network = ["--model.backbone", "resnet18", "--model.stem", "imagenet", "--model.width", "1"]
        size = ["--data.image_size", "32", "--run.dir", "runs/done", "--run.knn_every", "0"]
        run("train", "--data.root", "path", *TINY, *network, *size)
        last = "runs/done/checkpoints/last.ckpt"
        run("export", "--checkpoint", last, "--format", "safetensors", "--output", WORDS["FILE"])
    return folder


@pytest.fixture
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def run(command, *arguments):
    """Run a command's main in this process; return its result."""
    return importlib.import_module(MAINS[command]).main(list(arguments))


def filled(words):
    """Put small files in the place of words in capitals."""
    found = [re.sub(r"[A-Z][A-Z0-9_]+", lambda m: WORDS[m[0]], w) if place(w) else w for w in words]
    return found


def place(word):
    """Tell whether a word of a command stands for the reader's own file."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]+(/.*)?", word) is not None


def ours(words):
    """Return the name of our command and its arguments, or None."""
    names = {f"{script}.py": name for name, script in MAINS.items()}
    if words[:3] == ["python", "-m", "moco"]:
        return words[3], words[4:]
    return (names[words[1]], words[2:]) if words[0] == "python" and words[1] in names else None


def parsed(words):
    """Parse the part of a command line that is ours, as far as it needs no device."""
    start = next(i for i, word in enumerate(words) if word in {f"{s}.py" for s in MAINS.values()})
    name, arguments = ours(["python", *words[start:]])
    with pytest.MonkeyPatch.context() as patch:
        # Everything behind the checks of settings starts processes or reads images.
        patch.setattr(importlib.import_module("moco.command.launch"), "start_ranks", stop)
        for module in ("moco.command.judge", "moco.command.train"):
            patch.setattr(importlib.import_module(module), "start_ranks", stop)
        patch.setattr(importlib.import_module("moco.command.judge"), "check_devices", lambda _: 0)
        patch.setattr(
            importlib.import_module("moco.training.decide"), "choose_devices", lambda _: 8
        )
        with pytest.raises(Stopped):
            run(name, *arguments)


class Stopped(Exception):
    """A command line was right, and its ranks would start now."""


def stop(*arguments):
    raise Stopped


@pytest.mark.parametrize("page, command", ALL, ids=[f"{p}-{c[:60]}" for p, c in ALL])
def test_a_command_runs_as_it_stands(page, command, inside):
    if command in NOT_OURS:
        return
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.M)
        assert words[1] in targets and all("=" in word for word in words[2:])
    elif words[0] in ("pip", "source"):
        assert_known_to_pip(words[1:])
    elif command in ELSEWHERE:
        words = ["path" if word == "IMAGENET" else word for word in words]
        parsed(filled(words))
    elif words[1].startswith("benchmarks/") or words[1].startswith("tests/"):
        assert_options_exist(words[1:])
    elif words[1:3] == ["-m", "docs.settings"]:
        assert words[3:] in ([], [">", "docs/settings.md"])
    else:
        name, arguments = ours(words)
        shortened(name, filled(arguments))


def shortened(name, arguments):
    """Run a command of ours on small files and for few steps."""
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as end:
            run(name, *arguments)
        assert end.value.code == 0
        return
    if name == "train" and "--resume" not in arguments:
        arguments = [*arguments, *TINY]
        if "--run.dir" in arguments:
            shutil.rmtree(arguments[arguments.index("--run.dir") + 1], ignore_errors=True)
    if "--protocol" in arguments:
        arguments = arguments + SHORT.get(arguments[arguments.index("--protocol") + 1], [])
    if name == "export":
        arguments = [*arguments, "--overwrite"]
    assert run(name, *arguments)


def assert_known_to_pip(words):
    """A requirements file that exists, packages that one of them lists, or the environment."""
    if words == [".venv/bin/activate"]:
        return
    assert words[0] == "install"
    files = [*ROOT.glob("requirements*.txt"), ROOT / "benchmarks" / "requirements.txt"]
    listed = set(re.findall(r"^[A-Za-z][\w-]*", "\n".join(map(text, files)), re.M))
    if words[1] == "-r":
        assert (ROOT / words[2]) in files
        return
    names = words[1 : words.index("--index-url")] if "--index-url" in words else words[1:]
    assert set(names) <= listed


def assert_options_exist(words):
    """A script that exists, with options that it or its harness declares."""
    declared = text(ROOT / words[0]) + text(ROOT / "benchmarks" / "harness.py")
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in declared


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs_as_it_stands(page, inside):
    for block in fenced(page, "python"):
        if "hub" in block and not Path("hub").exists():
            for command in commands(page):
                shortened(*((n, filled(a)) for n, a in [ours(shlex.split(command))]).__next__())
        for word, file in WORDS.items():
            block = re.sub(rf'"{word}\b', f'"{file}', block)
        exec(block, {"images": torch.rand(2, 3, 32, 32)})


def test_exceptions_are_still_there():
    found = {command for _, command in ALL}
    assert {*ELSEWHERE, *NOT_OURS} <= found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_of_a_recipe(path):
    lines = [line for line in text(path).splitlines() if line.startswith("#")]
    command = next(line for line in lines if "python train.py" in line)
    words = shlex.split(re.sub(r"\(.*\)|[][]", "", command.lstrip("# ")))
    parser = cli.build_parser("", TrainConfig, {})
    cli.parse(
        parser, TrainConfig, [str(path) if w.startswith("configs/") else w for w in words[2:]]
    )
    assert f"configs/{path.name}" in words
    assert all(
        any(part in line for line in lines) for part in ("Hardware:", "Expected:", "Source:")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for goal in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in goal:
            continue
        path, _, anchor = goal.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), goal
        heads = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings(target)]
        assert not anchor or anchor in heads, goal


def headings(page):
    return re.findall(r"^#+ (.+)$", prose(page), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page):
    own = r"`((?:moco|tests|benchmarks|configs|docs)/[\w./-]*)"
    names = [name for name in re.findall(own, prose(page)) if "NAME" not in name]
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_names_in_the_architecture_exist():
    page = prose(ROOT / "docs" / "architecture.md")
    names = re.findall(r"`([\w./]+\.py): ([\w.]+)`", page)
    assert len(names) > 40
    assert [f"{file}: {name}" for file, name in names if not defines(ROOT / file, name)] == []


def defines(path, name):
    """Tell whether a file defines a function, class or constant, or a class a method."""
    body = ast.parse(text(path)).body
    for part in name.split("."):
        found = [node for node in body if part in defined(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def defined(node):
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]


def test_the_table_of_wings_is_that_of_the_tests():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", text(ROOT / "docs" / "architecture.md"), re.M)
    drawn = {wing: set(re.findall(r"`(\w+)`", below)) for wing, below in rows}
    assert drawn == {wing: set(below) for wing, below in WINGS.items()}


def test_the_page_of_settings_is_that_of_the_code():
    assert text(ROOT / "docs" / "settings.md") == settings.page(), "python -m docs.settings"


def test_the_table_of_recipes_has_them_all():
    rows = re.findall(r"^\| `(\w+)` \|", text(ROOT / "README.md"), re.M)
    assert sorted(rows) == [path.stem for path in RECIPES]
    assert all(yaml.safe_load(text(path)) for path in RECIPES)


def test_readme_is_short():
    assert len(text(ROOT / "README.md").splitlines()) <= 120
