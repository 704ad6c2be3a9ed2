"""What is drawn, as data: line charts and heat maps, with the scales that place them. `svg.py` and `png.py` draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Format = Literal["number", "exact", "count", "length", "bytes", "seconds", "percent", "share"]


class Point(NamedTuple):
    """`error` is the standard error of y."""

    x: float
    y: float
    error: float | None = None


@dataclass(frozen=True)
class Series:
    """One line. `tone` 0, 1, 2, .. picks a colour and a marker; None is the teacher's grey, dashed."""

    name: str
    points: tuple[Point, ...]
    tone: int | None


@dataclass(frozen=True)
class Lines:
    """A line chart. `marks` are vertical lines with a label."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_format: Format = "length"
    y_format: Format = "number"
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None  # default: that of the values
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Heat:
    """A heat map. `values[row][column]`, None where nothing was measured; colours run from `low` to `high`."""

    key: str
    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    low: float
    high: float
    format: Format = "number"
    log: bool = False
    written: bool = False  # values inside their cells
    good_is_high: bool = False
    note: str = ""


Chart = Lines | Heat


def short(value: float) -> str:
    """Three digits: `0.0123`, `12.3`, `1,230`, `1.2e+06`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}".rstrip("0").rstrip(".")


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    return f"{short(value)}{units[index]}"


def _length(value: float) -> str:
    """`512`, `4K` for 4,000 as for 4,096; the exact number stands in tables."""
    if value >= 1e6:
        return f"{short(value / 1e6)}M"
    if value < 1000:
        return short(value)
    return f"{round(value / 1024) if value % 1024 == 0 else float(f'{value / 1000:.3g}'):g}K"


FORMATS: dict[Format, Callable[[float], str]] = {
    "number": short,
    "exact": lambda value: f"{value:#.3g}" if 0.001 <= abs(value) < 100 else f"{value:,.1f}",
    "count": lambda value: f"{value:,.0f}",
    "length": _length,
    "bytes": lambda value: _scaled(value, 1e3, (" B", " kB", " MB", " GB", " TB")),
    "seconds": lambda value: f"{short(value)} s" if value >= 1 else f"{short(1e3 * value)} ms",
    "percent": lambda value: f"{100 * value:.0f} %",
    "share": lambda value: f"{100 * value:.1f} %",
}


class Scale(NamedTuple):
    """Maps low .. high to `start` .. `stop`, evenly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.stop - self.start)


def span(values: Iterable[float], *, log: bool, room: float = 0.06) -> tuple[float, float]:
    """The range of an axis: that of the values, and some room on both sides. Zero stays zero."""
    found = sorted(values)
    low, high = found[0], found[-1]
    if log:
        pad = (high / low) ** room if high > low else 1.5
        return low / pad, high * pad
    pad = room * (high - low) or 0.5 * abs(high) or 1.0
    return (0.0 if low >= 0 and low - pad < 0 else low - pad), high + pad


def ticks(low: float, high: float, *, log: bool, most: int = 6) -> list[float]:
    """Round numbers within low .. high, at most `most` of them."""
    if log:
        for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / most)]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def measured_ticks(values: Iterable[float], most: int = 6) -> list[float]:
    """The values of a log axis themselves, thinned: lengths are chosen by whoever measures, and shall be read off.

    Of neighbours whose numbers would overlap the larger one stays.
    """
    kept: list[float] = []
    found = sorted(set(values), reverse=True)
    for value in found:
        if not kept or math.log(kept[-1] / value) >= math.log(found[0] / found[-1]) / 10:
            kept.append(value)
    kept.reverse()
    return kept[:: math.ceil(len(kept) / most)] if kept else []


def plotted(chart: Lines) -> tuple[Series, ...]:
    """The series without what an axis cannot show; series of nothing are left out."""
    kept = []
    for series in chart.series:
        points = tuple(
            point
            for point in series.points
            if math.isfinite(point.y) and (point.y > 0 or not chart.log_y) and (point.x > 0 or not chart.log_x)
        )
        if points:
            kept.append(Series(series.name, points, series.tone))
    return tuple(kept)


class Axes(NamedTuple):
    """The ranges of a line chart, and the places that carry a number."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: list[float]
    y_ticks: list[float]


def axes_of(chart: Lines, series: Sequence[Series]) -> Axes:
    """Of what is plotted, error bars included."""
    points = [point for line in series for point in line.points]
    x_range = span((point.x for point in points), log=chart.log_x, room=0.03)
    heights = [y for point in points for y in (point.y, *ends(point)) if y > 0 or not chart.log_y]
    y_range = chart.y_range or span(heights, log=chart.log_y)
    x_ticks = measured_ticks(p.x for p in points) if chart.log_x else ticks(*x_range, log=False, most=5)
    if chart.x_format == "count":
        x_ticks = [value for value in x_ticks if value == round(value)]
    return Axes(x_range, y_range, x_ticks, ticks(*y_range, log=chart.log_y))


def ends(point: Point) -> tuple[float, ...]:
    """Of its error bar; nothing without one."""
    return () if point.error is None else (point.y - point.error, point.y + point.error)


def heat_share(chart: Heat, value: float) -> float:
    """Where a value lies between `low` (0) and `high` (1)."""
    low, high = chart.low, chart.high
    if chart.log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, chart.low))
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def thinned(points: Sequence[Point], most: int = 160) -> tuple[Point, ...]:
    """Means over neighbours, so that a long run is a line and not a cloud; short runs as they are."""
    if len(points) <= most:
        return tuple(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(Point(sum(p.x for p in group) / len(group), sum(p.y for p in group) / len(group)) for group in groups)
