"""README and docs say what is so: every command runs, every link, file and name exists.

A command is a line of a fenced bash block, or inline code that begins like one. Words in capitals
stand for the reader's own files; here they become small ones. Training is cut to a few steps by
options behind the command, and a rehearsal to two. A line that no rule knows fails.
"""

import ast
import functools
import importlib
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from networks import PLAIN, save_ours
from pictures import write_pictures
from PIL import Image
from test_architecture import WINGS

from moco.command import cli, judge, train
from moco.config import TrainConfig
from moco.training import rehearsal

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MAINS = {"train": "train", "knn": "eval_knn", "linear": "eval_linear", "export": "export"}
MAINS |= {name: f"moco.command.{name}" for name in ("embed", "search", "select", "quality")}
MAINS |= {name: f"moco.command.{name}" for name in ("report", "views", "replay", "shards")}
MAINS["recipes"] = "moco.command.recipe_list"
WORDS = {
    "SHARDS": "shards",
    "FOLDER": "path",
    "OUTPUT": "packed",
    "PATH": "path",
    "IMAGENET": "path",
    "RUN": "runs/done",
    "FILE": "file.safetensors",
    "IMAGE": "path/test/a/000.png",
    "TABLE": "table.csv",
}
SMALL = ["--model.backbone", "resnet10t", "--model.stem", "cifar", "--model.width", "0.125"]
SHORT = [
    *("--model.queue_size", "32", "--model.bn_splits", "2", "--data.batch_size", "16"),
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.precision", "32-true", "--run.report", "false"),
]
TINY = [*SMALL, *SHORT, "--data.image_size", "16"]
BARE = ["--baselines", "false"]
# What RUN stands for in an export: a network that every format takes.
RESNET18 = "runs/resnet18"
# What this machine cannot do is only parsed: the command, and what it needs.
ELSEWHERE = {
    "python train.py --config configs/imagenet_v3.yaml --data.root IMAGENET --trainer.devices 8 "
    "--data.chunks 4": "8 GPUs",
    "python train.py --config configs/imagenet_v2.yaml --data.root IMAGENET --trainer.devices 8": (
        "8 GPUs"
    ),
    "torchrun --standalone --nproc-per-node 8 train.py --config configs/imagenet_v2.yaml "
    "--data.root IMAGENET": "8 GPUs",
    "srun --nodes 2 --ntasks-per-node 8 python train.py --config configs/imagenet_v2.yaml "
    "--data.root IMAGENET": "SLURM",
    "python eval_linear.py --checkpoint RUN/checkpoints/last.ckpt --protocol paper --devices 8": (
        "8 GPUs"
    ),
    "torchrun --standalone --nproc-per-node 8 eval_linear.py "
    "--checkpoint RUN/checkpoints/last.ckpt --protocol paper": "8 GPUs",
}
# Inline code that names an option of somebody else's command, or a form and not a command.
NOT_OURS = {
    "sbatch --signal=USR1@60": "an option of SLURM",
    "sbatch --requeue --signal=USR1@60": "the same",
    "torchrun --max-restarts 3": "an option of torchrun",
    "python train.py --config configs/NAME.yaml": "a form: NAME is any recipe",
    "python -m moco COMMAND": "a form: COMMAND is any of MAINS",
    "python -m moco shards": "its name alone",
    "uv pip install": "what to write for pip",
}
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|make|pip|uv|torchrun|srun|sbatch|source) .+")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n|`([^`\n]+)`", re.M | re.S)


def text(path):
    return path.read_text(encoding="utf-8")


def prose(page):
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.M | re.S)


def steps(page):
    """Yield what a page tells the reader to run, in its order: (language, code)."""
    for language, block, inline in FENCED.findall(text(page)):
        if language == "bash":
            lines = [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]
            yield from (("bash", line) for line in lines if line)
        elif block:
            assert language in ("", "python"), language
            yield from [("python", block)] if language else []
        elif COMMAND.fullmatch(inline):
            yield "bash", inline


@pytest.fixture(scope="module")
def workspace(folders):
    """Labelled pictures, a run of one step of two, and an export, under the names in WORDS.

    And the checkpoint of a ResNet-18.
    """
    folder = folders("docs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 104), ("test", 10)):
        for name in ("a", "b"):
            files = [f"{i:03d}.png" for i in range(count)]
            write_pictures(folder / "path" / split / name, files, rng, size=(32, 32))
    told = [f"train/{name}/{i:03d}.png,{name == 'a':d}" for name in "ab" for i in range(104)]
    (folder / WORDS["TABLE"]).write_text("\n".join(["path,first", *told]))
    (folder / "configs").symlink_to(ROOT / "configs")
    last = folder / "runs/done/checkpoints/last.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stored = ["--run.dir", WORDS["RUN"], "--run.checkpoint_every", "1"]
        stored += ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]  # can be extended
        stored += ["--data.batch_size", "104", "--model.queue_size", "104"]
        run("train", "--data.root", WORDS["PATH"], *TINY, "--run.knn_every", "0", *stored)
        last.with_name("step_000000001.ckpt").replace(last)  # so that there is something to resume
        last.with_name("step_000000002.ckpt").unlink()
        written = ["--format", "safetensors", "--output", WORDS["FILE"]]
        run("export", "--checkpoint", str(last), *written)
    (folder / RESNET18 / "checkpoints").mkdir(parents=True)
    save_ours(folder / RESNET18 / "checkpoints" / "last.ckpt", PLAIN)
    return folder


def run(command, *arguments):
    """Run a command's main in this process; return its result."""
    return importlib.import_module(MAINS[command]).main(list(arguments))


