"""Charts: curves, the map and what an encoder is blind to, as Vega-Lite that the page draws.

Data go into a chart as plain values, so that names of files and classes stay text.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import vl_convert

from moco.reports.blindness import Change
from moco.reports.facts import Facts
from moco.reports.pairs import name_of
from moco.reports.sights import Sample

Spec = dict[str, Any]
_POINTS = 500  # of a curve
_COLOURS = 19  # classes with a colour of their own; others share one
OTHERS = "others"
# Curves by their names in metrics.csv, with what they are called. Others follow under their names.
_TITLES = {
    "train/loss": "loss",
    "val/knn_top1": "kNN, % right",
    "val/retrieval": "images whose other view is the nearest, % (higher is better)",
    "val/rankme": "RankMe, directions in use (higher is better)",
    "val/lidar": "LiDAR, directions that tell images apart (higher is better)",
    "val/alignment": "alignment, distance of an image's views (lower is better)",
    "val/uniformity": "uniformity, 0 is a collapse (lower is better)",
    "train/contrast_top1": "own key found among the negatives, share",
    "train/spread": "spread of the embeddings (1: even, 0: one point)",
    "train/lr": "learning rate",
    "train/queue_fill": "queue, share filled",
    "train/images_per_second": "images per second",
    "train/wait_share": "share of the time waiting for images",
}


@functools.cache
def scripts() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that fetches nothing."""
    return re.sub("</(script)", r"<\\/\1", vl_convert.javascript_bundle(), flags=re.IGNORECASE)


def curves(runs: Sequence[Facts]) -> list[tuple[str, Spec]]:
    """Return the title and the chart of each metric that any of the runs has read."""
    read = {name for run in runs for row in run.rows for name in row}
    names = [name for name in _TITLES if name in read]
    names += sorted(name for name in read if name.startswith("val/") and name not in _TITLES)
    return [(_TITLES.get(name, name), _curve(runs, name)) for name in names]


def _curve(runs: Sequence[Facts], metric: str) -> Spec:
    """Draw one metric of all runs over the steps, with chance and resumes where there are any."""
    several, values, marks, chance = len(runs) > 1, [], [], []
    for number, run in enumerate(runs, 1):
        name = f"{number}: {run.name}"
        for step, value in _thinned(run.curve(metric)):
            values.append({"step": step, "value": value, "run": name})
        marks += [{"step": step, "run": name} for step in run.resumed_at]
        if metric == "train/loss":
            line = _thinned(run.curve("train/chance_loss"))
            chance += [{"step": step, "value": value, "run": name} for step, value in line]
    step = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5, format="~s"))
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    shown = ["step:Q", alt.Tooltip("value:Q", format=".4~g")]
    shown += ["run:N"] if several else []
    layers = [
        alt.Chart(alt.Data(values=values))
        .mark_line(point={"size": 18} if len(values) < 60 * len(runs) else False, strokeWidth=1.8)
        .encode(step, value, tooltip=shown, **_by_run(runs))
    ]
    if chance:
        dashed = alt.Chart(alt.Data(values=chance)).mark_line(strokeDash=[5, 4], opacity=0.7)
        layers.append(dashed.encode(step, value, detail="run:N", **_by_run(runs, legend=False)))
    if marks:
        rule = alt.Chart(alt.Data(values=marks)).mark_rule(strokeDash=[2, 3], opacity=0.7)
        layers.append(
            rule.encode(alt.X("step:Q"), tooltip=[alt.Tooltip("step:Q", title="resumed")])
        )
    return alt.layer(*layers).properties(width="container", height=150).to_dict()


def _by_run(runs: Sequence[Facts], legend: bool = True) -> dict[str, Any]:
    """Return the encoding that gives each of several runs a colour."""
    if len(runs) == 1:
        return {}
    names = [f"{number}: {run.name}" for number, run in enumerate(runs, 1)]
    key = alt.Legend(orient="bottom", title=None, columns=1, labelLimit=320) if legend else None
    return {"color": alt.Color("run:N", scale=alt.Scale(domain=names), legend=key)}


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keep some hundred points of a curve, with the last one."""
    every = -(-len(curve) // _POINTS)
    return [*curve[:: max(every, 1)], *curve[-1:]] if every > 1 else [*curve]


def make_chart_of_map(sample: Sample, places: np.ndarray, found: Sequence[list[int]]) -> Spec:
    """Draw the images as points that can be zoomed, and coloured by label or by cluster."""
    number = {place: c for c, each in enumerate(found, 1) for place in each}
    labels, values = sample.labels, []
    common = {name for name, _ in Counter(labels or ()).most_common(_COLOURS)}
    for place, (x, y) in enumerate(places.tolist()):
        point = {"x": round(x, 4), "y": round(y, 4), "i": place}
        point["name"] = name_of(sample.source, int(sample.rows[place]))
        point["cluster"] = f"cluster {number[place]:02d}" if place in number else OTHERS
        if labels:
            point["label"] = labels[place]
            point["colour"] = labels[place] if labels[place] in common else OTHERS
        values.append(point)
    chart = alt.Chart(alt.Data(values=values))
    group = "cluster"
    if labels:
        choice = alt.binding_select(options=["label", "cluster"], name="colour by ")
        chart = chart.add_params(alt.param(name="by", value="label", bind=choice))
        chart = chart.transform_calculate(group="by == 'label' ? datum.colour : datum.cluster")
        group = "group"
    key = alt.Legend(
        orient="bottom", title=None, columns=4, symbolLimit=24, symbolOpacity=1, labelLimit=110
    )
    hidden = alt.Axis(labels=False, ticks=False, grid=False, domain=False, title=None)
    return (
        chart.mark_circle(size=26 if len(values) > 1500 else 48, opacity=0.8)
        .encode(
            alt.X("x:Q", axis=hidden, scale=alt.Scale(domain=[-0.03, 1.03])),
            alt.Y("y:Q", axis=hidden, scale=alt.Scale(domain=[-0.03, 1.03])),
            color=alt.Color(f"{group}:N", scale=alt.Scale(scheme="tableau20"), legend=key),
            tooltip=alt.Tooltip("name:N"),  # the page shows the picture beside it
        )
        .properties(width="container", height=520)
        .interactive()
        .to_dict()
    )


def bars(changes: Sequence[Change]) -> Spec:
    """Draw what remains of the similarity after each change."""
    values = [{"change": c.name, "remains": round(100 * c.remains, 1)} for c in changes]
    order = [change.name for change in changes]
    least = min(0.0, *(value["remains"] for value in values))
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar(cornerRadiusEnd=3, height={"band": 0.75})
        .encode(
            alt.X(
                "remains:Q",
                title="similarity that remains, %",
                scale=alt.Scale(domain=[max(least, -50.0), 100], clamp=True),
                axis=alt.Axis(tickCount=5),
            ),
            alt.Y("change:N", sort=order, title=None, axis=alt.Axis(labelLimit=170)),
            tooltip=["change:N", alt.Tooltip("remains:Q", title="remains, %")],
        )
        .properties(width="container", height=21 * len(values))
        .to_dict()
    )
