"""eval_linear.py and eval_knn.py: results, files, baselines and errors, on one and two ranks."""

import json
from importlib import import_module

import pytest
import torch
from PIL import Image
from processes import ROOT, finish, start, start_command
from runs import main_on_rank

from moco.command.judge import read_settings
from moco.config import UserError
from moco.evaluation import judge
from moco.judge_config import KNNConfig, LinearConfig

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
    assert len(lines) < 2, "standard output is one line of JSON"
    return code, json.loads(lines[-1]) if lines else None, errors


def on_two_ranks(two_ranks, name, *arguments):
    """Run a script's main on two ranks; return rank 0's result and what it said."""
    words = list(map(str, arguments))
    first, (result, _) = two_ranks.run(main_on_rank, name, words, str(ROOT))
    assert result == {}
    return first


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


def test_judging_and_exporting_import_no_lightning(checkpoint, tmp_path):
    """Nor faiss, before neighbours are looked for."""
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path)]
    judge = [*words, "--accelerator", "cpu", "--baselines", "false"]
    export = [*words[:3], str(tmp_path / "x"), "--format", "safetensors"]
    runs = [("knn", judge), ("linear", [*judge, "--epochs", "1"]), ("export", export)]
    code = (
        "import json, sys, moco.evaluation.judge, moco.checkpoints.export\n"
        "from importlib import import_module\n"
        "heavy = {'pytorch_lightning', 'lightning', 'lightning_fabric', 'torchmetrics'}\n"
        "assert 'torch' in sys.modules\n"
        "assert not {*heavy, 'faiss'} & {*sys.modules}, heavy & {*sys.modules}\n"
        "for command, argv in json.loads(sys.argv[1]):\n"
        "    assert import_module(f'moco.command.{command}').main(argv)\n"
        "    assert not heavy & {*sys.modules}, command\n"
    )
    ended, _, err = finish(start_command("-c", code, json.dumps(runs), cwd=ROOT))
    assert ended == 0, err


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
    last = errors.rstrip().splitlines()
    table = next(n for n, line in enumerate(last) if line.startswith("linear, 540 test images"))
    assert max(map(len, last[table:])) <= 60
    assert " ".join(last[table + 5 :]) == result["comparison"]["sentence"]
    stored = checkpoint.with_name("last.ckpt.eval_linear-cached-backbone.json")
    assert json.loads(stored.read_text()) == result


@pytest.mark.parametrize("protocol", ["views", "finetune", "v3"])
def test_other_protocols_run_and_beat_chance(checkpoint, protocol, tmp_path):
    steps = ["--epochs", 8]
    if protocol == "v3":  # its own are 90 epochs of batches of 1024 at a rate for ImageNet
        steps = ["--epochs", 20, "--batch_size", 64, "--learning_rates", "[10]"]
    result = inside(
        *("eval_linear", "--checkpoint", checkpoint, "--protocol", protocol, *steps),
        *("--label_fraction", 0.5, "--crop_min", 0.5, "--output", tmp_path),
    )
    assert result["data"]["train_images"] in range(625, 632)
    assert result["top1"] > 40 and result["baselines"]["raw_pixels"]["top1"] > 40
    assert result["comparison"]["untrained"]["draws"] == (3 if protocol == "views" else 1)
    assert (tmp_path / f"last.ckpt.eval_linear-{protocol}-backbone-0.5.json").is_file()


