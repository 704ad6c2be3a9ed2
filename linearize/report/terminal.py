"""Speed as the command line prints it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from linearize.evals.crossover import crossover
from linearize.evals.records import SpeedRow
from linearize.report.charts import FORMATS
from linearize.report.measured import COSTS


def speed_report(rows: Sequence[SpeedRow]) -> RenderableType:
    """One line a model, task and length; the crossings below."""
    table = Table(title="Time (median) and memory", title_justify="left")
    for index, column in enumerate(("task", "length", "model", "time", "tokens/s", "peak memory", "state", "with")):
        table.add_column(column, justify="left" if index in (0, 7) else "right")
    for row in sorted(rows, key=lambda row: (row.mode != "prefill", row.length, row.model)):
        time, rate = "out of memory", "-"
        if row.seconds is not None and row.tokens_per_second is not None:
            time, rate = FORMATS["seconds"](row.seconds), f"{row.tokens_per_second:,.0f}"
        sizes = ("-" if size is None else FORMATS["bytes"](size) for size in (row.peak_memory_bytes, row.state_bytes))
        how = f"{row.dtype}, {row.attention}{', CUDA graph' if row.cuda_graph else ''}"
        table.add_row(row.mode, f"{row.length:,}", row.model, time, rate, *sizes, escape(how))
    found = ((title, crossover(rows, mode, cost)) for mode, title, cost, *_ in COSTS)
    return Group(table, *(f"{title}: {crossed.in_words()}" for title, crossed in found if crossed is not None))