def ours(words):
    """Return the name and the arguments of a command of ours, with small files in capitals' place.

    Raises:
        KeyError: It is none of ours, or nobody says what a word in capitals stands for.
    """
    if words[:3] == ["python", "-m", "moco"]:
        name, arguments = words[3], words[4:]
    else:
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        names = {f"{script}.py": name for name, script in MAINS.items()}
        name, arguments = names[words[start]], words[start + 1 :]
    capitals = re.compile(r"^[A-Z][A-Z0-9_]+(?=$|/)")
    return name, [capitals.sub(lambda found: WORDS[found[0]], word) for word in arguments]


def assert_parsed(words):
    """Take a command for other machines to where their files would be looked for."""
    name, arguments = ours(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moco.command.train.check_start", stop)
        patch.setattr("moco.command.judge.start_ranks", stop)
        patch.setattr("moco.command.judge.check_devices", lambda config: None)
        with pytest.raises(Stopped):
            run(name, *arguments)


class Stopped(Exception):
    """A command line was right, and a run or its ranks would start now."""


def stop(*_, **__):
    raise Stopped


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_tells_to_run_runs(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(rehearsal, "BATCHES", 2)
    names = {"images": torch.rand(2, 3, 32, 32), "picture": Image.new("RGB", (40, 50))}
    for language, code in steps(page):
        try:
            run_python(code, names) if language == "python" else run_command(code)
        except BaseException as error:
            error.add_note(f"{page.name}: {code}")
            raise


def run_python(block, names):
    """Run a block; later ones of its page see its names."""
    for word, file in WORDS.items():
        block = re.sub(rf'"{word}\b', f'"{file}', block)
    settle, read = train.settle, judge.read_settings

    def shortened(words, has_module=False, usual=()):
        # A resumed run keeps its settings, a module has its own network, and views their own size.
        network = [] if has_module else SMALL
        resumed = any(word.startswith("--resume") for word in words)
        return settle([*words, *([] if resumed else [*network, *SHORT])], has_module, usual)

    def without_baselines(words, kind, about):
        return read([*words, *BARE], kind, about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "settle", shortened)
        patch.setattr(judge, "read_settings", without_baselines)
        exec(block, names)


@functools.cache
def run_command(command):
    """Run a command in this process, once, or check what of it can be checked here."""
    words = shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", command))
    if command in NOT_OURS:
        return
    if command in ELSEWHERE:
        assert_parsed(words)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.M)
        assert words[1] in targets and all("=" in word for word in words[2:])
    elif words[0] in ("pip", "source"):
        assert_known_to_pip(words[1:])
    elif words[1].startswith("benchmarks/"):
        assert_options_exist(words[1:])
    elif words[1].startswith("examples/"):
        given = [WORDS.get(word, word) for word in words[2:]]
        assert len(runpy.run_path(str(ROOT / words[1]))["main"](*given))
    elif words[1] == "docs/settings.py":  # a test of its own compares what it writes
        assert words[2:] in ([], [">", "docs/settings.md"])
    else:
        run_shortened(*ours(words))


def run_shortened(name, arguments):
    """Run a command of ours on small files and for few steps."""
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as end:
            run(name, *arguments)
        assert end.value.code == 0
        return
    if name == "train" and "--resume" not in arguments:
        arguments += TINY
        if "cifar10_cpu" in " ".join(arguments):  # whose views grow from the 16 pixels of TINY
            arguments += ["--data.image_size_start", "12", "--data.image_size_end", "14"]
    if name in ("knn", "linear"):
        arguments += BARE
    if name == "linear":
        arguments += ["--epochs", "2"]
    if name == "export":
        arguments = [word.replace(WORDS["RUN"], RESNET18) for word in arguments]
        arguments += ["--overwrite"]
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
    if words[1:] == ["."]:
        return
    names = words[1 : words.index("--index-url")] if "--index-url" in words else words[1:]
    assert set(names) <= listed


def assert_options_exist(words):
    """A script that exists, with options that it, its harness or its profiles declare."""
    declared = text(ROOT / words[0])
    for room in ("harness", "profiles"):
        if f"from benchmarks.{room} import" in declared:
            declared += text(ROOT / "benchmarks" / f"{room}.py")
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in declared


def test_every_command_has_a_script():
    assert importlib.import_module("moco.__main__").COMMANDS.keys() == MAINS.keys()


def test_exceptions_are_still_there():
    found = {code for page in PAGES for _, code in steps(page)}
    assert {*ELSEWHERE, *NOT_OURS} <= found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_of_a_recipe(path):
    lines = [line for line in text(path).splitlines() if line.startswith("#")]
    command = next(line for line in lines if "python train.py" in line)
    words = shlex.split(re.sub(r"\(.*\)|[][]", "", command.lstrip("# ")))
    parser = cli.build_parser("", TrainConfig, {"init_from": {"type": str}})
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
        if anchor:
            heads = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings(target)]
            assert anchor in heads, goal


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
    page = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]
    assert text(ROOT / "docs" / "settings.md") == page(), (
        "python docs/settings.py > docs/settings.md"
    )


def test_the_table_of_recipes_has_them_all():
    rows = re.findall(r"^\| `(\w+)` \|", text(ROOT / "README.md"), re.M)
    assert sorted(rows) == [path.stem for path in RECIPES]
    assert all(yaml.safe_load(text(path)) for path in RECIPES)


def test_readme_is_short():
    assert len(text(ROOT / "README.md").splitlines()) <= 120


@pytest.mark.parametrize("page", ["faults.md", "images.md"])
def test_tests_named_in_a_page_exist(page):
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found[path.name] = set(re.findall(r"^def (test_\w+)", text(path), re.M))
    known = set().union(*found.values())
    names = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text(ROOT / "docs" / page))
    assert len(names) > 30
    assert [n for file, n in names if n not in (found.get(file, set()) if file else known)] == []