@pytest.mark.parametrize(
    ("losses", "is_better"),
    [([2.2, 9.1], True), ([2.2999, 2.304], None), ([2.29, None], None), (None, None)],
)
def test_nothing_is_better_than_baselines_that_had_no_time_to_learn(
    checkpoint, tmp_path, monkeypatch, losses, is_better
):
    """Ten classes are guessed at a loss of 2.303; None is a baseline without any score."""

    def scored(subject, config):
        hits = torch.ones(540, dtype=torch.int8)
        subject.hits |= {"encoder": hits, "untrained": 1 - hits, "raw_pixels": 1 - hits}
        rates = [{"loss": loss} for loss in losses or []]
        scores = {"encoder": {"verdict": "good"}, "raw_pixels": {"rates": [{"loss": 0.1}]}}
        return scores | {"untrained": {"rates": rates, "top1": 10} if losses else None}

    monkeypatch.setitem(judge.PROTOCOLS, "v3", scored)
    monkeypatch.setattr(judge, "_say", lambda *_: None)
    words = ["--checkpoint", checkpoint, "--protocol", "v3", "--output", tmp_path]
    told = inside("eval_linear", *words)["comparison"]
    assert told["is_better"] is is_better
    sentence = "the classifier of untrained learnt nothing at any rate, give more --epochs."
    assert (told["sentence"] == f"No verdict: {sentence}") == (is_better is None)


def test_paper_on_two_ranks_scores_as_on_one(checkpoint, tmp_path, two_ranks):
    # 1257 = 6 * 200 + 57: the last batch is ragged and odd; test images 540.
    common = ["--checkpoint", checkpoint, "--protocol", "paper", "--epochs", 2, "--batch_size", 200]
    common += ["--learning_rates", "[1,0.1]", "--baselines", "false", "--output", tmp_path]
    one = inside("eval_linear", *common)
    two, _ = on_two_ranks(two_ranks, "eval_linear", *common)
    assert two["devices"] == 2 and one["devices"] == 1
    assert one["top1"] == pytest.approx(two["top1"], abs=0.2)  # one image of 540
    assert one["rate"] == two["rate"]
    for mine, other in zip(one["rates"], two["rates"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    for result in (one, two):
        assert result["backbone_sha256"] == result["backbone_sha256_after"]
    assert one["backbone_sha256"] == two["backbone_sha256"]


def test_knn_scores_several_k_and_draws_a_gallery(checkpoint, tmp_path, two_ranks):
    common = ["--checkpoint", checkpoint, "--output", tmp_path, "--k", "[1,20]", "--layer", "head"]
    one = inside("eval_knn", *common)
    two, _ = on_two_ranks(two_ranks, "eval_knn", *common)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["by_k"] == two["by_k"] and one["few_shot"] == two["few_shot"]
    assert one["layer"] == "head" and one["feature_dim"] == 16 and one["temperature"] == 0.1
    assert one["baselines"]["raw_pixels"]["by_k"]["1"]["top1"] > 95
    assert one["by_k"]["1"]["top5"] == one["by_k"]["1"]["top1"], "one neighbour, one vote"
    shots = [one["few_shot"][n]["mean"] for n in ("1", "5", "10")]
    assert shots == sorted(shots) and one["few_shot"]["1"]["std"] > 0
    picture = Image.open(one["gallery"])
    assert picture.width > 600 and len(picture.convert("RGB").getcolors(2**20)) > 50
    key = inside("eval_knn", *common, "--encoder", "key", "--baselines", "false")
    assert key["encoder"] == "key" and key["by_k"] != one["by_k"]


def test_the_verdict_stands_on_the_scores_of_all_draws(checkpoint, tmp_path, said):
    common = ["--checkpoint", checkpoint, "--output", tmp_path, "--k", "[20]", "--shots", "[1]"]
    result = inside("eval_knn", *common, "--untrained_draws", 4)
    found, baselines = result["comparison"], result["baselines"]
    assert set(baselines) == {"untrained", "raw_pixels"}
    assert (found["score"], found["test_images"]) == ("kNN (k 20)", 540)
    assert found["trained"]["top1"] == result["top1"]
    assert found["raw_pixels"]["top1"] == baselines["raw_pixels"]["top1"]
    draws = found["untrained"]["top1_of_draws"]
    assert draws[0] == baselines["untrained"]["top1"] and len(set(draws)) > 1
    assert found["untrained"]["top1"] == pytest.approx(sum(draws) / 4, abs=0.01)
    # A draw is the network that a seed gives: the second is the first of the next seed.
    other = inside("eval_knn", *common, "--untrained_draws", 1, "--seed", 1)
    assert other["comparison"]["untrained"]["top1"] == draws[1]
    assert found["is_better"] is False  # the checkpoint was never trained
    assert f"written to {tmp_path / 'last.ckpt.eval_knn-backbone.json'}" in said[:-6]


def test_without_baselines_there_is_no_verdict(checkpoint, tmp_path, said):
    common = ["--checkpoint", checkpoint, "--output", tmp_path, "--baselines", "false"]
    result = inside("eval_knn", *common)
    assert result["comparison"]["is_better"] is None and result["baselines"] == {}
    assert " ".join(said).endswith("leave --baselines at true.")


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
        ({"train": BOTH, "test": BOTH}, r"k 200 is above the 6 .*as in --k \[6\]"),
    ],
    ids=["no test split", "one class", "other classes", "class missing", "fewer than k"],
)
def test_data_that_give_no_score_are_one_line(checkpoint, tmp_path, splits, words):
    root = folder(tmp_path / "images", splits)
    arguments = ["--checkpoint", checkpoint, "--data.dataset", "folder", "--data.root", root]
    with pytest.raises(UserError, match=words):
        inside("eval_knn", *arguments, "--k", "[20,200]")


