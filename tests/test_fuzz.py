"""Random configurations end with exit code 0 or 2, without a traceback and without a hang.

Each case is drawn from its own seed, so a failure names what repeats it. Most values lie near the
edges of their range or beyond. A case that is accepted trains for two steps on handwritten digits.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import warnings
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from processes import finish, start

import train
from moco.config import RunError, TrainConfig, UserError

ROOT = Path(__file__).parent.parent
CASES = int(os.environ.get("MOCO_FUZZ_CASES", "20"))  # a few in ten are accepted and train
BASE = {
    "model.backbone": "resnet10t", "model.stem": "cifar", "model.width": 0.125,
    "model.embedding_dim": 16, "model.queue_size": 256, "model.bn_splits": 2,
    "data.dataset": "digits", "data.channels": 1, "data.image_size": 8, "data.batch_size": 16,
    "trainer.accelerator": "cpu", "trainer.precision": "32-true", "run.knn_every": 0,
    "run.report": False,
}  # fmt: skip
V3_BASE = BASE | {
    "model.head": "mlp_bn", "model.predictor": "mlp", "model.queue_size": 0,
    "model.symmetric": "sum", "optim.name": "lars", "data.views": "v3",
}  # fmt: skip
FIXED = {
    # These say where and for how long a run trains, which chance must not decide.
    "run.dir", "run.wandb", "run.wandb_project", "run.tensorboard", "run.mlflow", "data.root",
    "data.download",
    "trainer.max_steps", "trainer.max_epochs", "trainer.devices", "trainer.accelerator",
    "data.worker_timeout", "data.num_workers", "model.width",
}  # fmt: skip
STRANGE = [
    "", " ", "null", "true", "-1", "0", "1e-3", "1e400", "nan", "-inf", "[]", "[1,2", "{}",
    "{a: b}", "!!python/object:os.system x", "99999999999999999999", "0x10", "1_000", "ä",
    "\u202e", "a\nb", "--data.root", "'", '"', "%s", "${HOME}", "../../x", "resnet5O", "*", "&a",
    "1,2", "[[1]]",
]  # fmt: skip


def fields() -> dict[str, tuple[Any, Any]]:
    """Map the dotted name of every setting to its type and limits."""
    found = {}
    for group, kind in get_type_hints(TrainConfig).items():
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            found[f"{group}.{item.name}"] = (hints[item.name], item.metadata)
    return found


def value(chance: random.Random, kind: Any, limits: Any) -> Any:
    """Draw a value: mostly of the right type, in range or just beyond, and at times strange."""
    if chance.random() < 0.15:
        return chance.choice(STRANGE)
    if get_origin(kind) is Literal:
        return chance.choice(get_args(kind))
    if get_origin(kind) is list:
        return [value(chance, get_args(kind)[0], {}) for _ in range(chance.randrange(2))]
    options = [k for k in get_args(kind) if k is not type(None)] or [kind]
    if len(get_args(kind)) > 1 and chance.random() < 0.3:
        return "auto" if Literal["auto"] in options else None
    if options[0] is bool:
        return chance.random() < 0.5
    if options[0] is str:
        return chance.choice(["resnet10t", "test_vit", "test_byobnet", "no_such_net", "x"])
    low = limits.get("at_least", limits.get("above", -1))
    high = min(limits.get("at_most", low + 100), low + 100)
    if options[0] is int:
        return chance.choice([low - 1, low, low + 1, chance.randint(int(low), int(high)), 16, 64])
    return chance.choice([low - 0.1, low, low + 1e-9, high, chance.uniform(low, high), 0.5])


def settings(seed: int) -> dict[str, Any]:
    """Draw a configuration: the base of v2, or every other time of v3, with one to four changed."""
    chance = random.Random(seed)
    known = fields()
    chosen = dict(V3_BASE if seed % 2 else BASE)
    for name in chance.sample(sorted(set(known) - FIXED), chance.choice([1, 1, 2, 4])):
        chosen[name] = value(chance, *known[name])
    return chosen


def arguments(seed: int, folder: Path) -> list[str]:
    """Write each setting of a configuration into a YAML file or as an option, by chance."""
    chance = random.Random(-seed)
    chosen, recipe, options = settings(seed), {}, []
    for name, setting in chosen.items():
        if chance.random() < 0.5:
            group, field = name.split(".")
            recipe.setdefault(group, {})[field] = setting
        else:
            text = yaml.safe_dump(setting, default_flow_style=True).removesuffix("...\n").strip()
            options.append(f"--{name}={setting if isinstance(setting, str) else text}")
    path = folder / f"{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["--config", str(path), *options, "--trainer.max_steps", "2", "--run.dir", f"run{seed}"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("moco"), "disabled", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("part", range(2))
def test_random_configurations_train_or_are_refused_in_one_line(tmp_path, part):
    trained = refused = 0
    for seed in range(part * CASES // 2, (part + 1) * CASES // 2):
        words = arguments(seed, tmp_path)
        try:
            result = train.main(words)
        except UserError as error:
            refused += 1
            assert str(error).strip(), words
            assert not Path(f"run{seed}/checkpoints").exists(), words
        except RunError as error:  # a learning rate of 100 may end in numbers that are not finite
            assert "not finite" in str(error), words
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {words}: {error!r}") from error
        else:
            trained += 1
            if "steps" not in result:  # a plan takes none, and leaves nothing
                assert "run.plan" in " ".join(words) and not Path(f"run{seed}").exists(), words
                continue
            assert result["steps"] == 2, words
            torch.load(result["checkpoint"], weights_only=True)
    assert trained > 1 and refused > 1, "both ends are met"


@pytest.mark.parametrize("seed", [1001, 1002])
def test_from_the_outside_exit_codes_are_0_or_2_and_errors_one_line(tmp_path, seed):
    words = arguments(seed, tmp_path)
    code, out, err = finish(start(*words))
    assert code in (0, 2), err
    assert "Traceback" not in err
    if code == 2:
        assert not out and err.count("\n") == 1 and err.startswith("error: "), err


MANGLED = [
    ["--config"], ["--config", "/"], ["--config="], ["--"], ["-x"], ["x"], [""], ["--resume"],
    ["--resume="], ["--resume", "\x00"], ["--model.width"], ["--model.width", "1", "2"],
    ["--model"], ["--model", "{width: 1}"], ["--model.width.x", "1"], ["--config", "/dev/null"],
    ["--print_config"], ["--resume", "auto", "--init_from", "x"], ["--run.dir", "\x00"],
    ["--run.dir", "x" * 5000], ["--optim.milestones", "[1,[2]]"],
    ["--run.seed", "-1"], ["--run.seed", "4294967296"], ["--init_from", "/"],
    ["--init_from", "/etc/hostname"], ["--config", "/etc/hostname"], ["--data.mean", "[nan]"],
]  # fmt: skip


@pytest.mark.parametrize("words", MANGLED, ids=str)
def test_mangled_command_lines_are_refused(words):
    base = [f"--{name}={setting}" for name, setting in BASE.items()]
    with pytest.raises((UserError, SystemExit)) as caught:
        result = train.main([*base, "--trainer.max_steps", "1", *words])
        if words == ["--config", "/dev/null"] or words[0].startswith("--resume="):
            assert result["steps"] == 1  # an empty recipe or resume changes nothing
            raise UserError("")
    if isinstance(caught.value, SystemExit):
        assert caught.value.code in (0, 2)
