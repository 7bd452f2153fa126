"""The command line: what it accepts, what its help says, and how it ends on wrong input."""

import dataclasses
import json
import os
import typing
import zipfile
from pathlib import Path

import pytest
import yaml
from processes import ROOT, finish, start, start_command

from moco.checks import check
from moco.command import cli, train
from moco.config import DataConfig, ModelConfig, TrainConfig, UserError
from moco.run_directory import write_config

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def parse(*argv: str) -> tuple[TrainConfig, dict]:
    return cli.parse(cli.build_parser("A test.", TrainConfig, train.EXTRAS), TrainConfig, argv)


def refusal(*argv: str) -> str:
    """Return the one line that a user sees."""
    with pytest.raises(UserError) as caught:
        check(parse(*argv)[0])
    return cli._fold(caught.value)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str | bytes, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# What it takes


def test_nothing_given_is_the_defaults():
    defaults = {name: options["default"] for name, options in train.EXTRAS.items()}
    assert parse() == (TrainConfig(), defaults)


def test_values_of_every_kind():
    config, extra = parse(
        "--model.temperature", "0.07", "--model.queue_size=4096", "--optim.nesterov", "true",
        "--optim.milestones", "[3, 5]", "--data.mean=[0.5,0.5,0.5]", "--data.crop_min", "0.3",
        "--data.flip", "null", "--model.head", "linear", "--data.root", "123", "--resume", "auto",
    )  # fmt: skip
    assert config.model.temperature == 0.07 and config.model.queue_size == 4096
    assert config.optim.nesterov is True and config.optim.milestones == [3, 5]
    assert config.data.mean == [0.5] * 3 and config.data.crop_min == 0.3
    assert config.data.flip is None and config.model.head == "linear"
    assert config.data.root == "123" and extra["resume"] == "auto"


@pytest.mark.parametrize("root", ["null", "true", "a: b", "[x]", "-", "bilder/größe 1", "a=b"])
def test_paths_stay_text(root):
    assert parse(f"--data.root={root}")[0].data.root == root


def test_later_ones_win(recipe):
    first = recipe("model: {temperature: 0.5, head: linear}\n", "a.yaml")
    second = recipe("model:\n  temperature: 0.6\n", "b.yaml")
    config, _ = parse("--config", first, f"--config={second}", "--model.embedding_dim", "64")
    assert config.model == ModelConfig(temperature=0.6, head="linear", embedding_dim=64)
    assert parse("--config", second, "--config", first)[0].model.temperature == 0.5
    assert parse("--config", first, "--model.temperature", "1")[0].model.temperature == 1
    assert parse("--model.temperature", "1", "--config", first)[0].model.temperature == 1


def test_a_recipe_of_comments_is_the_defaults(recipe):
    assert parse("--config", recipe("# nothing yet\n"))[0] == TrainConfig()
    assert parse("--config", recipe(""))[0] == TrainConfig()


def test_yaml_numbers_without_a_point(recipe):
    """PyYAML reads 5e-4 as text; a recipe may still write it."""
    config, _ = parse("--config", recipe("optim:\n  weight_decay: 5e-4\n  lr: 1\n"))
    assert config.optim.weight_decay == 5e-4 and config.optim.lr == 1.0


def test_on_off_yes_and_no_are_what_the_setting_takes(recipe):
    """PyYAML reads them as truth values, which a choice between words is not."""
    text = "model: {compile: on}\ndata: {resident: off}\nrun: {wandb: yes, report: no, dir: no}\n"
    config, _ = parse("--config", recipe(text))
    assert (config.model.compile, config.data.resident, config.run.dir) == ("on", "off", "no")
    assert (config.run.wandb, config.run.report) == (True, False)
    for said, is_meant in (("no", False), ("'no'", False), ("off", False), ("yes", True)):
        _, extra = parse("--config", recipe(f"allow_partial: {said}\nyes: {said}\n"))
        assert (extra["allow_partial"], extra["yes"]) == (is_meant, is_meant), said
    assert "give true or false" in refusal("--config", recipe("allow_partial: nope\n"))
    assert parse("--yes", "--allow_partial", "--run.dir", "x")[1]["allow_partial"] is True


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_stands(path):
    config, _ = parse("--config", str(path), "--data.root", "somewhere")
    check(config)


def test_recipes_hold_differences_only():
    default, same = dataclasses.asdict(TrainConfig()), []
    for path in CONFIGS:
        config = dataclasses.asdict(parse("--config", str(path))[0])
        for group, fields in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            named = [field for field in fields if config[group][field] == default[group][field]]
            same += [f"{path.stem}: {group}.{field}" for field in named]
    assert same == []