def test_the_usual_numbers_of_neighbours_fit_small_sets(checkpoint, tmp_path, said):
    arguments = ["--checkpoint", checkpoint, "--data.dataset", "folder", "--output", tmp_path]
    for count, wanted in ((15, {"10", "20"}), (2, {"4"})):
        labelled = {"a": count, "b": count}
        root = folder(tmp_path / str(count), {"train": labelled, "test": BOTH})
        result = inside("eval_knn", *arguments, "--data.root", root)
        assert result["by_k"].keys() == wanted and result["k"] == max(map(int, wanted))
        assert any(f"k above the {2 * count} training images is left out" in line for line in said)


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


@pytest.mark.parametrize("kind", [KNNConfig, LinearConfig])
def test_a_switch_is_given_by_its_name_alone_or_with_a_value(kind):
    """Errors and docs say `--allow_partial`, as training and export take it."""
    for words, wanted in (([], False), (["--allow_partial"], True), (["--allow_partial=false"], 0)):
        common = ["--checkpoint", __file__, *words]  # any file
        assert read_settings(common, kind, "")[0].allow_partial == wanted


def test_lists_of_the_run_are_not_taken_for_other_images(checkpoint, tmp_path, said):
    """A row `0` of its table would label the file 0.png of any set."""
    stored = torch.load(checkpoint, weights_only=True)
    own, other = (folder(tmp_path / name, {"train": BOTH, "test": BOTH}) for name in ("x", "y"))
    table = tmp_path / "table.csv"
    rows = [f"{s}/{c}/{n}.png,{k}" for s in ("train", "test") for c, k in ("ac", "bd")
            for n in range(3)]  # fmt: skip
    table.write_text("\n".join(["path,label", *rows]))
    stored["config"]["data"] |= {"dataset": "folder", "root": str(own), "labels": str(table)}
    torch.save(stored, tmp_path / "last.ckpt")
    arguments = ["--checkpoint", tmp_path / "last.ckpt", "--k", "[3]", "--baselines", "false"]
    assert {*inside("eval_knn", *arguments)["per_class"]} == {"c", "d"}
    again = inside("eval_knn", *arguments, "--data.root", f"{own}/.")
    assert {*again["per_class"]} == {"c", "d"} and not any("its own images" in s for s in said)
    elsewhere = [*arguments, "--data.root", other]
    assert {*inside("eval_knn", *elsewhere)["per_class"]} == {"a", "b"}
    assert "data.labels of the run is for its own images: give it to take it" in said
    given = inside("eval_knn", *elsewhere, "--data.labels", table)
    assert {*given["per_class"]} == {"c", "d"}


