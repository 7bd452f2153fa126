"""What `auto` came to: kept beside the settings as asked, and by a run that goes on elsewhere."""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from runs import assert_same_end, at, load, run_tiny, trained

import train
from moco.config import DataConfig, TrainConfig, UserError
from moco.distributed import key_order
from moco.training import decide, hardware
from moco.training.decide import Decided

pytestmark = pytest.mark.usefixtures("in_tmp")

BEFORE = Decided("cuda", 2, 1, "bf16-mixed", "shuffle", "", "device")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, whatever ran before."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def settings(devices: int = 1, **data: object) -> TrainConfig:
    config = TrainConfig(data=DataConfig(dataset="digits", batch_size=32, **data))
    config.trainer.accelerator, config.trainer.devices = "cpu", devices
    return config


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 16)


def test_settings_stay_as_asked(monkeypatch, many_cores):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = settings(devices=0)
    before = copy.deepcopy(config)
    decided = decide.decide(config, 10)
    assert config == before
    assert (decided.devices, decided.num_nodes, decided.world) == (2, 2, 4)
    assert decided.key_bn == "shuffle" and "4 devices" in decided.reasons["key_bn"]
    assert decided.precision in ("bf16-mixed", "32-true") and decided.compile == ""
    assert Decided.from_dict(asdict(decided)) == decided
    before = {k: v for k, v in asdict(decided).items() if k not in ("min_value", "max_value")}
    assert Decided.from_dict(before) == decided  # of a version that knew no range


def test_a_run_stores_both_and_its_config_serves_as_a_recipe(images):
    run_tiny(images, "--trainer.max_steps", "1")
    stored, state = yaml.safe_load(Path("run/config.yaml").read_text()), at(1)
    assert stored["model"]["key_bn"] == state["config"]["model"]["key_bn"] == "auto"
    assert stored["data"]["resident"] == state["config"]["data"]["resident"] == "auto"
    assert stored["decided"] == state["decided"]
    expected = {"key_bn": "split", "resident": "memory", "precision": "32-true", "devices": 1}
    assert {name: state["decided"][name] for name in expected} == expected
    assert train.main(["--config", "run/config.yaml", "--run.dir", "other"])["steps"] == 1
    first, other = load("run/checkpoints/last.ckpt"), load("other/checkpoints/last.ckpt")
    assert all(v.equal(other["state_dict"][k]) for k, v in first["state_dict"].items())


def native(monkeypatch, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)


@pytest.mark.parametrize(
    ("native", "capability", "precision"),
    [
        (True, (8, 0), "bf16-mixed"),  # A100
        (False, (7, 0), "16-mixed"),  # V100
        (False, (7, 5), "16-mixed"),  # T4
        (False, (6, 1), "32-true"),
    ],
)
def test_what_a_gpu_multiplies_decides_on_the_precision(native, capability, precision, monkeypatch):
    monkeypatch.setattr(hardware, "accelerator", lambda config: "cuda")
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(cuda, "get_device_capability", lambda: capability)
    assert hardware.choose_precision(TrainConfig())[0] == precision


def test_apples_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(hardware, "sys", SimpleNamespace(platform="darwin", modules=sys.modules))
    monkeypatch.setattr(hardware, "count_gpus", lambda wanted: 0)
    config = TrainConfig()
    config.trainer.accelerator = "gpu"
    with pytest.raises(UserError, match="MPS"):
        hardware.choose_devices(config)


@pytest.mark.parametrize(
    ("wanted", "reason"), [("gpu", "gpu but torch sees none"), ("auto", "16-mixed on a CPU")]
)
def test_a_gpu_that_is_missing_is_named_before_what_follows_from_it(wanted, reason, monkeypatch):
    monkeypatch.setattr(hardware, "accelerator", lambda config: "cpu")
    config = TrainConfig().changed({"trainer.accelerator": wanted, "trainer.precision": "16-mixed"})
    with pytest.raises(UserError, match=reason):
        hardware.choose_precision(config)


@pytest.mark.parametrize("here", [True, False])
def test_a_resume_on_a_machine_with_other_defaults_ends_in_the_same_bits(
    images, monkeypatch, said, here
):
    """`auto` meant bf16 and resident there, and would mean fp32 and streamed here; or reversed."""
    budget = {True: "4", False: "0"}
    native(monkeypatch, here)
    arguments = ["--trainer.precision", "auto", "--data.resident_budget", budget[here]]
    run_tiny(images, *arguments, "--data.num_workers", "0", run_dir="whole")
    shutil.copytree("whole", "run")
    native(monkeypatch, not here)
    said.clear()
    step = "run/checkpoints/step_000000002.ckpt"
    train.main(["--resume", step, "--data.resident_budget", budget[not here]])
    assert_same_end("whole", "run")
    decided = at(6, "run")["decided"]
    assert decided["precision"] == ("bf16-mixed" if here else "32-true")
    assert decided["resident"] == ("memory" if here else "streamed")
    assert sum("as the run began" in line for line in said) == 4
    assert yaml.safe_load(Path("run/config.yaml").read_text())["decided"] == decided