def test_option_values():
    words = ["--config", "a", "--x", "1", "--config=b=c", "--config", "d", "--config"]
    assert cli.option_values(words, "--config") == ["a", "b=c", "d"]
    assert cli.option_values([], "--config") == []


# What it teaches


@pytest.fixture(scope="module")
def help_text() -> str:
    code, out, err = finish(start("--help", COLUMNS="200"))
    assert code == 0 and err == ""
    return " ".join(out.split())


def test_help_lists_every_field_with_its_meaning(help_text):
    for group, kind in typing.get_type_hints(TrainConfig).items():
        for item in dataclasses.fields(kind):
            assert f"--{group}.{item.name} " in help_text
            assert " ".join(item.metadata["meaning"].split()) in help_text, item.name
    for name, options in train.EXTRAS.items():
        assert f"--{name} " in help_text and options["help"] in help_text


def test_help_gives_ranges_defaults_and_choices(help_text):
    assert "0.2 in v2 [above 0, at most 100] (type: float, default: 0.2)" in help_text
    assert "[at least 0, at most 1]" in help_text
    assert "--model.head {linear,mlp,mlp_bn,mlp_bn_affine}" in help_text
    assert "usage: train.py --config RECIPE.yaml" in help_text


def test_print_config_gives_a_recipe_that_says_the_same(recipe):
    words = ["--config", QUICKSTART, "--print_config", "--model.temperature", "0.3"]
    code, out, err = finish(start(*words))
    assert code == 0 and err == ""
    expected, _ = parse("--config", QUICKSTART, "--model.temperature", "0.3")
    assert expected.model.temperature == 0.3
    assert parse("--config", recipe(out))[0] == expected
    printed = yaml.safe_load(out)
    for group, values in dataclasses.asdict(expected).items():
        assert set(printed[group]) == set(values)


# Wrong input, in this process