def torn(tmp_path, splits):
    """Write dark images of class a and light ones of class b; cut off two files."""
    root = folder(tmp_path / "images", splits)
    for path in root.rglob("*.png"):
        base = 127 if path.parent.name == "b" else 0
        Image.open(path).point([base + value // 2 for value in range(256)]).save(path)
    for path in (root / "train" / "a" / "0.png", root / "test" / "b" / "1.png"):
        path.write_bytes(path.read_bytes()[:60])
    return [
        *("--data.dataset", "folder", "--data.root", root, "--output", tmp_path),
        *("--data.resident", "off", "--data.num_workers", 1, "--baselines", "false"),
    ]


TORN = {"train": {"a": 9, "b": 7}, "test": {"a": 9, "b": 3}}
LINEAR = ("eval_linear", "--epochs", 4, "--batch_size", 8, "--learning_rates")
PROTOCOLS = {
    "knn": ("eval_knn", "--k", "[3]"),
    "cached": (*LINEAR, "[0.1]"),
    "views": (*LINEAR, "[0.01,0.001]", "--protocol", "views", "--num_views", 2),
    "paper": (*LINEAR, "[0.01,0.001]", "--protocol", "paper"),
    "finetune": (*LINEAR, "[0.01,0.001]", "--protocol", "finetune"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_torn_files_of_a_streamed_set_are_left_out_and_counted(
    checkpoint, tmp_path, said, protocol
):
    arguments = [*PROTOCOLS[protocol], "--checkpoint", checkpoint, *torn(tmp_path, TORN)]
    with pytest.raises(UserError, match=r"0\.png: .*cannot be decoded.*max_bad_fraction"):
        inside(*arguments)
    result = inside(*arguments, "--data.max_bad_fraction", 0.1)
    counts = {name: n for name, n in result["data"].items() if "_images" in name}
    assert counts == {
        "train_images": 15, "test_images": 11, "train_images_unread": 1, "test_images_unread": 1
    }  # fmt: skip
    # Each accuracy is a share of the images that were read: 11, 9 of class a and 2 of class b.
    assert result["top1"] in [round(100 * n / 11, 2) for n in range(12)]
    assert result["per_class"]["b"] in (0, 50, 100)
    assert any(line.endswith("/test: 11 of 12 images were read") for line in said)
    (report,) = tmp_path.glob("last.ckpt.eval_*-bad_files.txt")
    named = [line.split("\t")[0] for line in report.read_text().splitlines()]
    assert [path.partition("/images/")[2] for path in named] == ["train/a/0.png", "test/b/1.png"]


@pytest.mark.parametrize("resident", ["off", "memory"])
def test_neighbours_and_shots_fit_what_can_be_read(checkpoint, tmp_path, said, resident):
    """Of the class a none is left: it has no shots, and no k above the others is asked for."""
    splits = {"train": {"a": 2, "b": 98, "c": 100}, "test": {"a": 2, "b": 3, "c": 3}}
    arguments = [*torn(tmp_path, splits), "--data.resident", resident]
    (tmp_path / "images/train/a/1.png").write_bytes(b"torn")
    words = ["--checkpoint", checkpoint, "--data.max_bad_fraction", 0.3, *arguments]
    result = inside("eval_knn", *words)
    assert {*result["by_k"]} == {"10", "20", "100"} and result["few_shot"]["1"] is None
    assert any("k above the 198 training images is left out" in line for line in said)
    with pytest.raises(UserError, match="k 199 is above the 198 training images"):
        inside("eval_knn", *words, "--k", "[199]")


@pytest.mark.parametrize("resident", ["off", "memory"])
def test_what_cannot_be_read_is_counted_among_the_labels_that_are_used(
    checkpoint, tmp_path, resident
):
    splits = {"train": {"a": 40, "b": 40}, "test": {"a": 5, "b": 5}}
    arguments = [*torn(tmp_path, splits), "--data.resident", resident]
    for number in range(1, 9):
        (tmp_path / f"images/train/b/{number}.png").write_bytes(b"torn")
    words = ["--checkpoint", checkpoint, "--data.max_bad_fraction", 0.5, "--epochs", 1]
    words += ["--learning_rates", "[0.1]", "--label_fraction", 0.5]
    data = inside("eval_linear", *words, *arguments)["data"]
    if resident == "memory":  # half of the 39 and the 32 that were decoded
        assert (data["train_images"], data["train_images_unread"]) == (20 + 16, 0)
    else:  # half of what is listed, of which 9 at most cannot be read
        assert data["train_images"] + data["train_images_unread"] == 40
        assert 0 < data["train_images_unread"] <= 9


@pytest.mark.parametrize("protocol", ["knn", "paper"])
def test_two_ranks_leave_out_torn_files_as_one_does(checkpoint, tmp_path, protocol, two_ranks):
    arguments = [*PROTOCOLS[protocol], "--checkpoint", checkpoint, *torn(tmp_path, TORN)]
    result, said = on_two_ranks(two_ranks, *arguments, "--data.max_bad_fraction", 0.1)
    one = inside(*arguments, "--data.max_bad_fraction", 0.1)
    assert result["data"] == one["data"] and result["per_class"] == one["per_class"]
    assert len([line for line in said if "cannot be read" in line]) == 2, said


@pytest.mark.parametrize("kind", ["digits", "own"])
def test_a_root_alone_is_a_folder_where_the_run_had_none(checkpoint, tmp_path, kind):
    stored = torch.load(checkpoint, weights_only=True)
    stored["config"]["data"] |= {"dataset": kind}
    torch.save(stored, tmp_path / "last.ckpt")
    root = folder(tmp_path / "images", {"train": BOTH, "test": BOTH})
    arguments = ["--checkpoint", tmp_path / "last.ckpt", "--data.root", root, "--k", "[3]"]
    assert {*inside("eval_knn", *arguments)["per_class"]} == {"a", "b"}


def test_results_on_other_images_have_names_of_their_own(checkpoint, tmp_path):
    both = {"a": 6, "b": 5}
    roots = [folder(tmp_path / n / "images", {"train": both, "test": both}) for n in "xy"]
    arguments = ["eval_knn", "--checkpoint", checkpoint, "--output", tmp_path, "--k", "[3]"]
    inside(*arguments)
    for root in roots:
        inside(*arguments, "--data.dataset", "folder", "--data.root", root)
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(found) == 3 and "last.ckpt.eval_knn-backbone.json" in found
    assert found["last.ckpt.eval_knn-backbone.json"]["data"]["dataset"] == "digits"
    others = [name for name in found if "-images-" in name]
    assert {found[name]["data"]["root"] for name in others} == set(map(str, roots))
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_mean_over_unbalanced_classes_is_told(checkpoint, tmp_path, said):
    root = folder(tmp_path / "images", {"train": {"a": 20, "b": 4}, "test": {"a": 17, "b": 3}})
    arguments = ["--checkpoint", checkpoint, "--data.dataset", "folder", "--data.root", root]
    result = inside("eval_knn", *arguments, "--k", "[24]", "--temperature", 100)
    assert result["per_class"] == {"a": 100, "b": 0}, "of all neighbours most are of class a"
    assert result["top1"] == 85 and result["mean_per_class"] == 50
    assert "encoder: top-1 85.00, mean over classes 50.00" in said


def test_the_only_rate_that_diverged_is_scored_and_fails(checkpoint, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--output", tmp_path, "--epochs", 3]
    arguments += ["--label_fraction", 0.1, "--baselines", "false", "--learning_rates", "[1000]"]
    code, result, errors = script("eval_linear", *arguments)
    assert code == 1 and result["verdict"] == "diverged" and result["top1"] >= 0, errors
    assert "No verdict: the learning rate diverged" in errors
    assert result["comparison"]["trained"]["top1"] == result["top1"]
    assert "Traceback" not in errors and "diverged" in errors
    (stored,) = tmp_path.glob("*.json")
    assert json.loads(stored.read_text()) == result
    good = inside("eval_linear", *arguments[:-1], "[0.1]")
    assert good["verdict"] == "good"
