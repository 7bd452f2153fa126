"""Paths that a user gives: which options expand them, and what is said of those not found."""

from pathlib import Path

import pytest

from moco.command import cli, judge, train
from moco.command.paths import PATHS
from moco.config import TrainConfig, UserError
from moco.judge_config import (
    EmbedConfig,
    EvalDataConfig,
    ExportConfig,
    JudgeConfig,
    KNNConfig,
    LinearConfig,
    SearchConfig,
    SelectConfig,
)

pytestmark = pytest.mark.usefixtures("in_tmp")

COMMANDS = {
    "train": (TrainConfig, train.EXTRAS),
    "knn": (EvalDataConfig, judge.flat_options(JudgeConfig, KNNConfig)),
    "linear": (EvalDataConfig, judge.flat_options(JudgeConfig, LinearConfig)),
    "export": (judge.Nothing, judge.flat_options(ExportConfig)),
    "embed": (EvalDataConfig, judge.flat_options(EmbedConfig)),
    "search": (judge.Nothing, judge.flat_options(SearchConfig)),
    "select": (judge.Nothing, judge.flat_options(SelectConfig)),
}
NEEDED = {"export": ["--checkpoint=a", "--output=b", "--format=timm"]}
NEEDED |= {"embed": ["--checkpoint=a", "--output=b", "--index"], "search": ["--index=a"]}
NEEDED["select"] = ["--index=a", "--count=1"]
NO_PATHS = {"model.backbone", "data.pairs", "run.wandb_project", "backbone", "license", "config"}


def texts(command: str) -> set[str]:
    """Names of the options that take any text."""
    parser = cli.build_parser("A test.", *COMMANDS[command])
    return {a.dest for a in parser._actions if getattr(a, "_typehint", a.type) is str}


def value(command: str, name: str, *argv: str) -> str:
    config, extra = cli.parse(cli.build_parser("A test.", *COMMANDS[command]), COMMANDS[command][0],
                              [*NEEDED.get(command, []), *argv])  # fmt: skip
    group, _, field = name.rpartition(".")
    found = getattr(getattr(config, group), field) if group else extra[name]
    if isinstance(found, list):  # where an option takes several paths, it is given one here
        (found,) = found
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_holds_a_path_is_expanded(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    found = texts(command) - NO_PATHS
    assert found and found <= PATHS
    for name in found:
        assert value(command, name, f"--{name}=~/x") == "/home/me/x"
        assert value(command, name, f"--{name}", "$DATA/x") == "/data/x"
        assert value(command, name, f"--{name}=${{DATA}}x/~") == "/datax/~"


def test_paths_of_recipes_and_recipes_themselves_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine.yaml").write_text("run: {dir: ~/x}\ndata: {root: $HOME/y}\n")
    assert value("train", "run.dir", "--config=~/mine.yaml") == f"{tmp_path}/x"
    assert value("train", "data.root", "--config", "$HOME/mine.yaml") == f"{tmp_path}/y"


@pytest.mark.parametrize(
    ("path", "said"),
    [("$NO_SUCH/x", "$NO_SUCH is no variable"), ("x/${NO_SUCH}", "${NO_SUCH} is no variable"),
     ("~no-such-user/x", "~no-such-user is no user")],
)  # fmt: skip
def test_a_name_that_stays_is_said_unless_it_is_there(path, said, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(UserError) as error:
        value("train", "run.dir", "--run.dir", path)
    assert (
        str(error.value)
        == f"run.dir is {path!r}, and {said} that is known here: write the path out"
    )
    Path(path).mkdir(parents=True)
    assert value("train", "run.dir", "--run.dir", path) == path


def test_a_relative_root_of_a_judged_checkpoint_says_whence_it_came():
    Path("weights.ckpt").touch()
    words = ["--checkpoint", "weights.ckpt"]
    stored = {"dataset": "folder", "root": "images"}
    with pytest.raises(UserError, match="data.root 'images' came from the checkpoint and is not"):
        judge.read_settings(words, KNNConfig, "A test.")[2](stored)
    given = [*words, "--data.root", "elsewhere"]
    assert judge.read_settings(given, KNNConfig, "A test.")[2](stored).root == "elsewhere"
