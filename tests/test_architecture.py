"""The shape of the code: who may import whom, what starts without torch, what every room owes."""

import ast
import re
from pathlib import Path

import pytest
from processes import ROOT, finish, start_command

SCRIPTS = sorted(ROOT.glob("*.py"))
FILES = sorted((ROOT / "moco").rglob("*.py"))

# A wing to those that it may import besides itself and the ground; docs/architecture.md draws it.
# Inside a wing rooms import one another without a cycle.
GROUND = (
    "config",
    "pixels",
    "judge_config",
    "checks",
    "idle",
    "random",
    "distributed",
    "rendezvous",
    "run_directory",
    "whole_files",
    "slurm",
    "log",
)
WINGS = {
    "command": (),
    "algorithm": (),
    "images": ("algorithm",),
    "checkpoints": ("algorithm",),
    "evaluation": ("algorithm", "images", "checkpoints"),
    "reports": ("algorithm", "images", "checkpoints", "evaluation"),
    "training": ("algorithm", "images", "checkpoints", "evaluation", "reports"),
}
WITHOUT_LIGHTNING = (
    *("algorithm.batch", "algorithm.contrast", "algorithm.encoder"),
    *("distributed", "rendezvous"),
    # The images' loader is Lightning's DataModule; evaluation does without both.
    *(f"images.{p.stem}" for p in (ROOT / "moco/images").glob("*.py") if p.stem != "loader"),
)
WITHOUT_TORCH = (
    *("slurm", "config", "pixels", "judge_config", "checks", "idle", "run_directory", "log"),
    *("whole_files", "command"),
    *("algorithm.names", "checkpoints.places", "training.resuming", "reports.facts"),
    *("images.folders", "images.splits", "images.formats", "images.labels", "images.dicom"),
    *("reports.table", "reports.index", "reports.mapping", "reports.layout"),
    *("reports.search", "reports.select"),
    *("images.patterns", "images.stores", "images.shard_index", "images.shard_headers"),
    *("images.cache", "images.packing"),
    *("images.parquet", "images.tables"),
)
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
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue  # read by type checkers alone
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _outside_functions(node)


def packages(path: Path, top_level_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, top_level_only)}


def module(path: Path) -> str:
    """Dotted name of a room below `moco`; a wing's __init__ keeps its own, which holds no code."""
    name = ".".join(path.relative_to(ROOT / "moco").with_suffix("").parts)
    return "config" if name == "config.__init__" else name


def rooms(path: Path, top_level_only: bool = False) -> set[str]:
    """Rooms of moco that a file imports, by their dotted names below `moco`."""
    names = {name.removeprefix("moco.") for name in imports(path, top_level_only)}
    return names & {module(p) for p in FILES}


def wing(room: str) -> str:
    """The wing of a room, or `ground`."""
    first = room.split(".")[0]
    return first if first in WINGS else "ground"


def on_ground(room: str) -> str:
    """The room of the ground, of which only the settings have several files."""
    return room.split(".")[0]


def by_name(path: Path) -> str:
    return path.stem if path.parent == ROOT else module(path)


def test_every_file_is_in_a_wing_or_on_the_ground():
    outside = {"__init__", "__main__", *GROUND}
    assert {on_ground(m) for m in map(module, FILES) if wing(m) == "ground"} <= outside
    folders = {p.name for p in (ROOT / "moco").iterdir() if p.is_dir()} - {"__pycache__"}
    assert folders == {*WINGS, "config"}


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_a_wing_imports_only_wings_below_it(path):
    own = wing(module(path))
    if own == "ground":
        # Permutations come from random, UserError from config; else it stands on nothing.
        allowed = {("distributed", "random"), ("distributed", "config"), ("idle", "config")}
        allowed |= {("rendezvous", "distributed"), ("rendezvous", "config")}
        allowed |= {("run_directory", "config"), ("slurm", "config"), ("idle", "judge_config")}
        allowed |= {("run_directory", "whole_files"), ("whole_files", "config")}
        allowed |= {("judge_config", "config"), ("checks", "config"), ("pixels", "config")}
        name = on_ground(module(path))
        found = {(name, on_ground(room)) for room in rooms(path)} - {(name, name)}
        assert name in ("__init__", "__main__") or found <= allowed
        return
    # A main imports what it runs when its settings stand.
    found = rooms(path, top_level_only=own == "command")
    above = {room for room in found if wing(room) not in (own, "ground", *WINGS[own])}
    assert not above, f"{module(path)} imports {above}, which are not below {own}"