def test_a_run_without_decisions_decides_anew_and_says_so(images, said):
    trained(images, run_dir="whole")
    state = at(2, "whole")
    del state["decided"]
    Path("run/checkpoints").mkdir(parents=True)
    torch.save(state, "run/checkpoints/last.ckpt")
    stored = yaml.safe_load(Path("whole/config.yaml").read_text())
    del stored["decided"]
    Path("run/config.yaml").write_text(yaml.safe_dump(stored))
    assert train.main(["--resume", "run"])["steps"] == 6
    assert_same_end("whole", "run")
    assert sum("`auto` is decided anew" in line for line in said) == 1


def goes_on(config: TrainConfig, before: Decided, asked: TrainConfig | None = None) -> Decided:
    return decide.decide(config, 10, before, asked or settings())


def test_precision_key_batch_norm_and_images_stay_on_other_devices(many_cores, said):
    decided = goes_on(settings(devices=4), replace(BEFORE, resident="streamed"))
    assert (decided.precision, decided.key_bn) == ("bf16-mixed", "shuffle")
    assert (decided.world, decided.resident) == (4, "streamed")
    assert sum("began on 2 devices and goes on on 4" in line for line in said) == 1
    assert goes_on(settings(devices=2), BEFORE).resident == "memory", "the same numbers"
    one = replace(BEFORE, devices=1, key_bn="split")
    assert goes_on(settings(devices=2), one).key_bn == "split", "groups are groups anywhere"


@pytest.mark.parametrize(
    ("begun", "here", "resident", "place"),
    [
        ("cuda", "cuda", "memory", "memory"),  # for which the GPU had no room
        ("cuda", "cuda", "device", "device"),
        ("cuda", "cpu", "device", "memory"),
        ("cpu", "cuda", "memory", "device"),
    ],
)
def test_images_stay_where_a_run_has_held_them(
    many_cores, monkeypatch, begun, here, resident, place
):
    monkeypatch.setattr(hardware, "accelerator", lambda config: here)
    monkeypatch.setattr(hardware, "count_gpus", lambda wanted: 2)
    before = replace(BEFORE, accelerator=begun, resident=resident)
    assert goes_on(settings(devices=2), before).resident == place


def test_settings_given_anew_have_the_last_word(many_cores, monkeypatch):
    monkeypatch.setattr(hardware, "missing_compiler", lambda on_gpu: "")
    before = replace(BEFORE, compile="inductor")
    decided = goes_on(settings(devices=2), before)
    assert decided.compile == "inductor" and decided.reasons["compile"] == "as the run began"
    config = settings(devices=2, resident="off")
    config.model.compile = "off"
    decided = goes_on(config, before)
    assert decided.compile == "" and decided.reasons["compile"] == "as set"
    assert decided.resident == "", "the setting decides"
    assert decided.reasons["resident"] == "as set"


@pytest.mark.parametrize(
    ("begun", "given", "words"),
    [("memory", "off", "resident, and streamed"), ("off", "memory", "streamed, and resident")],
)
def test_a_resume_that_would_hold_its_images_otherwise_is_refused(images, begun, given, words):
    """Views of decoded images are cut from floats, those of streamed ones from bytes."""
    trained(
        images, "--data.resident", begun, "--data.num_workers", "0", "--trainer.max_epochs", "1"
    )
    before = Path("run/config.yaml").read_text()
    with pytest.raises(UserError, match=f"images are {words} ones .*leave data.resident out"):
        train.main(["--resume", "run/checkpoints/step_000000001.ckpt", "--data.resident", given])
    assert Path("run/config.yaml").read_text() == before


def test_a_resume_whose_images_can_be_read_otherwise_is_refused(copied):
    """One more or less would shift the index of all behind it, and the length of an epoch."""
    first = copied / "00.jpg"
    whole = first.read_bytes()
    first.write_bytes(whole[:200])
    run_tiny(copied, "--data.max_bad_fraction", "0.1", "--trainer.max_epochs", "1")
    assert at(1)["decided"]["images"] == 47
    step = ["--resume", "run/checkpoints/step_000000001.ckpt"]
    first.write_bytes(whole)
    with pytest.raises(UserError, match="48 images can be read, and the run has 47"):
        train.main(step)
    first.write_bytes(whole[:200])
    assert train.main(step)["steps"] == 2


