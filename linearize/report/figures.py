"""Charts as <figure> elements: title, legend, drawing, note, and the numbers as a table for whoever cannot hover."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.report.charts import FORMATS, Chart, Heat, Lines, Series, plotted
from linearize.report.markup import Markup, tag
from linearize.report.svg import draw, legend_line

NUMBERS = 60
"""Lines of a table of numbers, at most; report.json has all of them."""


def figures(charts: Sequence[Chart]) -> Markup:
    """Charts side by side, as many as fit."""
    return tag("div", {"class": "charts"}, *(figure(chart) for chart in charts))


def figure(chart: Chart) -> Markup:
    good = "good" if isinstance(chart, Heat) and chart.good_is_high else None
    body = (_legend(chart), draw(chart)) if isinstance(chart, Lines) else (draw(chart), _scale(chart))
    note = tag("p", {"class": "note"}, chart.note) if chart.note else None
    numbers = _numbers(chart) if isinstance(chart, Lines) else None
    return tag(
        "figure", {"class": good, "id": f"chart-{slug(chart.key)}"}, tag("h3", None, chart.title), *body, note, numbers
    )


def slug(key: str) -> str:
    """A name for files and anchors."""
    return "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in key.lower()).split())


def _legend(chart: Lines) -> Markup | None:
    series = plotted(chart)
    if [line.name for line in series] == [chart.y_label]:
        return None
    return tag("ul", {"class": "keys"}, *(tag("li", None, legend_line(line), line.name) for line in series))


def _scale(chart: Heat) -> Markup:
    low, high = (FORMATS[chart.format](value) for value in (chart.low, chart.high))
    scale = " (logarithmic)" if chart.log else ""
    return tag("div", {"class": "scale"}, low, tag("i", None), high + scale)


def _numbers(chart: Lines) -> Markup | None:
    series = plotted(chart)
    places = sorted({point.x for line in series for point in line.points})
    if len(places) > NUMBERS:
        return None
    head = [chart.x_label, *(line.name for line in series)]
    rows = [
        [
            f"{place:,.6g}" if place != int(place) else f"{int(place):,}",
            *(_value(chart, line, place) for line in series),
        ]
        for place in places
    ]
    return tag("details", None, tag("summary", None, "Numbers"), table(head, rows))


def _value(chart: Lines, line: Series, place: float) -> str:
    point = next((point for point in line.points if point.x == place), None)
    if point is None:
        return "–"
    shown = FORMATS[chart.y_format](point.y)
    return shown if point.error is None else f"{shown} ± {FORMATS[chart.y_format](point.error)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Names to the left, numbers to the right; it scrolls by itself where it is too wide."""
    top = tag("tr", None, *(tag("th", {"scope": "col"}, cell) for cell in head))
    body = (
        tag("tr", None, tag("th", {"scope": "row"}, row[0]), *(tag("td", None, cell) for cell in row[1:]))
        for row in rows
    )
    inside = tag("table", None, tag("thead", None, top), tag("tbody", None, *body))
    return tag("div", {"class": "scroll", "tabindex": "0"}, inside)
