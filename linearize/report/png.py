"""The same charts as PNG files, for papers and posts; needs matplotlib (`pip install linearize[report]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.report.charts import FORMATS, Chart, Heat, Lines, Scale, axes_of, heat_share, plotted
from linearize.report.figures import slug

TEACHER, TONES = "#6f747b", ("#0b6f6a", "#c2571a", "#6a4fb3", "#b02a5b", "#2f6fb7", "#6b7a12")
MARKERS = "osD^"
BAD, GOOD = ("#f4efe4", "#8e2f16"), ("#f1efe8", "#0b6f6a")


def write_images(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """One file a chart, `folder/<key>.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for chart in charts:
        figure = Figure(figsize=(5.2, 3.4))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(left=0.15, right=0.9, bottom=0.15, top=0.91)  # a layout engine would draw all twice
        axes = figure.add_subplot()
        axes.set_title(chart.title, fontsize=9, loc="left")
        axes.set_xlabel(chart.x_label, fontsize=8)
        axes.set_ylabel(chart.y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        if isinstance(chart, Lines):
            _lines(axes, chart)
        else:
            _heat(figure, axes, chart)
        path = folder / f"{slug(chart.key)}.png"
        figure.savefig(path, dpi=160)
        paths.append(path)
    return paths


def _lines(axes: Any, chart: Lines) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    series = plotted(chart)
    frame = axes_of(chart, series)
    axes.set_xlim(frame.x_range)
    axes.set_ylim(frame.y_range)
    for line in series:
        tone = TEACHER if line.tone is None else TONES[line.tone % len(TONES)]
        few = len(line.points) <= 40
        axes.errorbar(
            [point.x for point in line.points],
            [point.y for point in line.points],
            yerr=[point.error or 0.0 for point in line.points] if any(p.error for p in line.points) else None,
            color=tone,
            linestyle="--" if line.tone is None else "-",
            marker=MARKERS[(line.tone or 0) % len(MARKERS)] if few else None,
            markersize=3,
            linewidth=1.2,
            label=line.name,
        )
    for axis, places in ((axes.xaxis, frame.x_ticks), (axes.yaxis, frame.y_ticks)):
        axis.set_major_locator(FixedLocator(places))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: FORMATS[chart.x_format](value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: FORMATS[chart.y_format](value)))
    for value, label in chart.marks:
        axes.axvline(value, color=TEACHER, linestyle=":", linewidth=0.8)
        side = "left" if Scale(*frame.x_range, 0, 1, chart.log_x)(value) < 0.6 else "right"
        axes.annotate(f" {label} ", (value, 1), xycoords=("data", "axes fraction"), fontsize=6, va="top", ha=side)
    axes.grid(axis="y", color="#e6e6e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False)


def _heat(figure: Any, axes: Any, chart: Heat) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    colours = LinearSegmentedColormap.from_list("ours", GOOD if chart.good_is_high else BAD)
    shares = [[float("nan") if v is None else heat_share(chart, v) for v in row] for row in chart.values]
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for axis, names in ((axes.xaxis, chart.columns), (axes.yaxis, chart.rows)):
        every = max(1, len(names) // 10)
        axis.set_ticks(range(0, len(names), every), names[::every])
    if chart.written:
        for row, values in enumerate(chart.values):
            for column, value in enumerate(values):
                if value is not None:
                    tone = "white" if heat_share(chart, value) > 0.5 else "black"
                    text = FORMATS[chart.format](value)
                    axes.text(column, row, text, ha="center", va="center", fontsize=6, color=tone)
    scale = (LogNorm if chart.log else Normalize)(chart.low, chart.high)
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, fraction=0.04, pad=0.02)
    bar.set_ticks([chart.low, chart.high], labels=[FORMATS[chart.format](v) for v in (chart.low, chart.high)])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=6)