def test_rooms_import_one_another_without_a_cycle():
    waiting = {module(p): rooms(p, top_level_only=True) for p in FILES}
    while free := [room for room, needs in waiting.items() if not needs & waiting.keys()]:
        for room in free:
            del waiting[room]
    assert not waiting, f"a cycle among {sorted(waiting)}"


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_opens_with_what_comes_in_and_what_goes_out(name):
    text = (ROOT / "moco" / name / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(tree.body) == 1, "a docstring and nothing else"
    assert "Comes in:" in text and "Goes out:" in text


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_no_room_imports_a_script_or_a_test(path):
    outside = {p.stem for p in ROOT.glob("*.py")} | {"tests", "benchmarks", "configs"}
    assert not packages(path) & outside


@pytest.mark.parametrize("name", WITHOUT_LIGHTNING)
def test_rooms_of_tensors_know_no_lightning(name):
    path = ROOT / "moco" / f"{name.replace('.', '/')}.py"
    assert not packages(path) & LIGHTNING and "images.loader" not in rooms(path)


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_settings_and_command_line_start_without_torch(path):
    if any(module(path) == name or module(path).startswith(f"{name}.") for name in WITHOUT_TORCH):
        assert not packages(path, top_level_only=True) & TORCH
        heavy = rooms(path, top_level_only=True)
        assert not {room for room in heavy if not room.startswith(WITHOUT_TORCH)}


def test_a_run_needs_no_extra_package():
    """requirements.txt alone is what `make train` installs."""
    lines = (ROOT / "requirements-extra.txt").read_text().splitlines()
    names = {re.split(r"[>=\[ ]", line)[0] for line in lines if line and line[0] != "#"}
    extras = {name.lower().replace("-", "_") for name in names}
    files, seen = {module(path): path for path in FILES}, set()
    waiting = ["command.train", "training.run", "reports.page", "reports.sights"]
    while waiting:
        if (room := waiting.pop()) not in seen:
            seen.add(room)
            found = {name.lower() for name in packages(files[room], top_level_only=True)}
            assert not found & extras, room
            waiting += rooms(files[room], top_level_only=True)
    assert "images.loader" in seen and "pyarrow" in extras


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_scripts_bring_torch_only_when_the_settings_stand(path):
    assert not packages(path, top_level_only=True) & TORCH
    heavy = rooms(path, top_level_only=True)
    assert not {room for room in heavy if not room.startswith(WITHOUT_TORCH)}


def python(code: str) -> None:
    ended, _, err = finish(start_command("-c", code, cwd=ROOT))
    assert ended == 0, err


def test_import_moco_does_not_import_torch():
    python(
        "import sys, moco, moco.config, moco.command.cli, moco.run_directory\n"
        "assert not {'torch', 'numpy', 'timm', 'pytorch_lightning'} & set(sys.modules)"
    )


def test_training_brings_no_library_that_only_some_runs_need():
    """faiss brings an OpenMP runtime of its own beside torch's; the others take seconds."""
    python(
        "import sys, moco.training.run\n"
        "found = {'faiss', 'altair', 'vl_convert', 'openTSNE'} & set(sys.modules)\n"
        "assert not found, found"
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


def test_dir_shows_what_moco_exports():
    import moco

    assert [name for name in dir(moco) if not name.startswith("__")] == moco.__all__


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
    texts = [*FILES, *ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]
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
