"""What is installed: every wing, the recipes inside, one version, and types for checkers."""

import ast
import re
import subprocess
import tomllib

import yaml
from processes import ROOT

import moco
from moco.command import paths
from moco.reports import facts

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUP = PROJECT["tool"]["setuptools"]


def test_every_package_is_installed():
    found = {"moco"} | {f"moco.{p.parent.name}" for p in (ROOT / "moco").glob("*/__init__.py")}
    assert {*SETUP["packages"]} == found | {"moco.configs"}


def test_recipes_are_installed_from_where_they_lie(tmp_path, monkeypatch):
    assert SETUP["package-dir"] == {"moco.configs": "configs"}
    assert SETUP["package-data"]["moco.configs"] == ["*.yaml"]
    files = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
    assert paths.recipes() == files, "in a checkout"
    room = tmp_path / "moco" / "command" / "paths.py"
    (tmp_path / "moco" / "configs").mkdir(parents=True)
    (tmp_path / "moco" / "configs" / "one.yaml").touch()
    monkeypatch.setattr(paths, "__file__", str(room))
    assert list(paths.recipes()) == ["one"], "where it was installed"


def test_there_is_one_version():
    version = PROJECT["project"]["version"]
    assert moco.__version__ == version
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version


def test_type_checkers_see_what_python_does():
    tree = ast.parse((ROOT / "moco" / "__init__.py").read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in branch.body for name in node.names}
    assert seen == moco._HOME
    assert (ROOT / "moco" / "py.typed").exists() and SETUP["package-data"]["moco"] == ["py.typed"]
    checked = PROJECT["tool"]["pyright"]["include"]
    assert [path for path in checked if not (ROOT / path).exists()] == []


def test_the_lock_has_all_that_is_required_within_the_bounds():
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for line in re.sub(r"#.*", "", text).split():
        wanted = Requirement(line)
        pins = [r for r in locked if r.name.lower() == wanted.name.lower()]
        assert pins, wanted.name
        for pin in pins:
            assert wanted.specifier.contains(str(pin.specifier).removeprefix("==")), str(pin)
    assert "://" not in "".join(lines)


def test_an_installed_package_does_not_tell_the_commit_of_the_project_around_it(
    tmp_path, monkeypatch
):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    room = tmp_path / "facts.py"
    room.touch()
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(facts, "__file__", str(room))
    assert facts._commit() == ""
    git("add", "facts.py")
    git("commit", "-m", "ours")
    assert len(facts._commit()) >= 7


def test_what_is_no_code_is_installed_too():
    inside = {p.parent.name for p in (ROOT / "moco").rglob("*.html")}
    assert inside == {"reports"}
    assert SETUP["package-data"]["moco.reports"] == ["*.html"]
