"""The page: one file that shows what a run was, what it has learnt and what to change.

It holds its scripts and pictures, and fetches nothing. Whatever comes from a run, a file's name or
a class is escaped: text in the page, and plain values in the charts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moco.reports import charts
from moco.reports.facts import Facts, read_facts
from moco.reports.panel import Panel, as_text, make_panel
from moco.whole_files import output_file


def write_report(
    run_dirs: Sequence[Path], images: int = 5000, output: str = "", root: str = "", seed: int = 0
) -> dict[str, Any]:
    """Write the page of one run, or of several side by side.

    Args:
        images: On the maps of all runs together, at most.
        output: The file; empty: report.html in the first directory.
        root: Where the images are now; empty: where the runs found them.

    Returns:
        Path of the page, its bytes, the images on each map and the seconds that it took.

    Raises:
        UserError: A directory is none of a run, or the page cannot be written.
    """
    start = time.perf_counter()
    runs = [read_facts(path) for path in run_dirs]
    share = max(images // len(runs), 1)
    panels = [make_panel(facts, share, root, seed) for facts in runs]
    path = Path(output or run_dirs[0] / "report.html")
    text = render(panels)
    with output_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return {
        "report": str(path),
        "bytes": path.stat().st_size,
        "images": [panel.sight.get("count", 0) for panel in panels],
        "seconds": round(time.perf_counter() - start, 1),
    }


def render(panels: Sequence[Panel]) -> str:
    """Return the page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [panel.facts for panel in panels]
    return environment.get_template("page.html").render(
        runs=panels, curves=charts.curves(runs), settings=_settings(runs), scripts=charts.scripts()
    )


def _settings(runs: Sequence[Facts]) -> list[tuple[str, list[str], str]]:
    """List the settings to show: name, value of each run, and the default or who set it.

    Of one run these are its differences from the defaults, of several those among them.
    """
    if len(runs) == 1:
        found = runs[0].differences()
        return [(name, [as_text(value)], f"{by}; default {as_text(usual)}")
                for name, value, usual, by in found if name != "run.dir"]  # fmt: skip
    usual = {name: value for run in runs for name, _, value, _ in run.differences()}
    rows = []
    for name in usual:
        values = [as_text(run.config.value(name)) for run in runs]
        if len(set(values)) > 1 and name != "run.dir":
            rows.append((name, values, f"default {as_text(usual[name])}"))
    return sorted(rows)
