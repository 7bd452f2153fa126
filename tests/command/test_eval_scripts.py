"""eval_linear.py and eval_knn.py: results, files, baselines and errors, on one and two ranks."""

import json
import socket
from importlib import import_module

import pytest
import torch
from PIL import Image
from processes import ROOT, finish, start

from moco.config import UserError

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a busy machine


def script(name, *arguments, **env):
    """Run a script in a process group of its own; return its code, last line and errors."""
    return result_of(begin(name, *arguments, **env))


def begin(name, *arguments, **env):
    """Start a script in a process group of its own."""
    return start(*map(str, arguments), script=ROOT / f"{name}.py", cwd=ROOT, **env)


def result_of(process):
    """Wait for a script; return its code, last line and errors."""
    code, out, errors = finish(process)
    lines = out.strip().splitlines()
    return code, json.loads(lines[-1]) if lines else None, errors


def under_torchrun(name, *arguments):
    """Run a script on two ranks that were told about each other; return what rank 0 says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    told["LOCAL_WORLD_SIZE"] = "2"
    first, second = (
        begin(name, *arguments, RANK=rank, LOCAL_RANK=rank, **told) for rank in ("0", "1")
    )
    said = result_of(first)
    code, result, errors = result_of(second)
    assert (code, result) == (0, None), errors
    return said


def inside(name, *arguments):
    """Run a script's main in this process."""
    return import_module(name).main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of ours with a small ResNet, as train.py writes it."""
    from dataclasses import asdict

    from moco.algorithm.encoder import build_encoder
    from moco.config import TrainConfig

    config = TrainConfig()
    config.model.backbone, config.model.stem, config.model.width = "resnet10t", "cifar", 0.25
    config.model.embedding_dim, config.model.queue_size = 16, 64
    config.data.dataset, config.data.channels, config.data.image_size = "digits", 1, 8
    config.data.flip = 0.0
    torch.manual_seed(0)
    state = {}
    for side in ("query", "key"):
        encoder = build_encoder(config.model, 1, 8)
        state |= {f"{side}_encoder.{k}": v for k, v in encoder.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save({"state_dict": state, "config": asdict(config), "epoch": 3}, path)
    return path


def test_cached_probe_states_everything(checkpoint):
    code, result, errors = script("eval_linear", "--checkpoint", checkpoint, "--epochs", 20)
    assert code == 0, errors
    assert result["protocol"] == "cached" and result["layer"] == "backbone"
    assert result["encoder"] == "query" and result["epoch"] == 3
    assert result["data"]["dataset"] == "digits" and result["data"]["train_images"] == 1257
    assert result["backbone_sha256"] == result["backbone_sha256_after"]
    assert len(result["rates"]) == 13 and result["rate"] in [r["rate"] for r in result["rates"]]
    assert len(result["per_class"]) == 10 and result["top1"] <= result["top5"] <= 100
    # Digits are easy for pixels: 94 to 96 % by logistic regression.
    assert 90 < result["baselines"]["raw_pixels"]["top1"] < 99
    assert result["baselines"]["untrained"]["top1"] > 60
    stored = checkpoint.with_name("last.ckpt.eval_linear-cached-backbone.json")
    assert json.loads(stored.read_text()) == result


@pytest.mark.parametrize("protocol", ["views", "finetune"])
def test_other_protocols_run_and_beat_chance(checkpoint, protocol, tmp_path):
    result = inside(
        *("eval_linear", "--checkpoint", checkpoint, "--protocol", protocol, "--epochs", 8),
        *("--label_fraction", 0.5, "--crop_min", 0.5, "--output", tmp_path),
    )
    assert result["data"]["train_images"] in range(625, 632)
    assert result["top1"] > 40 and result["baselines"]["raw_pixels"]["top1"] > 40
    assert (tmp_path / f"last.ckpt.eval_linear-{protocol}-backbone-0.5.json").is_file()


def test_paper_on_two_ranks_scores_as_on_one(checkpoint, tmp_path):
    # 1257 = 6 * 200 + 57: the last batch is ragged and odd; test images 540.
    common = ["--checkpoint", checkpoint, "--protocol", "paper", "--epochs", 2, "--batch_size", 200]
    common += ["--learning_rates", "[1,0.1]", "--baselines", "false", "--output", tmp_path]
    one = inside("eval_linear", *common)
    code, two, errors = script("eval_linear", *common, "--devices", 2)
    assert code == 0, errors
    assert two["devices"] == 2 and one["devices"] == 1
    assert one["top1"] == pytest.approx(two["top1"], abs=0.2)  # one image of 540
    assert one["rate"] == two["rate"]
    for mine, other in zip(one["rates"], two["rates"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    for result in (one, two):
        assert result["backbone_sha256"] == result["backbone_sha256_after"]
    assert one["backbone_sha256"] == two["backbone_sha256"]


def test_knn_scores_several_k_and_draws_a_gallery(checkpoint, tmp_path):
    common = ["--checkpoint", checkpoint, "--output", tmp_path, "--k", "[1,20]", "--layer", "head"]
    one = inside("eval_knn", *common)
    code, two, errors = under_torchrun("eval_knn", *common)
    assert code == 0, errors
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["by_k"] == two["by_k"] and one["few_shot"] == two["few_shot"]
    assert one["layer"] == "head" and one["feature_dim"] == 16 and one["temperature"] == 0.1
    assert one["baselines"]["raw_pixels"]["by_k"]["1"]["top1"] > 95
    shots = [one["few_shot"][n]["mean"] for n in ("1", "5", "10")]
    assert shots == sorted(shots) and one["few_shot"]["1"]["std"] > 0
    picture = Image.open(one["gallery"])
    assert picture.width > 600 and len(picture.convert("RGB").getcolors(2**20)) > 50
    key = inside("eval_knn", *common, "--encoder", "key", "--baselines", "false")
    assert key["encoder"] == "key" and key["by_k"] != one["by_k"]


def folder(root, splits):
    """Write 8 x 8 grey images: `splits` maps each split to its classes and their counts."""
    generator = torch.Generator().manual_seed(0)
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 255, (8, 8), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.png")
    return root


BOTH = {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "splits,words",
    [
        ({"train": BOTH}, "no labelled"),
        ({"train": {"a": 3}, "test": {"a": 3}}, "two classes"),
        ({"train": BOTH, "test": {"a": 3, "c": 3}}, "share 1 classes .*only in one: b"),
        ({"train": BOTH, "test": {"a": 3}}, "share 1 classes .*only in one: b"),
        ({"train": BOTH, "test": BOTH}, "k 200 is above the 6"),
    ],
    ids=["no test split", "one class", "other classes", "class missing", "fewer than k"],
)
def test_data_that_give_no_score_are_one_line(checkpoint, tmp_path, splits, words):
    root = folder(tmp_path / "images", splits)
    arguments = ["--checkpoint", checkpoint, "--data.dataset", "folder", "--data.root", root]
    with pytest.raises(UserError, match=words):
        inside("eval_knn", *arguments)


def test_broken_checkpoints_and_settings_are_one_line(checkpoint, tmp_path):
    bad = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, bad)
    raw = torch.load(checkpoint, weights_only=True)
    raw["state_dict"]["query_encoder.backbone.conv1.weight"].fill_(float("nan"))
    nan = tmp_path / "nan.ckpt"
    torch.save(raw, nan)
    cases = [
        (["--checkpoint", bad], "other.pt"),
        (["--checkpoint", nan], "NaN"),
        (["--checkpoint", tmp_path / "none.ckpt"], "does not exist"),
        ([], "checkpoint is empty"),
        (["--checkpoint", checkpoint, "--data.jitter", 0.3], "setting of pretraining"),
        (["--checkpoint", checkpoint, "--learning_rates", "[-1]"], "positive"),
        (["--checkpoint", checkpoint, "--protocl", "paper"], "did you mean --protocol"),
    ]
    for arguments, words in cases:
        with pytest.raises(UserError, match=words):
            inside("eval_linear", *arguments)
    code, result, errors = script("eval_linear", "--checkpoint", bad)
    assert code == 2 and result is None
    errors = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "other.pt" in errors[0] and "Traceback" not in errors[0]
