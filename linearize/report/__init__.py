"""One page a run: what was converted and how, where the student equals its teacher and where not, what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linearize.report.charts import Chart
from linearize.report.facts import RunFacts, read_runs
from linearize.report.page import page, sections
from linearize.report.results import measures
from linearize.run_folder import write_json, write_text

PAGE = Path("report") / "index.html"
"""Where a run's page lies in its folder."""


def write_report(paths: Sequence[str | Path], out: str | Path | None = None, *, images: bool = True) -> Path:
    """Write the page of a run, or of several side by side; `report.json` and PNG files of its charts beside it.

    Args:
        paths: folders of `linearize convert`, ended or not.
        out: the page; default `report/index.html` in the run's folder, or in the current one for several runs.
        images: also draw the charts as PNG, with matplotlib.

    Returns:
        The page's path.

    Raises:
        RunError: a folder holds no run, a file cannot be read, or the page cannot be written.
    """
    runs = read_runs([Path(path) for path in paths])
    target = Path(out) if out is not None else (runs[0].folder / PAGE if len(runs) == 1 else PAGE)
    parts = sections(runs)
    charts = [chart for part in parts for chart in part.charts]
    write_text(target, page(runs, parts))
    write_json(target.with_name("report.json"), _numbers(runs, charts))
    if images:
        from linearize.report.png import write_images  # matplotlib takes a second to import

        write_images(charts, target.parent)
    return target


def _numbers(runs: Sequence[RunFacts], charts: Sequence[Chart]) -> dict[str, Any]:
    """All that the page shows, as plain data."""
    return {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "finished": run.finished,
                "facts": run.facts,
                "recipe": run.recipe,
                "measures": [{**measure._asdict(), "ratio": measure.ratio} for measure in measures(run)],
                "missing": [{"what": what, "command": command} for what, command in run.missing],
                "made": {kind: made.model_dump() for kind, made in run.made.items()},
            }
            for run in runs
        ],
        "charts": [asdict(chart) for chart in charts],
    }