ARGUMENTS = {
    "a misspelt field": (["--model.temprature", "1"], "--model.temperature"),
    "a field in another case": (["--Model.Temperature", "1"], "--model.temperature"),
    "a field without its group": (["--batch_size=8"], "--data.batch_size"),
    "a field of another group": (["--model.batch_size", "8"], "--data.batch_size"),
    "an unknown field": (["--foo", "1"], "unknown option --foo"),
    "a group": (["--model", "x"], "--model"),
    "a stray word": (["quickstart"], "quickstart"),
    "a stray flag": (["-x"], "-x"),
    "a missing value": (["--model.temperature"], "--model.temperature"),
    "a value behind a recipe": (["--run.seed", "--config", QUICKSTART, "3"], "run.seed: expected"),
    "a value like an option": (["--data.root", "-dash"], "write --data.root=-dash"),
    "no number": (["--model.temperature", "warm"], "model.temperature is 'warm': give a number"),
    "an empty number": (["--model.temperature="], "model.temperature is '': give a number"),
    "a fraction": (["--model.bn_splits", "2.5"], "model.bn_splits is '2.5': give a whole number"),
    "no boolean": (["--optim.nesterov", "maybe"], "optim.nesterov is 'maybe': give true or false"),
    "no choice": (["--model.head", "lin"], "model.head is 'lin': give one of 'linear', 'mlp'"),
    "no list": (["--optim.milestones", "3"], "optim.milestones is '3': give a list"),
    "no list of numbers": (["--optim.milestones", "[a]"], "optim.milestones"),
    "no optional number": (["--data.crop_min", "x"], "data.crop_min is 'x': give a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_named(name):
    argv, part = ARGUMENTS[name]
    assert part in refusal(*argv)


RECIPES = {
    "a misspelt field": ("model:\n  temprature: 1\n", "model.temperature"),
    "a misspelt group": ("modle:\n  temperature: 1\n", "modle"),
    "a field outside its group": ("temperature: 1\n", "model.temperature"),
    "a key twice": ("model:\n  head: mlp\n  head: linear\n", "head is given twice"),
    "a group twice": ("model:\n  head: mlp\nmodel:\n  stem: cifar\n", "model is given twice"),
    "an empty group": ("model:\n", "model is a group"),
    "a value for a group": ("model: resnet50\n", "model is a group"),
    "a list": ("[1, 2]\n", "holds no settings"),
    "a word": ("resnet50\n", "holds no settings"),
    "a tab": ("model:\n\thead: mlp\n", "line 2"),
    "an open bracket": ("model: {head: mlp\n", "line"),
    "two documents": ("model: {head: mlp}\n---\nmodel: {head: mlp}\n", "document"),
    "no text": (b"\xff\xfe\x00model", "utf-8"),
    "a Python object": ("model: !!python/object/apply:os.getcwd []\n", "python/object"),
    "an endless alias": ("model: &a\n  head: *a\n", "line"),
    "a list as a key": ("? [a]\n: 1\n", "no setting's name"),
    "a list as a text": ("model:\n  backbone: [resnet18]\n", "model.backbone"),
    "a mapping as a number": ("model:\n  temperature: {a: 1}\n", "model.temperature"),
    "a recipe inside": ("config: other.yaml\n", "config"),
    "null for a number": ("model:\n  temperature: null\n", "model.temperature"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipes_are_named(name, recipe):
    text, part = RECIPES[name]
    line = refusal("--data.dataset", "digits", "--config", recipe(text))
    assert part in line and "\n" not in line


def test_a_recipe_that_does_not_exist_names_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "configs/quickstart.yaml" in refusal("--config", "configs/quikstart.yaml")
    assert "did you mean configs/quickstart.yaml" in refusal("--config", "quikstart")
    assert "does not exist" not in refusal("--config", "configs")
    assert refusal("--config", "elsewhere/zzz.yaml").endswith("there are " + ", ".join(
        path.stem for path in sorted(Path("configs").glob("*.yaml"))
    ))  # fmt: skip


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no regular file: write it to one"):
        train.main(["--config", str(tmp_path / "pipe")])


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume="], ["--init_from", ""]])
def test_what_a_shell_does_not_know_is_no_new_run(words):
    with pytest.raises(
        UserError, match=f"{words[0].strip('=')} is empty: name a run or a file, or"
    ):
        train.main([*words, "--config", "quickstart"])


def test_a_recipe_that_comes_along_is_found_by_its_name_from_anywhere(in_tmp):
    words = ["--config", "quickstart", "--data.batch_size", "32"]
    config, _ = cli.parse(cli.build_parser("", TrainConfig, {}), TrainConfig, words)
    assert (config.data.dataset, config.data.batch_size) == ("digits", 32)
    assert "did you mean quickstart?" in refusal("--config", "quikstart")
    Path("quickstart").write_text("data:\n  dataset: cifar10\n")  # a file of that name comes first
    config, _ = cli.parse(cli.build_parser("", TrainConfig, {}), TrainConfig, words)
    assert config.data.dataset == "cifar10"


def test_recipes_are_listed(in_tmp, capsys):
    from moco.command.recipe_list import main

    assert "quickstart" in main([])["recipes"]
    line = next(line for line in capsys.readouterr().err.splitlines() if "quickstart" in line)
    assert line.endswith("Quickstart: handwritten digits, embedded in scikit-learn, on a laptop.")
    with pytest.raises(UserError, match="recipes takes no words, and was given 'x'"):
        main(["x"])


def test_a_recipe_beside_no_other_does_not_end_in_the_middle(tmp_path):
    assert not refusal("--config", str(tmp_path / "x.yaml")).endswith("there are ")


# Real processes


COMMANDS = {
    "a misspelt field": (["--model.temprature", "1"], "--model.temperature"),
    "a misspelt recipe": (["--config", "configs/quikstart.yaml"], "configs/quickstart.yaml"),
    "no number": (["--config", QUICKSTART, "--model.temperature", "warm"], "model.temperature"),
    "a run that is not there": (["--resume", "nowhere"], "--resume nowhere"),
    "a missing folder": (["--data.root", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_ends_with_2_and_one_line(name):
    argv, part = COMMANDS[name]
    code, out, err = finish(start(*argv, cwd=ROOT))
    assert code == 2 and out == ""
    *before, line = err.splitlines()
    assert line.startswith("error: ") and part in line and "Traceback" not in err
    # What torch has to find out comes after the lines that say what happens.
    assert not before or before[0].startswith("importing torch")


RUN = ["--data.dataset", "digits", "--trainer.accelerator", "cpu"]
FOLDER = ["--data.dataset", "folder", "--data.root"]
KNN = ["--checkpoint", "run/checkpoints/last.ckpt", "--accelerator", "cpu"]
EXPORT = ["--checkpoint", "file", "--format", "timm", "--output"]
WITHOUT_TORCH = [  # command, words, part of the answer
    ("train", ["--model.temprature", "1"], "unknown option"),
    ("train", ["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ("train", ["--model.head", "lin"], "model.head is 'lin'"),
    ("train", ["--model.stem", "patches"], "'imagenet', 'cifar', 'patch'"),
    ("train", [*RUN, "--model.temperature", "-1"], "model.temperature is -1"),
    ("train", [*RUN, "--model.queue_size", "8"], "model.queue_size 8 is below"),
    ("train", [*RUN, "--model.backbone", "resnet5O"], "did you mean 'resnet50'?"),
    ("train", [*RUN, "--run.dir", "run"], "run.dir run holds a run already"),
    ("train", [*RUN, "--run.dir", "file/run"], "file/run cannot be written (Not a directory)"),
    ("train", [*RUN, "--run.dir", "/proc/run"], "/proc/run cannot be written"),
    ("train", [*RUN, "--trainer.devices", "999"], "trainer.devices is 999 but there are"),
    ("train", [*RUN, "--trainer.precision", "16-mixed"], "trainer.precision is 16-mixed"),
    ("train", [*RUN, "--init_from", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
    ("train", [*RUN, "--run.knn_root", "nowhere"], "run.knn_root 'nowhere' does not exist"),
    ("train", [*FOLDER, "empty", "--data.pairs", "(a"], "data.pairs '(a' is no regular expression"),
    ("train", ["--resume", "nowhere"], "--resume nowhere does not exist"),
    ("train", ["--resume", "run", "--trainer.max_epochs", "400"], "trainer.max_epochs is 400"),
    ("train", [*FOLDER, "nowhere"], "data.root 'nowhere' does not exist"),
    ("train", [*FOLDER, "file"], "data.root 'file' is a file"),
    ("train", [*FOLDER, "empty"], "data.root 'empty' holds no images"),
    ("train", [*FOLDER, "empty", "--data.files", "nowhere"], "data.files 'nowhere' cannot be read"),
    ("train", [*FOLDER, "empty", "--data.labels", "no.csv"], "data.labels 'no.csv' cannot be read"),
    ("train", ["--data.dataset", "cifar10", "--data.root", "nowhere"], "'nowhere' does not exist"),
    ("knn", ["--checkpoint", "nowhere"], "nowhere does not exist"),
    ("knn", ["--checkpoint", "run"], "give run/checkpoints/last.ckpt"),
    ("knn", [*KNN, "--output", "nowhere"], "nowhere is no directory to write in"),
    ("knn", [*KNN, "--backbone", "resnet5O"], "did you mean 'resnet50'?"),
    ("knn", [*KNN, "--devices", "999"], "devices is 999 but there are"),
    ("linear", [*KNN, *FOLDER, "nowhere"], "data.root 'nowhere' does not exist"),
    ("export", ["--checkpoint", "nowhere", *EXPORT[2:], "x"], "nowhere does not exist"),
    ("export", [*EXPORT, "nowhere/x"], "there is no directory nowhere"),
    ("export", [*EXPORT, "file"], "--output file exists"),
    ("export", [*EXPORT, "/proc/x"], "--output /proc/x cannot be written"),
    ("export", [*EXPORT, "x", "--license", "my own"], "--license 'my own'"),
    ("export", [*EXPORT, "x", "--backbone", "resnet5O"], "did you mean 'resnet50'?"),
]


def test_what_needs_no_torch_to_be_seen_is_told_before_it_is_imported(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "last.ckpt", "w") as archive:
        archive.writestr("data.pkl", "")
    settings = TrainConfig(data=DataConfig(dataset="digits"))
    write_config(settings, {}, tmp_path / "run")
    code = (
        "import json, sys\nfrom importlib import import_module\n"
        "from moco.config import UserError\n"
        "for command, argv, _ in json.loads(sys.argv[1]):\n"
        "    try: import_module(f'moco.command.{command}').main(argv)\n"
        "    except UserError as error: print(error)\n"
        "    assert 'torch' not in sys.modules, argv\n"
    )
    words = ("-c", code, json.dumps(WITHOUT_TORCH))
    ended, out, err = finish(start_command(*words, cwd=tmp_path, PYTHONPATH=str(ROOT)))
    assert ended == 0, err
    for said, (_, argv, part) in zip(out.splitlines(), WITHOUT_TORCH, strict=True):
        assert part in said, argv


def test_config_takes_no_plain_data_config():
    """`parse` returns the dataclasses themselves, its groups too."""
    config, _ = parse("--data.dataset", "digits")
    assert isinstance(config, TrainConfig) and isinstance(config.data, DataConfig)
