"""The page of a run: whole without labels and network, and plain where something is missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from runs import run_tiny

from moco.command import report as command
from moco.config import UserError
from moco.reports import facts as facts_room
from moco.reports import page
from moco.reports.facts import read_facts
from moco.reports.page import write_report
from moco.reports.panel import make_panel

HOSTILE = ("<script>alert(1)</script>", "a\"b' & c", "new\nline", "{{ 7*7 }}")
PARTS = {"verdict", "about", "curves", "map", "neighbours", "pairs", "blind", "typical", "odd"}


class Elements(HTMLParser):
    """Collect a page's elements, the text of its scripts of data, and what stands for people."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.specs: dict[str, dict] = {}
        self.said, self._inside = "", {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = dict(attributes) | {"tag": tag}

    def handle_endtag(self, tag):
        self._inside = {}

    def handle_data(self, data):
        if self._inside.get("data-for"):
            self.specs[self._inside["data-for"]] = json.loads(data)
        elif self._inside.get("tag") not in ("script", "style"):
            self.said += data

    def ids(self) -> set[str]:
        return {each["id"] for tag, each in self.found if tag == "section"}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of six steps on images without labels."""
    folder = tmp_path_factory.mktemp("finished")
    run_tiny(images, run_dir=str(folder / "run"))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def read(path) -> Elements:
    return Elements(Path(path).read_text(encoding="utf-8"))


def test_a_page_without_labels_has_every_part_and_fetches_nothing(run):
    told = write_report([run])
    found = read(told["report"])
    assert found.ids() >= PARTS and told["images"] == [48]
    assert told["bytes"] == Path(told["report"]).stat().st_size < 3e6
    addresses = [
        value
        for _, each in found.found
        for name, value in each.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert len(addresses) > 100 and all(value.startswith("data:") for value in addresses)
    policy = next(each for _, each in found.found if "http-equiv" in each)["content"]
    assert "default-src 'none'" in policy and "http" not in policy
    names = {point["name"].split("/")[-1] for point in values(found.specs["map-1"])}
    assert names == {f"{i:02d}.jpg" for i in range(48)}
    assert "colour by" not in json.dumps(found.specs["map-1"]), "there is no label to colour by"
    assert "no labels" in found.said and "None" not in found.said


def values(spec) -> list[dict]:
    return next(iter(spec["datasets"].values())) if "datasets" in spec else spec["data"]["values"]


def test_names_of_files_classes_and_runs_stay_text(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in HOSTILE:
            name = name.replace("/", "∕")
            files = [f"{'<img src=x onerror=1>' if i % 2 else i}{i}.png" for i in range(count)]
            write_pictures(tmp_path / "set" / split / name, files, rng)
    odd = bytes(tmp_path / "set/train/new\nline") + b"/\xff\xfe.png"
    shutil.copy(next((tmp_path / "set/train").rglob("*.png")), odd)
    run = tmp_path / "<b>run</b>"
    options = ("--run.knn_every", "1", "--run.knn_k", "3", "--trainer.max_epochs", "1")
    told = run_tiny(tmp_path / "set", *options, "--run.report", "true", run_dir=str(run))
    found = read(told["report"])
    scripts = [each for tag, each in found.found if tag == "script"]
    assert [each for each in scripts if each.get("type") != "application/json"] == [{}, {}]
    assert {tag for tag, _ in found.found} <= {
        *("html", "head", "meta", "title", "link", "style", "body", "main", "header", "section"),
        *("h1", "h2", "h3", "p", "div", "span", "table", "thead", "tr", "th", "td", "code", "pre"),
        *("ul", "li", "figure", "figcaption", "img", "b", "details", "summary", "script"),
    }
    assert not [each for _, each in found.found if {"onerror", "onload"} & {*each}]
    assert all(each["src"].startswith("data:") for tag, each in found.found if tag == "img")
    labels = {point["label"] for point in values(found.specs["map-1"])}
    assert labels == {name.replace("/", "∕") for name in HOSTILE}
    said = [each["alt"] for tag, each in found.found if tag == "img"]
    assert any("<img src=x onerror=1>" in text for text in said)
    assert "<b>run</b>" in found.said and "{{ 7*7 }}" in found.said
    share = told["comparison"]["chance"]
    assert f"the largest class every time{share:.1f}" in found.said, "as in the table of the log"
    assert "lower is better" in found.said and "val/" not in found.said


def test_a_run_ends_with_its_page_and_says_where(images, in_tmp, said):
    told = run_tiny(images, "--run.report", "true")
    assert told["report"] == "run/report.html" and "report: run/report.html" in said
    note = json.loads(Path("run/run.json").read_text())
    assert note["result"]["steps"] == 6 and [start["step"] for start in note["starts"]] == [0]
    assert "--model.backbone" in note["starts"][0]["command"]
    again = run_tiny(images, "--run.report", "false", run_dir="other")
    assert "report" not in again and not Path("other/report.html").exists()


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_a_report_that_fails_or_is_stopped_leaves_the_run_its_result(
    error, images, in_tmp, said, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.setattr(page, "write_report", fail)
    told = run_tiny(images, "--run.report", "true")
    assert told["steps"] == 6 and "report" not in told
    lines = [line for line in said if "no report was written" in line]
    assert len(lines) == 1 and "python -m moco report run" in lines[0]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_few_or_equal_images_give_a_page(run, tmp_path, count):
    write_pictures(tmp_path / "few", ["0.png"], np.random.default_rng(0))
    for number in range(1, count):
        shutil.copy(tmp_path / "few/0.png", tmp_path / f"few/{number}.png")
    told = write_report([run], root=str(tmp_path / "few"))
    found = read(told["report"])
    assert told["images"] == [count if count == 1 else 0] and "pairs" not in found.ids()
    assert "are not those of the run, so the page lacks the views" in found.said
    assert ("All images have the same features" in found.said) == (count > 1)


def test_a_run_that_leaves_the_gpu_alone_has_a_page_that_does(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read_facts(run).config.trainer.accelerator == "cpu"
    assert write_report([run])["images"] != [0]


def test_features_that_are_no_numbers_are_said(run):
    for path in (run / "checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)
        weights = state["state_dict"]
        first = next(name for name in weights if name.endswith("conv1.weight"))
        for name in weights:
            if name.endswith(first.split(".", 1)[1]):
                weights[name].fill_(torch.nan)
        torch.save(state, path)
    found = read(write_report([run])["report"])
    assert "hold NaN or infinity in" in found.said and {"pairs", "curves"} <= found.ids()
    assert "map" not in found.ids()


def test_a_run_without_a_checkpoint_or_readings_or_images_gives_what_is_there(run):
    shutil.rmtree(run / "checkpoints")
    found = read(write_report([run])["report"])
    assert "no whole checkpoint lies in" in found.said and "pairs" in found.ids()
    (run / "metrics.csv").write_text("step,epoch,train/loss\n1,0.3,2.5\n2,0.7,nan\n3,1.0,2.")
    assert [row["step"] for row in read_facts(run).rows] == [1, 2, 3]
    (run / "metrics.csv").unlink()
    (run / "run.json").write_text("[")
    found = read(write_report([run], root="nowhere")["report"])
    assert "The page lacks its images" in found.said and "curves" not in found.ids()
    assert "has read nothing yet" in found.said


@pytest.mark.parametrize(
    "spoil,words",
    [
        (lambda run: (run / "config.yaml").unlink(), "holds no readable config.yaml"),
        (lambda run: (run / "config.yaml").write_text("model: 3"), "holds no readable config"),
        (
            lambda run: (run / "config.yaml").write_text(
                (run / "config.yaml").read_text().replace("settings: {}", "settings: {x: 1}")
            ),
            "damaged in its section decided",
        ),
        (shutil.rmtree, "is no directory"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(run, spoil, words):
    spoil(run)
    with pytest.raises(UserError, match=words):
        command.main([str(run)])


def test_the_command_writes_where_it_is_told_to(run, tmp_path):
    told = command.main([str(run), "--images", "8", "--output", str(tmp_path / "page.html")])
    assert told["report"] == str(tmp_path / "page.html") and told["images"] == [8]
    assert "map" in read(told["report"]).ids() and not (run / "report.html").exists()
    with pytest.raises(UserError, match="images is 0"):
        command.main([str(run), "--images", "0"])
    with pytest.raises(UserError, match=r"config.yaml: give a name that ends in .html"):
        command.main([str(run), "--output", str(run / "config.yaml")])
    with pytest.raises(UserError, match="no directory to write in .* give another --output FILE"):
        command.main([str(run), "--output", str(tmp_path / "missing/page.html")])


def test_several_runs_stand_side_by_side_differences_first(run, images, tmp_path):
    other = tmp_path / "other"
    run_tiny(images, "--model.temperature", "0.5", run_dir=str(other))
    found = read(write_report([run, other], images=40)["report"])
    sections = [each["id"] for tag, each in found.found if tag == "section"]
    assert sections[0] == "settings" and {"map-1", "map-2"} <= found.specs.keys()
    table, _, _ = found.said.partition("Did it work?")
    assert "model.temperature" in table and "data.batch_size" not in table
    named = {value["run"] for value in loss_values(found)}
    assert named == {"1: run", "2: other"}
    assert write_report([run, other], images=1)["images"] == [1, 1]  # one of each is the least


def loss_values(found) -> list[dict]:
    return [row for layer in found.specs["curve-1"]["layer"] for row in layer["data"]["values"]]


def say_own(run, field: str) -> None:
    """Write into a run's settings that Python gave something."""
    text = (run / "config.yaml").read_text()
    own = re.sub(rf"\n  {field}: \w+\n", f"\n  {field}: own\n", text)
    assert own != text
    (run / "config.yaml").write_text(own)


def test_views_of_callables_from_python_are_said_to_be_missing(run):
    say_own(run, "views")
    found = read(write_report([run], 16)["report"])
    assert "The page lacks the views: data.views is own" in found.said
    assert found.ids() >= PARTS - {"pairs"} and "pairs" not in found.ids()


def test_images_from_python_are_said_to_be_missing_and_others_shown_in_their_place(run, images):
    say_own(run, "dataset")
    found = read(write_report([run], 16)["report"])
    assert "The page lacks its images: the run got them from Python" in found.said
    told = command.main([str(run), "--images", "8", "--root", str(images)])
    assert told["images"] == [8]


def test_resumes_are_marked_where_the_run_went_on(run):
    note = json.loads((run / "run.json").read_text())
    for step in (2, 4, 3):  # the last one repeats step 4
        facts_room.note_start(run, step, "", [], "a device")
    facts = read_facts(run)
    assert facts.resumed_at == [2, 3] and facts.starts[0] == note["starts"][0]
    assert facts.result == {}, "the run goes on"
    found = read(write_report([run], images=4)["report"])
    assert "a dotted line stands where the run was resumed" in found.said
    assert [row["step"] for row in loss_values(found) if "value" not in row] == [2, 3]
    facts_room.note_result(run, {"seconds": 90.0})  # of the last process
    assert dict(make_panel(read_facts(run), 4, "", 0).about)["time"] == "1.5 min since step 3"


def test_settings_say_who_has_set_them(run):
    facts = read_facts(run)
    by = {name: who for name, _, _, who in facts.differences()}
    assert by["model.queue_size"] == "command line" and "optim.name" not in by
    facts.starts[0]["command"] = []
    assert {who for *_, who in facts.differences()} == {"recipe"}
    facts.config = facts.config.changed({"data.channels": 1})
    assert ("data.channels", 1, 3, "auto") in facts.differences()
    # What a run was given as it went on comes from that command line.
    facts.starts.append({"step": 2, "command": ["--resume", "run", "--run.knn_layer=head"]})
    for settings in (facts.asked.run, facts.config.run):
        settings.knn_layer = "head"
    assert ("run.knn_layer", "head", "backbone", "command line") in facts.differences()
    facts.config.trainer.max_epochs = 7
    assert ("trainer.max_epochs", 7, 200, "auto") in facts.differences()
    facts.starts[1]["command"] += ["--extend", "4"]
    assert ("trainer.max_epochs", 7, 200, "command line") in facts.differences()


def test_unreadable_files_of_a_set_in_memory_have_no_number(run, copied):
    (copied / "07.jpg").write_bytes(b"no image")
    shutil.rmtree(run)
    run_tiny(copied, "--data.max_bad_fraction", "0.5", run_dir=str(run))
    told = write_report([run])
    assert told["images"] == [47]
    names = {point["name"] for point in values(read(told["report"]).specs["map-1"])}
    assert not any("07.jpg" in name for name in names)


def test_the_script_of_the_charts_ends_no_element():
    from moco.reports import charts

    text = charts.scripts()
    assert len(text) > 500_000 and not re.search("</script", text, re.IGNORECASE)
