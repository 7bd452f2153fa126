"""A panel: what the page shows of one run, made part by part.

A part that cannot be made leaves a note, and no hole in the others.
"""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moco.checkpoints.load import load_encoder
from moco.checkpoints.read import read_state
from moco.config import DataConfig, UserError
from moco.images import aside, sources
from moco.images.formats import escaped, shown
from moco.images.image_source import ImageSource
from moco.images.pairs import find_partners
from moco.reports import charts, sights
from moco.reports.advice import advise
from moco.reports.blindness import measure, sentence
from moco.reports.facts import Facts
from moco.reports.pairs import make_pairs, name_of
from moco.reports.pictures import as_address, picture, sprite
from moco.reports.sights import Sample
from moco.run_directory import same_images

log = logging.getLogger("moco")
_PAIRS, _QUERIES, _TYPICAL, _CENTRAL, _TWINS = 10, 8, 16, 8, 12


@dataclass
class Panel:
    """What the page shows of one run; what could not be made is empty, and `notes` say why.

    Attributes:
        about: Names and values, of what was run.
        notes: What is missing, and why.
        advice: What is wrong, and what to set.
        labelled: Whether the images have labels.
        sight: Name of a part of the page to what it shows.
    """

    facts: Facts
    about: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    labelled: bool = False
    sight: dict[str, Any] = field(default_factory=dict)


def make_panel(facts: Facts, images: int, root: str, seed: int) -> Panel:
    """Look at one run.

    Args:
        images: That are looked at, at most.
        root: Where its images are now; empty: where it found them.
    """
    panel = Panel(facts)
    data = replace(facts.config.data, root=root) if root else facts.config.data
    if root and data.dataset == "own":
        data = replace(data, dataset="folder")
    log.info("looking at %s", facts.path)
    source, is_own = _part(panel, "its images", lambda: _open(facts, data)) or (None, False)
    network = _part(panel, "its network", lambda: _load(facts))
    panel.about = _about(facts, source)
    panel.advice = advise(facts, len(source) if source and is_own else 0)
    if not source:
        return panel
    panel.labelled = source.labels is not None
    if is_own:
        pairs = _part(panel, "the views", lambda: _pairs(facts, source, data))
        panel.sight["pairs"] = pairs or []
    else:
        where = "The images below are not those of the run, so the page lacks the views"
        panel.notes.append(f"{where}: --root takes the place where these are.")
    if not network:
        return panel
    on_gpu = facts.config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    network.to("cuda" if on_gpu else "cpu")
    sample = _part(
        panel, "what it makes of images", lambda: sights.look(network, source, data, images, seed)
    )
    if sample is None:
        return panel
    if sample.is_one_point and len(sample.rows) > 1:
        panel.notes.append("All images have the same features, so there is nothing to compare.")
    else:
        _show(panel, sample, seed)
        changes = _part(panel, "what it is blind to", lambda: measure(network, source, data, seed))
        if changes:
            says = sentence(changes, panel.labelled)
            panel.sight["blind"] = {"spec": charts.bars(changes), "says": says}
    return panel


def _part(panel: Panel, name: str, make: Callable[[], Any]) -> Any:
    """Make a part of the page; where the user could mend what is wrong, note it and return None."""
    try:
        return make()
    except UserError as error:
        panel.notes.append(f"The page lacks {name}: {escaped(as_text(str(error)))}.")
        return None


def _open(facts: Facts, data: DataConfig) -> tuple[ImageSource, bool]:
    """Open the training images as the run numbers them, and tell whether they are the run's.

    Raises:
        UserError: They are not there.
    """
    if (undecided := facts.config.undecided()) and undecided[0].startswith("data."):
        raise UserError(f"the run has not decided {undecided[0]}")
    if data.dataset == "own":
        raise UserError(
            "the run got them from Python, which no page can ask for them: --root FOLDER shows "
            "images in their place, and moco.embed(run, images, DIR, map=True) makes their map"
        )
    source = sources.open_source(data, "train")
    found = sources.identify(source, data.root)
    stored = (read_state(facts.checkpoint) if facts.checkpoint else {}).get("images") or found
    if not same_images(found, stored):
        return source, False
    held_out = facts.decided.get("held_out")
    held_out = held_out if isinstance(held_out, int) else None
    source, _ = aside.part(source, data, facts.config.run, held_out)
    bad = facts.path / "bad_files.txt"
    if facts.decided.get("resident") == "streamed" or not source.paths or not bad.is_file():
        return source, True
    # Unreadable files of a set that was held in memory have no number.
    with bad.open(encoding="utf-8", errors="surrogateescape") as file:
        dropped = {line.split("\t")[0] for line in file}
    kept = [row for row, path in enumerate(source.paths) if escaped(path) not in dropped]
    if not kept:
        raise UserError("none of them can be read")
    return source.rows(torch.tensor(kept)), True