def test_a_finished_run_is_known_by_the_images_that_it_could_read(copied, said):
    """Of 48 files three batches could be made, of 47 only two."""
    (copied / "00.jpg").write_bytes(b"torn")
    run_tiny(copied, "--data.max_bad_fraction", "0.1", "--trainer.max_epochs", "1")
    before = Path("run/run.json").read_text()
    assert train.main(["--resume", "run"])["steps"] == 2
    assert any("is finished after 2 steps" in line for line in said)
    assert Path("run/run.json").read_text() == before
    assert train.main(["--resume", "run", "--extend", "1", "--yes"])["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "devices", "parts"),
    [
        ({"precision": "16-mixed"}, 2, ("16-mixed", "a GPU", "--init_from")),
        ({}, 1, ("2 devices", "trainer.devices 2 or more", "model.key_bn split")),
        ({"compile": "inductor"}, 2, ("no compiler", "install it", "--model.compile off")),
        ({"key_bn": "split"}, 3, ("does not divide by 24",)),
        ({"key_bn": "sync"}, 2, ("is sync", "several CPU processes", "--init_from")),
        ({"query_bn": "sync"}, 2, ("is sync", "several CPU processes", "--init_from")),
    ],
)
def test_what_cannot_go_on_here_is_refused_with_a_remedy(
    changes, devices, parts, many_cores, monkeypatch
):
    monkeypatch.setattr(hardware, "missing_compiler", lambda on_gpu: "compiler")
    with pytest.raises(UserError) as error:
        goes_on(settings(devices=devices), replace(BEFORE, **changes))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("key_bn", ["auto", "sync"])
def test_negatives_of_the_batch_take_sync_where_torch_has_it(many_cores, key_bn, devices):
    config = settings(devices)
    config.model.queue_size, config.model.key_bn, config.model.query_bn = 0, key_bn, "sync"
    decided = decide.decide(config, 10)
    assert decided.key_bn == decided.query_bn == ("sync" if devices == 1 else "plain")
    if devices == 2:
        assert "CPUs" in decided.reasons["key_bn"] and "CPUs" in decided.reasons["query_bn"]


def test_a_checkpoint_that_decided_nothing_about_queries_keeps_its_setting(many_cores):
    stored = asdict(replace(BEFORE, accelerator="cpu", precision="32-true", key_bn="split"))
    del stored["query_bn"]
    config = settings()
    config.model.query_bn = "split"
    assert goes_on(config, Decided.from_dict(stored)).query_bn == "split"


def test_chunks_must_divide_what_a_device_takes():
    config = settings()
    config.data.chunks, config.model.queue_size = 5, 0
    with pytest.raises(UserError, match=r"does not divide by 5 \(1 devices x 5 chunks\): take 30"):
        decide.decide(config, 10)
    config.data.chunks, config.model.key_bn = 16, "split"
    with pytest.raises(UserError, match=r"batch_size 32 .*16 chunks x 8 BatchNorm groups"):
        decide.decide(config, 10)
    config.model.bn_splits = 2
    with pytest.raises(UserError, match="leaves 1 image in a BatchNorm group .*: take 64"):
        decide.decide(config, 10)


@pytest.mark.parametrize("splits", [2, 3, 4])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(
    ("key_bn", "query_bn"),
    [("shuffle", "plain"), ("split", "plain"), ("plain", "split"), ("shuffle", "split")],
)
def test_batches_are_accepted_where_all_shares_are_whole(
    many_cores, key_bn, query_bn, devices, splits
):
    """Against what the run does: groups of two images or more, and keys dealt in equal blocks."""
    config = settings(devices)
    model = config.model
    model.key_bn, model.query_bn, model.bn_splits = key_bn, query_bn, splits
    for batch in range(2, 80):
        config.data.batch_size = batch
        try:
            kind = decide.decide(config, 10).key_bn
        except UserError as error:
            config.data.batch_size = int(str(error).rpartition("take ")[2])
            kind = decide.decide(config, 10).key_bn  # what is recommended is accepted
            assert config.data.batch_size != batch
        count, rest = divmod(config.data.batch_size, devices)
        groups = splits if "split" in (kind, query_bn) else 1
        assert rest == count % groups == 0 and count // groups >= 2
        if kind in ("shuffle", "split"):
            key_order(0, 0, count, devices)


def test_shuffled_keys_on_one_device_are_split():
    asked = settings()
    asked.model.key_bn = "shuffle"
    decided = decide.decide(copy.deepcopy(asked), 10)
    assert decided.key_bn == "split" and "on one device" in decided.reasons["key_bn"]
    old = replace(BEFORE, devices=1)  # an older version kept the leak
    assert goes_on(copy.deepcopy(asked), old, asked).key_bn == "split"


def test_a_run_with_shuffled_keys_on_one_device_splits_them_and_says_so(images, said):
    run_tiny(images, "--model.key_bn", "shuffle", "--trainer.max_epochs", "1", run_dir="shuffle")
    assert sum("key BatchNorm: split (shuffle as set" in line for line in said) == 1
    run_tiny(images, "--model.key_bn", "split", "--trainer.max_epochs", "1", run_dir="split")
    assert_same_end("shuffle", "split")
    assert at(1, "shuffle")["decided"]["key_bn"] == "split"
    before = Path("shuffle/config.yaml").read_text()
    with pytest.raises(UserError, match="model.key_bn is 'plain' but the run has 'shuffle'"):
        train.main(
            ["--resume", "shuffle/checkpoints/step_000000001.ckpt", "--model.key_bn", "plain"]
        )
    assert Path("shuffle/config.yaml").read_text() == before
