"""The benchmarks: the harness's arithmetic and records, and every script in its smallest size."""

import json
import subprocess
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from embedding import write_features
from pictures import write_pictures
from processes import ROOT, finish, start
from torch import multiprocessing

from benchmarks import ablations, gpu, harness, loop, profiles, shared, traffic, views
from benchmarks.harness import Row
from moco.images.image_source import ImageSource


def run(name, path, *options):
    """Run a benchmark as README says it; return its last line and its record."""
    record = path / "record.json"
    script = f"benchmarks/{name}.py"
    code, out, errors = finish(start("--json", str(record), *options, script=script, cwd=ROOT))
    assert code == 0, errors
    last, record = json.loads(out.splitlines()[-1]), json.loads(record.read_text())
    assert last == {"benchmark": name, **record["results"]}
    assert record["command"].startswith(f"python benchmarks/{name}.py")
    return last, record


def write_labelled(folder):
    """Write 32 pictures of each of two classes, in train/ and in test/."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_pictures(folder / split / name, [f"{i}.png" for i in range(32)], rng)


def rates_are_positive(table):
    return all(row["median"] > 0 and min(row["quartiles"]) > 0 for row in table.values())


# The harness


def test_ways_take_turns_and_warm_ups_do_not_count():
    order = []
    ways = {name: lambda name=name: order.append(name) for name in "ab"}
    numbers = iter(range(100))

    def measure(way):
        way()
        return next(numbers)

    seconds = harness.interleave(ways, rounds=2, warmup=1, measure=measure)
    assert order == list("ababab")
    assert seconds == {"a": [2, 4], "b": [3, 5]}


def test_a_turn_is_timed(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    ways = {"way": lambda: now.append(now.pop() + 0.25)}
    assert harness.interleave(ways, rounds=2, warmup=0) == {"way": [0.25, 0.25]}


def test_ratio_is_that_of_medians_and_a_missed_target_is_said(capsys):
    rows = [
        Row("theirs", [1.0, 2.0, 9.0], work=10),
        Row("ours", [1.0, 0.5, 0.25], work=10, against={"theirs": 5}, bound=40),
        Row("best", [0.4, 0.4, 0.4], work=10, against={"theirs": 5, "ours": None}),
    ]
    found = harness.table("Title", rows, "images/s")
    assert found["theirs"]["median"] == 5  # 10 images in 2 s
    assert found["ours"]["median"] == 20
    assert found["ours"]["share_of_bound"] == 0.5
    ours = found["ours"]["against"]["theirs"]
    assert (ours["ratio"], ours["target"], ours["reached"]) == (4, 5, False)
    assert ours["ratio_quartiles"] == [2.5, 20]  # of 1, 4 and 36
    best = found["best"]["against"]
    assert best["theirs"]["reached"] is True
    assert "target" not in best["ours"] and best["ours"]["ratio"] == 1.25
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Title"
    ours, best = (next(li for li in lines if li.strip().startswith(n)) for n in ("ours", "best"))
    assert "4.00 (2.50-20.00)" in ours and "5 missed" in ours and "50 %" in ours
    assert "5 reached" in best and "missed" not in best


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0], (3, 3)), ([1, 2, 3, 4, 5], (2, 4)), ([1, 2], (1.25, 1.75))]
)
def test_quartiles(values, expected):
    assert harness.quartiles(values) == expected


def test_record_tells_what_was_measured_where(tmp_path, capsys):
    path = tmp_path / "deep" / "record.json"
    results = {"step": {"ours": {"median": 1.5}}}
    harness.report("name", results, Namespace(json=str(path), rounds=3))
    assert json.loads(capsys.readouterr().out) == {"benchmark": "name", **results}
    record = json.loads(path.read_text())
    assert record["results"] == results
    assert record["options"]["rounds"] == 3
    assert record["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert record["cpu"] and record["cores"] > 0 and record["threads"] == 1
    assert {"date", "commit", "dirty", "gpu", "command", "python"} <= record.keys()


def test_record_goes_to_the_results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.report("name", {}, Namespace(json=""))
    assert (tmp_path / "results" / "name.json").is_file()


def test_busy_and_idle_count_overlaps_once():
    assert profiles.busy_and_idle([(0, 10), (5, 12), (20, 30), (22, 25)]) == (22, 8)
    assert profiles.busy_and_idle([(3, 4)]) == (1, 0)


def test_profile_finds_operators_and_waits(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    with profiles.profiled(str(trace)) as found:
        weights = torch.randn(64, 64, requires_grad=True)
        (weights @ weights).sum().backward()
        weights.sum().item()
    calls = {name: number for name, number, _, _ in found.operators}
    assert calls["aten::mm"] == 3  # one forward, two backward
    assert found.waits["aten::item"] == 1
    assert found.step_ms > 0 and found.device_ms is None
    assert sum(share for *_, share in found.operators) == pytest.approx(1)
    out = capsys.readouterr().out
    assert "aten::mm" in out and "1 aten::item" in out
    assert trace.stat().st_size > 0


def test_profile_of_a_device_counts_gaps_and_only_the_step():
    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, start, end, where, note=False):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name,
            time_range=span,
            device_type=where,
            is_user_annotation=note,
            self_cpu_time_total=end - start,
        )

    found = profiles.Profile()
    events = [
        event("profiled step", 0, 100, host),
        event("profiled step", 10, 130, device, note=True),
        event("gemm", 10, 50, device),
        event("add", 90, 130, device),
        event("cudaStreamSynchronize", 60, 80, host),
        event("cudaDeviceSynchronize", 110, 140, host),  # after the step: the profile's own
    ]
    profiles._read_profile(events, found)
    assert (found.device_ms, found.idle_share) == (0.08, pytest.approx(1 / 3))
    assert found.waits == {"cudaStreamSynchronize": 1}
    assert [name for name, *_ in found.operators] == ["gemm", "add"]


def test_profile_is_off_unless_asked(capsys):
    with profiles.profiled(None) as found:
        pass
    assert found is None and capsys.readouterr().out == ""


# The scripts


def test_views(tmp_path):
    words = ["--rounds", "1", "--images", "8", "--batch", "4", "--recipes", "v1", "v2"]
    record = views.main([*words, "--json", str(tmp_path / "record.json")])
    last = record["results"]
    assert last.keys() == {"v1", "v2"}
    assert last["v2"].keys() == {"torchvision v2", "PIL", "ours"}
    assert last["v2"]["ours"]["against"]["torchvision v2"]["target"] == 5
    assert rates_are_positive(last["v1"]) and record["threads"] == 1


def test_our_views_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--ours", "--rounds", "1", "--images", "8", "--batch", "4", "--recipes", "v2"]
    found = views.main([*words, "--json", str(tmp_path / "record.json")])["results"]
    assert found["v2"].keys() == {"ours"} and rates_are_positive(found["v2"])


def test_without_a_gpu_it_is_said_what_would_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--cifar", "some/folder"]) == 2
    out, err = capsys.readouterr()
    told = [line.split("  would run: ") for line in out.splitlines()]
    parts = list(dict.fromkeys(name.split(",")[0].strip() for name, _ in told))
    assert tuple(parts) == gpu.PARTS and "all parts skipped" in err
    assert (
        sum(words.startswith("python benchmarks/loop.py --case resnet18") for _, words in told) == 3
    )
    assert all((gpu.ROOT / path).is_file() for path in gpu.TESTS)


def test_a_part_is_ended_in_time_and_skipped_without_its_images(tmp_path, monkeypatch, capsys):
    def too_long(words, timeout, **_):
        assert timeout <= 480
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", too_long)
    words = ["--without-gpu", "--json", str(tmp_path / "record.json"), "--only", "tests,epochs"]
    assert gpu.main(words) == 0
    found = json.loads((tmp_path / "record.json").read_text())["results"]
    assert "not over" in found["tests"]["failed"] and "--cifar" in found["epochs"]["failed"]


def test_the_case_of_the_shipped_recipe_is_that_recipe():
    config = loop.settings(Namespace(case="resnet18", feed=""), [])
    assert (config.model.head, config.model.query_bn) == ("linear", "split")
    assert config.data.views == "cifar" and config.optim.weight_decay == 5e-4


def test_loop_and_bare_work_take_turns(tmp_path, monkeypatch):
    images = ImageSource("few", torch.zeros(64, 3, 32, 32, dtype=torch.uint8), [], None, [], 3)
    monkeypatch.setattr(loop, "random_source", lambda data: images)
    words = ["--case", "small", "--rounds", "2", "--block-steps", "1", "--data.batch_size", "16"]
    words += ["--model.queue_size", "32", "--trainer.accelerator", "cpu"]
    found = loop.main([*words, "--json", str(tmp_path / "record.json")])
    assert rates_are_positive(found["loop"])
    assert {row["rounds"] for row in found["loop"].values()} == {2}


def test_shared(tmp_path, monkeypatch):
    """What trains in a way's process is a stand-in here, which the next test starts for real."""
    stand_in = tmp_path / "python"
    note = f"echo $* $GOMP_SPINCOUNT > {tmp_path}/told"
    stand_in.write_text(f"#!/bin/sh\n{note}\necho trains\necho 320\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(shared.sys, "executable", str(stand_in))
    options = ["--rounds", "1", "--seconds", "0.1", "--warmup", "0", "--beside", "quiet"]
    words = [*options, "--ways", "as torch comes", "--json", str(tmp_path / "record.json")]
    record = shared.main([*words, "--data.batch_size", "32"])
    assert record["results"]["quiet"]["as torch comes"]["median"] == 320
    told = (tmp_path / "told").read_text()
    assert told == f"{shared.__file__} --train 0.0 0.1 --data.batch_size 32 300000\n"


def test_shared_trains_until_its_time_is_over():
    words = ["--train", "0", "0.1", "--model.width", "0.125", "--run.report", "false"]
    _, out, errors = finish(start(*words, script="benchmarks/shared.py", cwd=ROOT))
    first, *rates = out.splitlines()  # where the benchmark has read them, it ends the process
    assert first == "trains" and [float(rate) > 0 for rate in rates] == [True], errors


def test_reference_chains_follow_the_recipe():
    from torchvision import transforms
    from torchvision.transforms import v2

    from benchmarks.views import reference_chain
    from moco.images.draws import RECIPES

    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    pil = transforms.functional.to_pil_image(image)
    for name, (recipe, _) in RECIPES.items():
        for kind, given in ((transforms, pil), (v2, image)):
            chain = reference_chain(recipe, 32, kind, [0.5] * 3, [0.25] * 3)
            names = [type(step).__name__ for step in chain.transforms]
            assert names.index("RandomGrayscale") == (1 if name == "v1" else 2)
            assert names.count("RandomApply") == (2 if name in ("v2", "v3") else 1)
            view = chain(given)
            assert view.shape == (3, 32, 32) and view.dtype == torch.float32
            assert view.min() >= -2.001 and view.max() <= 2.001


def test_traffic(tmp_path, monkeypatch):
    """The ranks are forks of a process that has imported torch."""
    forked = partial(multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(traffic.multiprocessing, "spawn", forked)
    words = ["--rounds", "1", "--worlds", "2", "--images", "8", "--width", "16"]
    record = traffic.main([*words, "--json", str(tmp_path / "record.json")])
    found = record["results"]["gloo"]["2"]
    assert found["measured_ms"] > 0 and found["predicted_ms"] > found["compute_ms"]


def test_the_model_of_a_step_counts_what_each_collective_moves():
    step = traffic.Step(images=32, compute=0.1, parameters=1000, embedding=128, cut=300)
    moved = step.traffic(8)
    assert moved == {"gradients": 7000, "keys": 7 * 32 * 128 * 4, "cuts": 7 / 8 * 32 * 300}
    waits = 4 * 3 * 1e-3  # the ring of gradients has two ways, and 8 ranks are three doublings
    assert step.seconds(8, 1e6, 1e-3) == pytest.approx(0.1 + waits + sum(moved.values()) / 1e6)


def test_streams(tmp_path):
    options = ["--rounds", "1", "--images", "16", "--shard-mib", "1", "--shards", "100"]
    last, _ = run("streams", tmp_path, *options, "--batches", "3", "--batch", "128")
    assert last["billion"]["batch_ms"] > 0 and rates_are_positive(last["reading"])
    assert {"decode alone", "folder of files", "local tars"} <= last["reading"].keys()


def test_feed(tmp_path):
    last, _ = run("feed", tmp_path, "--rounds", "1", "--images", "2", "--size", "64")
    found = last["two_views"]
    assert len(found) == 5 and rates_are_positive(found)
    pil, bound = found["PIL, finished views"], found["decode alone"]
    assert pil["share_of_bound"] == pytest.approx(pil["median"] / bound["median"], rel=0.01)


def test_photographs(tmp_path):
    last, _ = run("photographs", tmp_path, "--rounds", "1", "--images", "1", "--megapixels", "1")
    for kind in ("noisy", "smooth"):
        found = last[f"1 megapixels, {kind}"]
        assert len(found["rates"]) == 3 and rates_are_positive(found["rates"])
        assert found["grey_levels_apart"]["mean"] < 2


def test_synthetic_images_weigh_what_photographs_do(tmp_path):
    from benchmarks.feed import write_images

    write_images(tmp_path, 2)
    sizes = [path.stat().st_size / (500 * 400) for path in tmp_path.glob("*.jpg")]
    assert len(sizes) == 2 and all(0.3 < size < 0.8 for size in sizes)


def test_precision(tmp_path):
    options = ["--backbone", "resnet10t", "--width", "0.25", "--batch", "16", "--queue", "16"]
    last, _ = run(
        "precision", tmp_path, "--rounds", "1", "--size", "16", "--threads", "1", *options
    )
    if not torch.cpu._is_avx512_bf16_supported():
        assert last == {"benchmark": "precision", "skipped": "no bf16 instructions"}
        return
    assert last["step"].keys() == {"fp32, contiguous", "fp32, channels-last", "bf16, channels-last"}
    assert rates_are_positive(last["step"]) and last["bounds"]["bf16"] > 0


@pytest.mark.skipif(not find_spec("lightly"), reason="lightly is not installed")
def test_peers(tmp_path):
    last, _ = run(
        *("peers", tmp_path, "--rounds", "1", "--encoders", "small", "--precisions", "32-true"),
        *("--images", "64", "--small_batch", "16", "--queue", "32", "--small_steps", "1"),
        *("--limit", "400"),
    )
    small = last["small"]
    assert small.keys() == {"lightly, fp32", "ours, fp32"} and rates_are_positive(small)
    assert len(small["lightly, fp32"]["tried"]) == 5 and small["lightly, fp32"]["best"]
    assert small["ours, fp32"]["against"]["lightly, fp32"]["target"] == 5


@pytest.mark.parametrize(
    "ways",
    [
        ["ours"],
        ["ours", "lightly, our views", "lightly, our views, short", "lightly, its benchmark"],
    ],
)
def test_race(tmp_path, ways):
    if len(ways) > 1:
        pytest.importorskip("lightly")
    write_labelled(tmp_path)
    last, _ = run(
        *("race", tmp_path, "--root", str(tmp_path), "--level", "101", "--minutes", "0.01"),
        *("--every", "2", "--precision", "32-true", "--ways", *ways),
        *("--data.batch_size", "16", "--model.queue_size", "32", "--data.upscale", "2"),
    )
    for way in ways:
        first, *_, final = last[way]["readings"]
        assert first["step"] <= 2 and 0 < first["seconds"] <= final["seconds"]
        assert not last[way]["reached"] and 0 <= final["top1"] <= 100
    assert last["ours"]["ratio"] is None


def test_a_race_that_ours_did_not_finish_claims_nothing(capsys):
    from benchmarks.race import DOCUMENTED, GIVEN, OURS, show

    def at(seconds, top1):
        return [{"step": 1, "seconds": seconds, "top1": top1}]

    show({OURS: at(300, 49.0), GIVEN: at(3600, 49.9)}, 50)
    assert "not told" in capsys.readouterr().out.splitlines()[-1]
    found = show({OURS: at(100, 50.1), GIVEN: at(300, 50.0), DOCUMENTED: at(3600, 44.0)}, 50)
    assert [found[way]["ratio"] for way in (GIVEN, DOCUMENTED)] == [3, 36]
    lines = capsys.readouterr().out.splitlines()
    assert "4 missed" in lines[-2] and "> 36.00" in lines[-1] and "10 reached" in lines[-1]


def test_ablations(tmp_path):
    write_labelled(tmp_path)
    kept = tmp_path / "rows.json"
    start, end, options = "the recipe", "symmetric, two queues", ["--rows", str(kept)]
    options += ["--root", str(tmp_path), "--steps", "4", "--rounds", "1", "--seeds", "2"]
    options += ["--precision", "32-true", "--only", start, end, "--words", "data.batch_size=16"]
    options += ["model.queue_size=32", "data.upscale=2", "data.image_size_start=8"]
    found = run("ablations", tmp_path, *options, "data.image_size_end=12")[0]["rows"]
    # Both views go through both encoders: the same time has room for fewer steps.
    assert found[start]["steps"] == 4 and 2 <= found[end]["steps"] < 4
    for row in found.values():
        assert len(row["knn"]) == 2 and row["mean"] == pytest.approx(sum(row["knn"]) / 2)
    content = json.loads(kept.read_text())
    assert all(row["seconds"] > 0 for row in content["rows"].values())
    for row in content["rows"].values():  # what is judged is taken as it stands
        row["knn"] = 12.5
    kept.write_text(json.dumps(content))
    found = run("ablations", tmp_path, *options, "data.image_size_end=12")[0]["rows"]
    assert [row["mean"] for row in found.values()] == [12.5, 12.5]
    with pytest.raises(SystemExit, match="holds runs of .*'steps': 4.*: name another file"):
        ablations.main([*options, "data.image_size_end=12", "--steps", "400"])


@pytest.mark.skipif(not find_spec("lightly"), reason="lightly is not installed")
def test_python_door(tmp_path):
    last, _ = run(
        *("python_door", tmp_path, "--rounds", "1", "--images", "320", "--workers", "0"),
        *("--limit", "300"),
    )
    door = last["door"]
    assert door.keys() == {"lightly", "ours"} and rates_are_positive(door)
    assert 0 < door["ours"]["lines"] < door["lightly"]["lines"] / 3
    assert door["ours"]["against"]["lightly"]["target"] == 2


def test_peers_claims():
    from benchmarks.peers import claims

    names = ["lightly, fp32", "lightly, bf16", "ours, fp32", "ours, bf16"]
    assert claims("resnet18", "ours, bf16", names) == {"lightly, fp32": 2.5, "lightly, bf16": 1.2}
    assert claims("resnet18", "ours, fp32", names) == {"lightly, fp32": 1.2, "lightly, bf16": None}
    assert claims("small", "ours, bf16", names) == {"lightly, fp32": 5, "lightly, bf16": 1}
    assert claims("resnet18", "lightly, fp32", names) == {}
    # Without bf16 instructions ours is fp32 by default too: the arithmetic is the same.
    assert claims("resnet18", "ours, fp32", names[::2]) == {"lightly, fp32": 1.2}


def test_both_peers_train_the_same_network_with_the_same_views():
    pytest.importorskip("lightly")
    from benchmarks.peers import Contender, LightlyMoCo
    from moco.algorithm.pretrain import MoCo

    config = Contender("lightly", "small", "32-true", "ROOT", 8, 16, (1, 1)).settings()
    theirs = LightlyMoCo(config)
    config.model.key_bn = "plain"
    ours = MoCo(config.model, config.optim, 3, config.data.image_size)
    shapes = [p.shape for p in ours.query_encoder.parameters()]
    assert [p.shape for p in theirs.query_encoder.parameters()] == shapes
    assert sum(shape.numel() for shape in shapes) == pytest.approx(0.34e6, rel=0.1)
    assert theirs.criterion.memory_bank.bank.shape == ours.queue.keys.shape
    views = torch.randn(2, 8, 3, 32, 32)
    loss = theirs.training_step((views, None, None), 0)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None for p in theirs.key_encoder.parameters())
    (group,) = theirs.configure_optimizers().param_groups
    (own,) = ours.configure_optimizers().param_groups
    for name in ("momentum", "weight_decay", "lr", "nesterov", "dampening"):
        assert group[name] == own[name]


def test_selection(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("bank", "test"):
        labels = np.arange(3).repeat(20)
        vectors = np.eye(3)[labels] + 0.1 * rng.standard_normal((60, 3))
        write_features(vectors.astype(np.float32), tmp_path / name, labels=[*map(str, labels)])
    words = ["--index", str(tmp_path / "bank"), "--test", str(tmp_path / "test")]
    last, _ = run("selection", tmp_path, *words, "--counts", "3", "--draws", "4")
    found = last["3"]
    assert found["classes"]["chosen"] == 3 > found["classes"]["random"]
    assert found["top1"]["chosen"]["nearest class mean"]["mean"] == 100
    assert found["top1"]["random"]["logistic regression"]["mean"] < 100


def test_embed(tmp_path):
    words = ["--cases", "small", "--images", "8", "--rounds", "1", "--vectors", "500"]
    last, _ = run("embed", tmp_path, *words)
    assert {*last["small"]} == {"bare", "embed"} and "bare" in last["small"]["embed"]["against"]
    assert all(row["seconds"] > 0 and row["gib"] > 0.05 for row in last["index"].values())
