"""The shape of the code: who may import whom, what starts without torch, what every room owes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
FILES = sorted((ROOT / "moco").glob("*.py"))

# Top to bottom: a room imports only what stands below it. A new room gets its place here.
ORDER = (
    "run",
    "decide",
    "report",
    "evaluate",
    "gallery",
    "bench",
    "finetune",
    "probe",
    "monitor",
    "pretrain",
    "export",
    "formats",
    "modelcard",
    "knn",
    "search",
    "guard",
    "explain",
    "ranks",
    "data",
    "labelled",
    "resident",
    "badfiles",
    "workers",
    "sources",
    "folders",
    "decode",
    "views",
    "draws",
    "checkpoint",
    "architecture",
    "layouts",
    "files",
    "matching",
    "encoder",
    "optim",
    "contrast",
    "distributed",
    "random",
    "saving",
    "tracking",
    "rundir",
    "launch",
    "cli",
    "config",
)
TENSORS_ONLY = ("contrast", "distributed", "encoder", "optim", "views", "draws", "random")
WITHOUT_TORCH = ("config", "cli", "launch", "rundir", "__init__")
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
TORCH = {"torch", "torchvision", "timm", "torchmetrics"} | LIGHTNING


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of what a file imports; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _outside_functions(tree) if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def _outside_functions(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _outside_functions(node)


def packages(path: Path, top_level_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, top_level_only)}


def rooms(path: Path) -> set[str]:
    """Rooms of moco that a file imports."""
    stems = {p.stem for p in FILES}
    names = {name.split(".")[1] for name in imports(path) if name.startswith("moco.")}
    return names & stems


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_a_room_imports_only_rooms_below(path):
    if path.stem == "__init__":
        return
    assert path.stem in ORDER, f"give {path.stem} its place in ORDER"
    place = ORDER.index(path.stem)
    above = [room for room in rooms(path) if room in ORDER[: place + 1]]
    assert not above, f"{path.stem} imports {above}, which stand above it"


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_no_room_imports_a_script_or_a_test(path):
    outside = {p.stem for p in ROOT.glob("*.py")} | {"tests", "benchmarks", "configs"}
    assert not packages(path) & outside


@pytest.mark.parametrize("name", TENSORS_ONLY)
def test_rooms_of_tensors_know_no_lightning(name):
    assert not packages(ROOT / "moco" / f"{name}.py") & LIGHTNING


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_rooms_of_settings_know_no_torch(name):
    assert not packages(ROOT / "moco" / f"{name}.py") & TORCH


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_scripts_bring_torch_only_when_the_settings_stand(path):
    assert not packages(path, top_level_only=True) & TORCH
    light = {f"moco.{name}" for name in WITHOUT_TORCH} | {"moco"}
    heavy = {
        name
        for name in imports(path, top_level_only=True)
        if name.startswith("moco.") and not any(name.startswith(room) for room in light - {"moco"})
    }
    assert not heavy


def python(code: str) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_import_moco_does_not_import_torch():
    python(
        "import sys, moco, moco.config, moco.cli, moco.rundir\n"
        "assert not {'torch', 'numpy', 'timm', 'pytorch_lightning'} & set(sys.modules)"
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_help_does_not_import_torch(path):
    python(
        "import runpy, sys\n"
        f"sys.argv = ['{path.name}', '--help']\n"
        f"try: runpy.run_path('{path.name}', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'numpy', 'timm', 'pytorch_lightning'} & set(sys.modules)"
    )


def test_what_moco_exports_exists():
    import moco

    for name in moco.__all__:
        assert getattr(moco, name).__module__.startswith("moco."), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moco.no_such_name


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=by_name)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the file opens with what it is"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_public_signatures_are_typed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            plain = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if node.returns is None or any(a.annotation is None for a in plain):
                missing.append(node.name)
    assert missing == []


def test_lines_are_at_most_100_characters():
    texts = [*FILES, *ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_device_and_dtype_come_from_tensors(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"line {n.lineno}: .{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and n.attr == "cuda" and isinstance(n.ctx, ast.Load)
        if not (isinstance(n.value, ast.Name) and n.value.id == "torch")
    ]
    assert found == []
