"""Charts of how a run was trained, from metrics.jsonl."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from linearize.report.charts import Chart, Heat, Lines, Point, Series, thinned
from linearize.report.facts import RunFacts

COLUMNS = 40
"""Of a heat map over training: more steps than that are averaged."""

LAYER = re.compile(r"layer_(\d+)$")


def training_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Losses by stage, held-out perplexity over all stages; of one run also each layer's error and linear branch."""
    found: list[Chart] = [*_losses(runs), *_heldout(runs)]
    if len(runs) == 1:
        found += [*_layer_errors(runs[0]), *_linear_shares(runs[0])]
    return found


def trained_tokens(run: RunFacts) -> int:
    """So far, over all stages."""
    return sum(records[-1]["tokens"] for records in _stages(run).values())


def teacher_perplexity(run: RunFacts) -> dict[str, float]:
    """Of the teacher on held-out text, by source."""
    if "perplexity" in run.results:
        return {row["source"]: row["teacher"] for row in run.results["perplexity"]}
    return dict(run.results.get("teacher_perplexity", {}))


def _stages(run: RunFacts) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for record in run.records:
        found.setdefault(record["stage"], []).append(record)
    return found


def _losses(runs: Sequence[RunFacts]) -> list[Lines]:
    """One chart a stage; runs share one where their stages have the same place and name."""
    series: dict[tuple[int, str], list[Series]] = {}
    most = 0
    for tone, run in enumerate(runs):
        for index, records in _stages(run).items():
            points = [Point(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
            most = max(most, len(points))
            name = "loss" if len(runs) == 1 else run.name
            series.setdefault((index, records[0]["name"]), []).append(Series(name, thinned(points), tone))
    note = "Points are means over neighbouring steps." if most > 160 else ""
    return [
        Lines(
            key=f"loss-{index + 1}-{name}",
            title=f"Stage {index + 1}, {name}: training loss",
            x_label="tokens of this stage",
            y_label="loss",
            series=tuple(lines),
            x_format="length",
            log_y=True,
            note=note,
        )
        for (index, name), lines in sorted(series.items())
    ]


def _heldout(runs: Sequence[RunFacts]) -> list[Lines]:
    """Perplexity over that of the teacher, from before the first step to the end."""
    found: list[Series] = []
    marks: list[tuple[float, str]] = []
    for tone, run in enumerate(runs):
        teacher, offset = teacher_perplexity(run), 0.0
        moments = [(0.0, run.results.get("untrained", {}))]
        for records in _stages(run).values():
            moments += [(offset + r["tokens"], measured) for r in records if (measured := _evaluated(r, teacher))]
            offset += records[-1]["tokens"]
            if len(runs) == 1:
                marks.append((offset, f"end of {records[0]['name']}"))
        by_source = {
            source: [Point(place, values[source] / teacher[source]) for place, values in moments if source in values]
            for source in teacher
        }
        if len(runs) == 1:
            found += [Series(source, tuple(points), n) for n, (source, points) in enumerate(by_source.items())]
        elif by_source:
            places = [[p.x for p in points] for points in by_source.values()]
            means = [math.exp(sum(map(math.log, ys)) / len(ys)) for ys in zip(*_ys(by_source), strict=False)]
            found.append(Series(run.name, tuple(map(Point, places[0], means)), tone))
    found = [series for series in found if series.points]
    if not found:
        return []
    title = "Held-out perplexity, student over teacher"
    note = "Mean over sources, of the logarithms." if len(runs) > 1 else "1 is the teacher."
    return [
        Lines("heldout", title, "tokens, all stages", "ratio", tuple(found), log_y=True, marks=tuple(marks), note=note)
    ]


def _ys(by_source: Mapping[str, Sequence[Point]]) -> list[list[float]]:
    return [[p.y for p in points] for points in by_source.values()]


def _evaluated(record: Mapping[str, Any], sources: Iterable[str]) -> dict[str, float]:
    """Held-out perplexities of a record, beside which stand readings of layers."""
    values = {source: record.get(f"eval/{source}") for source in sources}
    return {source: value for source, value in values.items() if value is not None}


def _layers(record: Mapping[str, Any], prefix: str) -> dict[int, float]:
    """A number for each layer, of keys such as `error/layer_03`."""
    found = {}
    for key, value in record.items():
        match = LAYER.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is not None and value is not None:
            found[int(match[1])] = value
    return found


def _layer_errors(run: RunFacts) -> list[Heat]:
    charts = []
    for index, records in _stages(run).items():
        moments = [(_tokens(r["tokens"]), layers) for r in records if (layers := _layers(r, "error/"))]
        size = max(1, math.ceil(len(moments) / COLUMNS))
        groups = [moments[start : start + size] for start in range(0, len(moments), size)]
        averaged = [(group[-1][0], _mean([layers for _, layers in group])) for group in groups]
        title = f"Stage {index + 1}, {records[0]['name']}: error of each layer, training text"
        charts += _heat(f"layer-error-{index + 1}", title, averaged)
    moments, offset = [], 0
    for records in _stages(run).values():
        moments += [(_tokens(offset + r["tokens"]), found) for r in records if (found := _layers(r, "eval/error/"))]
        offset += records[-1]["tokens"]
    return charts + _heat("layer-error-heldout", "Error of each layer, held-out text, all stages", moments)


def _heat(key: str, title: str, moments: Sequence[tuple[str, Mapping[int, float]]]) -> list[Heat]:
    if len(moments) < 2:
        return []
    layers = sorted({layer for _, found in moments for layer in found})
    values = tuple(tuple(found.get(layer) for _, found in moments) for layer in layers)
    seen = [value for row in values for value in row if value is not None and value > 0]
    return [
        Heat(
            key=key,
            title=title,
            x_label="tokens",
            y_label="layer",
            columns=tuple(name for name, _ in moments),
            rows=tuple(map(str, layers)),
            values=values,
            low=min(seen),
            high=max(seen),
            log=True,
            note="Squared error of the mixed values over the teacher's: 0 is the teacher, 1 no better than silence.",
        )
    ]


def _linear_shares(run: RunFacts) -> list[Lines]:
    """Of the denominator, at the last reading."""
    last = next((r for r in reversed(run.records) if _layers(r, "eval/linear_share_p50/")), None)
    if last is None:
        return []
    series = tuple(
        Series(
            name, tuple(Point(layer, value) for layer, value in _layers(last, f"eval/linear_share_{rank}/").items()), n
        )
        for n, (rank, name) in enumerate((("p1", "1st percentile"), ("p50", "median"), ("p99", "99th percentile")))
    )
    title = "Weight of the linear branch, at the end"
    return [Lines("linear-share", title, "layer", "share of the denominator", series, "count", "percent")]


def _mean(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {layer: sum(each[layer] for each in found) / len(found) for layer in found[0]}


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2g}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
