"""Charts as inline SVG: colours from the page's style sheet, values on hover, no script.

Drawn 400 units wide, so that on a phone a unit is a pixel and the text stays readable.
"""

from __future__ import annotations

from linearize.report.charts import (
    FORMATS,
    Chart,
    Heat,
    Lines,
    Scale,
    Series,
    axes_of,
    ends,
    heat_share,
    plotted,
)
from linearize.report.markup import Markup, join, tag

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 40
SHADES = 20
"""Steps of a heat map's colours; the style sheet has one class for each."""

MARKERS, TONES = 4, 6
"""Shapes of points (circle, square, diamond, triangle) and colours; twelve lines can be told apart."""


def draw(chart: Chart) -> Markup:
    """The chart as an <svg> element."""
    return _lines(chart) if isinstance(chart, Lines) else _heat(chart)


def _frame(chart: Chart, height: float, summary: str, *children: Markup) -> Markup:
    attributes = {"viewBox": f"0 0 {WIDTH} {height:.0f}", "role": "img", "aria-label": f"{chart.title}. {summary}"}
    return tag("svg", attributes, *children)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> Markup:
    return tag("text", {"x": x, "y": y, "class": kind, "text-anchor": anchor}, text)


def _lines(chart: Lines) -> Markup:
    series = plotted(chart)
    axes = axes_of(chart, series)
    x = Scale(*axes.x_range, LEFT, WIDTH - RIGHT, chart.log_x)
    y = Scale(*axes.y_range, HEIGHT - BOTTOM, TOP, chart.log_y)
    parts = [_text(8, 13, chart.y_label, "label", "start")]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, chart.x_label, "label", "end"))
    for value in axes.y_ticks:
        place = y(value)
        parts.append(tag("line", {"class": "grid", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": place, "y2": place}))
        parts.append(_text(LEFT - 6, place + 3.5, FORMATS[chart.y_format](value), "tick", "end"))
    bottom = HEIGHT - BOTTOM
    parts.append(tag("line", {"class": "axis", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": bottom, "y2": bottom}))
    for value in axes.x_ticks:
        parts.append(_text(x(value), bottom + 15, FORMATS[chart.x_format](value), "tick"))
    for value, label in chart.marks:
        if axes.x_range[0] <= value <= axes.x_range[1]:
            place = x(value)
            right = place < WIDTH * 0.6
            parts.append(tag("line", {"class": "mark", "x1": place, "x2": place, "y1": TOP, "y2": bottom}))
            parts.append(_text(place + (4 if right else -4), TOP + 9, label, "mark-label", "start" if right else "end"))
    parts += [_line(line, chart, x, y) for line in series]
    names = ", ".join(line.name for line in series)
    return _frame(chart, HEIGHT, f"Lines of {names}; {chart.y_label} by {chart.x_label}.", *parts)


def _line(line: Series, chart: Lines, x: Scale, y: Scale) -> Markup:
    """The line, bars of standard errors, and a marker a point that says its numbers."""
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in line.points)
    parts = [tag("polyline", {"class": "line", "points": path})]
    small = len(line.points) > 40
    for point in line.points:
        left, top = x(point.x), y(point.y)
        said = f"{line.name}: {FORMATS[chart.y_format](point.y)} at {FORMATS[chart.x_format](point.x)}"
        if point.error is not None:
            said += f" (standard error {FORMATS[chart.y_format](point.error)})"
            low, high = ends(point)
            if low > 0 or not chart.log_y:
                parts.append(tag("line", {"class": "error", "x1": left, "x2": left, "y1": y(low), "y2": y(high)}))
        parts.append(_marker(left, top, line.tone, small, said))
    return tag("g", {"class": _tone(line)}, *parts)


def _tone(line: Series) -> str:
    return "teacher" if line.tone is None else f"tone{line.tone % TONES}"


def _marker(x: float, y: float, tone: int | None, small: bool, said: str) -> Markup:
    """A small shape; where there are many points, one that can be hovered but not seen."""
    title = tag("title", None, said)
    if small:
        return tag("circle", {"class": "ghost", "cx": x, "cy": y, "r": 5}, title)
    if tone is None or tone % MARKERS == 0:
        return tag("circle", {"class": "dot", "cx": x, "cy": y, "r": 3.2}, title)
    shapes = {1: "M-3-3h6v6h-6z", 2: "M0-4.2L4.2 0L0 4.2L-4.2 0z", 3: "M0-4L4 3.2H-4z"}
    place = f"translate({x:.1f} {y:.1f})"
    return tag("path", {"class": "dot", "d": shapes[tone % MARKERS], "transform": place}, title)


def _heat(chart: Heat) -> Markup:
    left = 16 + 6.2 * max(len(name) for name in chart.rows)
    width = (WIDTH - RIGHT - left) / len(chart.columns)
    height = max(7.0, min(30.0, 220 / len(chart.rows)))
    bottom = TOP + height * len(chart.rows)
    parts = [_text(8, 13, chart.y_label, "label", "start")]
    parts.append(_text(WIDTH - RIGHT, bottom + 34, chart.x_label, "label", "end"))
    every = max(1, round(12 / height))
    for index, name in enumerate(chart.rows):
        if index % every == 0:
            parts.append(_text(left - 6, TOP + height * (index + 0.5) + 3.5, name, "tick", "end"))
    longest = max(len(name) for name in chart.columns)
    step = max(1, -(-int(longest * 6.2 + 8) // max(1, int(width))))
    for index, name in enumerate(chart.columns):
        if index % step == 0:
            parts.append(_text(left + width * (index + 0.5), bottom + 15, name, "tick"))
    for row, values in enumerate(chart.values):
        for column, value in enumerate(values):
            box = (left + width * column, TOP + height * row, width, height)
            parts.append(_cell(chart, value, box, f"{chart.rows[row]}, {chart.columns[column]}"))
    summary = f"Colours from {FORMATS[chart.format](chart.low)} to {FORMATS[chart.format](chart.high)}."
    return _frame(chart, bottom + BOTTOM, summary, *parts)


def _cell(chart: Heat, value: float | None, box: tuple[float, float, float, float], place: str) -> Markup:
    left, top, width, height = box
    area: dict[str, str | int | float | None] = {"x": left, "y": top, "width": width - 0.6, "height": height - 0.6}
    if value is None:
        return tag("rect", {**area, "class": "none"}, tag("title", None, f"{place}: not measured"))
    shade = round(SHADES * heat_share(chart, value))
    said = FORMATS[chart.format](value)
    cell = tag("rect", {**area, "class": f"h{shade}"}, tag("title", None, f"{place}: {said}"))
    if not chart.written or width < 26:
        return cell
    kind = "cell dark" if shade > SHADES // 2 else "cell"
    return join([cell, _text(left + width / 2, top + height / 2 + 3.5, said, kind)])


def legend_line(line: Series) -> Markup:
    """A piece of the line, for a legend."""
    drawn = tag(
        "g",
        {"class": _tone(line)},
        tag("polyline", {"class": "line", "points": "0,5 26,5"}),
        _marker(13, 5, line.tone, False, line.name),
    )
    return tag("svg", {"viewBox": "0 0 26 10", "aria-hidden": "true"}, drawn)