def _load(facts: Facts) -> nn.Module:
    """Load the query backbone from the newest checkpoint.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    if facts.checkpoint is None:
        raise UserError(f"no whole checkpoint lies in {facts.path / 'checkpoints'}")
    return load_encoder(facts.checkpoint).backbone


def _sides(data: DataConfig) -> str:
    """Say how large views are, and images where they are larger."""
    larger = f", judged at {data.image_size} px" if data.view_side != data.image_size else ""
    return f"{data.view_side} px{larger}"


def _about(facts: Facts, source: ImageSource | None) -> list[tuple[str, str]]:
    """List what was run, for people."""
    config, result = facts.config, facts.result
    start = facts.starts[0] if facts.starts else {}
    # A run measures the time of its last process.
    since = f" since step {facts.resumed_at[-1]:,}" if facts.resumed_at else ""
    found = {
        "recipe": start.get("recipe", ""),
        "options": shlex.join(map(str, start.get("command", []))),
        "started": start.get("at", ""),
        "resumed": ", ".join(f"after step {step:,}" for step in facts.resumed_at),
        "images": f"{len(source):,} of {shown(source.name)}" if source else config.data.root,
        "classes": f"{len(source.classes):,}" if source and source.classes else "no labels",
        "network": f"{config.model.backbone}, views of {_sides(config.data)}",
        "contrast": f"queue {config.model.queue_size}, temperature {config.model.temperature:g}, "
        f"batch {config.data.batch_size}",
        "steps": f"{facts.rows[-1]['step']:,.0f}" if facts.rows else "none read",
        "time": f"{result['seconds'] / 60:.1f} min{since}" if result.get("seconds") else "",
        "speed": f"{result['images_per_second']:,.0f} images/s"
        if result.get("images_per_second") else "",
        "hardware": ", ".join(filter(None, [
            start.get("device", ""), str(facts.decided.get("precision", "")),
            start.get("machine", ""),
        ])),
        "code": ", ".join(filter(None, [
            start.get("commit", ""),
            *(f"{name} {number}" for name, number in start.get("versions", {}).items()),
        ])),
        "run directory": str(facts.path),
    }  # fmt: skip
    if source is None:
        del found["classes"]
    return [(name, as_text(value)) for name, value in found.items() if value]


def _pairs(facts: Facts, source: ImageSource, data: DataConfig) -> list[dict[str, Any]]:
    """Show images with the views of three epochs: the first, a middle one and the last."""
    epochs = int(facts.latest().get("epoch", 1.0) - 1e-6)
    chosen = sorted({0, epochs // 2, epochs})
    rows = [len(source) * place // _PAIRS for place in range(min(_PAIRS, len(source)))]
    rows = sorted({min(row, len(source) - 1) for row in rows})
    seed = facts.config.run.seed
    partners = find_partners(source, data, seed)
    pairs = make_pairs(source, data, seed, chosen, rows, partners)
    return [
        {
            "image": {"src": as_address(picture(pair.image)), "name": pair.name, "label": ""},
            "epochs": [
                (epoch + 1, [as_address(picture(view)) for view in pair.views[2 * n : 2 * n + 2]])
                for n, epoch in enumerate(chosen)
            ],
        }
        for pair in pairs
    ]


def _show(panel: Panel, sample: Sample, seed: int) -> None:
    """Put into the panel what the network makes of the sample."""
    sight, labels, count = panel.sight, sample.labels, len(sample.rows)
    pixels = [None] * count  # a picture is made once

    def image(place: int, note: str = "", kind: str = "") -> dict[str, str]:
        pixels[place] = pixels[place] or as_address(picture(sample.tiles[place]))
        name = name_of(sample.source, int(sample.rows[place]))
        label = as_text(labels[place]) if labels else ""
        found = {"src": pixels[place], "name": name, "label": label}
        return found | {"note": note, "kind": kind}

    def near(query: int) -> list[dict[str, str]]:
        found = sample.neighbours[query, :8].tolist(), sample.similarity[query, :8].tolist()
        others = [
            image(other, f"{cosine:.2f}", _same(labels, query, other))
            for other, cosine in zip(*found, strict=True)
        ]
        return [image(query, kind="query"), *others]

    sight["count"] = count
    if count > 1:
        sight["neighbours"] = [near(query) for query in range(min(_QUERIES, count))]
        usual, odd = sights.typical(sample, _TYPICAL)
        sight["typical"], sight["odd"] = [*map(image, usual)], [*map(image, odd)]
        sight["twins"] = [
            (image(one), image(other), f"{cosine:.3f}")
            for one, other, cosine in sights.twins(sample)[:_TWINS]
        ]
    found = sights.clusters(sample, seed)
    sight["clusters"] = [
        {
            "count": len(cluster),
            "share": f"{len(cluster) / count:.0%}",
            "labels": _commonest(labels, cluster),
            "images": [image(place) for place in cluster[:_CENTRAL]],
        }
        for cluster in found
    ]
    places = _part(panel, "the map", lambda: sights.make_map(sample, seed))
    if places is not None:
        address, columns, side = sprite(sample.tiles, 48 if count > 2000 else 64)
        spec = charts.make_chart_of_map(sample, places, found)
        sight["map"] = {"spec": spec, "sprite": address, "columns": columns, "side": side}


def _same(labels: list[str] | None, one: int, other: int) -> str:
    """Tell whether two images have one label, as a class of the page's style."""
    if labels is None:
        return ""
    return "same" if labels[one] == labels[other] else "other"


def _commonest(labels: list[str] | None, members: Sequence[int]) -> str:
    """Name the commonest labels of a cluster, with their shares."""
    if labels is None:
        return ""
    counts = Counter(labels[place] for place in members).most_common(3)
    return ", ".join(f"{as_text(name)} ({number / len(members):.0%})" for name, number in counts)


def as_text(value: Any) -> str:
    """Return a setting as a recipe would write it, on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return escaped(text.encode("utf-8", "backslashreplace").decode()) or "(empty)"
