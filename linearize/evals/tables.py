"""What `linearize eval` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from linearize.config import Config
from linearize.evals.positions import ERRORS, THRESHOLD, departure
from linearize.evals.records import DiagnosticRow, PerplexityRow, PositionRow, RecallRow, TaskRow
from linearize.evals.subjects import STUDENT, TEACHER


def evaluation_report(found: Mapping[str, Sequence[Config]]) -> RenderableType:
    """One table a kind that has rows."""
    tables: list[RenderableType] = []
    for kind, make in REPORTS.items():
        if rows := found.get(kind):
            tables += make(rows)
    return Group(*tables)


def perplexity_records(rows: Iterable[Config]) -> list[dict[str, Any]]:
    """One record a source and length: tokens, of each model its perplexity, nll and standard error, and the ratio."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        assert isinstance(row, PerplexityRow)
        record = records.setdefault((row.source, row.length), {"source": row.source, "length": row.length})
        record["tokens"] = row.tokens
        record[row.model] = math.exp(row.nll)
        record[f"{row.model}_nll"] = row.nll
        record[f"{row.model}_standard_error"] = row.standard_error
    for record in records.values():
        if TEACHER in record and STUDENT in record:
            record["ratio"] = math.exp(record[f"{STUDENT}_nll"] - record[f"{TEACHER}_nll"])
    return sorted(records.values(), key=lambda record: (record["source"], record["length"]))


def _perplexity(rows: Sequence[Config]) -> list[RenderableType]:
    models = _models(rows)
    both = TEACHER in models and STUDENT in models
    columns = [*models[:2], "ratio", *models[2:]] if both else models
    table = _table("Perplexity (nats per token ± standard error)", "text", "length", "tokens", *columns)
    for record in perplexity_records(rows):
        cells = []
        for name in columns:
            cell = "-" if name not in record else f"{record[name]:,.2f}"
            error = record.get(f"{name}_standard_error")
            cells.append(cell if error is None else f"{cell} ({record[f'{name}_nll']:.3f} ± {error:.3f})")
        table.add_row(record["source"], f"{record['length']:,}", f"{record['tokens']:,}", *cells)
    return [table]


def _positions(rows: Sequence[Config]) -> list[RenderableType]:
    """Of the longest length: the teacher's perplexity by position, and each other model's ratio to it."""
    chosen = [row for row in rows if isinstance(row, PositionRow)]
    longest = max(row.length for row in chosen)
    models = _models(chosen)
    table = _table(
        f"Perplexity by position in windows of {longest:,} tokens (others: ratio to the teacher's, ± standard error)",
        "text", "positions", *models,
    )  # fmt: skip
    lines: list[str] = []
    for source in dict.fromkeys(row.source for row in chosen):
        own = [row for row in chosen if row.source == source and row.length == longest]
        for start in sorted({row.start for row in own}):
            bucket = {row.model: row for row in own if row.start == start}
            some = next(iter(bucket.values()))
            table.add_row(source, f"{start:,}-{some.stop - 1:,}", *(_bucket(bucket.get(name)) for name in models))
        for name in models:
            if name == TEACHER or TEACHER not in models:
                continue
            place = departure([row for row in own if row.model == name])
            where = "nowhere" if place is None else f"from position {place:,} on"
            lines.append(f"{source}: {name} leaves its teacher {where}.")
    rule = f"Leaves: the first bucket whose ratio is above {THRESHOLD} by more than {ERRORS:g} standard errors."
    return [table, *lines, rule] if lines else [table]


def _bucket(row: PositionRow | None) -> str:
    if row is None:
        return "-"
    if row.log_ratio is None:
        return f"{math.exp(row.nll):,.2f}"
    ratio = math.exp(row.log_ratio)
    return f"{ratio:.3f}" if row.log_ratio_error is None else f"{ratio:.3f} ± {ratio * row.log_ratio_error:.3f}"


def _recall(rows: Sequence[Config]) -> list[RenderableType]:
    chosen = [row for row in rows if isinstance(row, RecallRow)]
    tables: list[RenderableType] = []
    for task in dict.fromkeys(row.task for row in chosen):
        own = [row for row in chosen if row.task == task]
        depths = sorted({row.depth for row in own if row.depth is not None})
        columns = [f"at {depth:.0%}" for depth in depths]
        table = _table(f"{task}: right answers, in all and by depth", "model", "length", "all", "n", *columns)
        for model in _models(own):
            for length in sorted({row.length for row in own}):
                cells = [row for row in own if row.model == model and row.length == length]
                by_depth = {cell.depth: cell for cell in cells}
                right, count = sum(cell.correct for cell in cells), sum(cell.count for cell in cells)
                beyond = " *" if any(cell.beyond_positions for cell in cells) else ""
                shown = [f"{by_depth[d].correct / by_depth[d].count:.0%}" if d in by_depth else "-" for d in depths]
                table.add_row(
                    model, f"{length:,}{beyond}", f"{right / count:.1%}" if count else "-", f"{count}", *shown
                )
        tables.append(table)
    if any(row.beyond_positions for row in chosen):
        tables.append("* beyond the positions that the teacher was trained for")
    return tables


def _tasks(rows: Sequence[Config]) -> list[RenderableType]:
    columns = ["n", "acc", "acc_norm", "perplexity", "chance", "recovered", "above chance", "p"]
    table = _table("Tasks (± standard error; p: McNemar's exact test against the teacher)", "task", "model", *columns)
    chosen = [row for row in rows if isinstance(row, TaskRow)]
    for row in sorted(chosen, key=lambda row: (row.task, row.model != TEACHER)):
        table.add_row(
            row.task,
            row.model,
            f"{row.count:,}",
            f"{row.accuracy:.1%} ± {row.accuracy_error:.1%}",
            "-" if row.accuracy_norm is None else f"{row.accuracy_norm:.1%} ± {row.accuracy_norm_error:.1%}",
            "-" if row.perplexity is None else f"{row.perplexity:,.2f}",
            *(
                "-" if share is None else f"{share:.1%}"
                for share in (row.chance, row.recovered, row.recovered_above_chance)
            ),
            "-" if row.paired_p is None else f"{row.paired_p:.2g}",
        )
    return [table]


def _diagnostics(rows: Sequence[Config]) -> list[RenderableType]:
    """Of each layer; heads and positions are in the file."""
    chosen = [row for row in rows if isinstance(row, DiagnosticRow)]
    measures = list(dict.fromkeys(row.measure for row in chosen))
    table = _table("Layers on a short text (heads and positions are in the file)", "layer", *measures, "worst head")
    for layer in sorted({row.layer for row in chosen}):
        own = [row for row in chosen if row.layer == layer and row.start is None]
        whole = {row.measure: row.value for row in own if row.head is None}
        heads = [row for row in own if row.head is not None and row.measure == "relative_error"]
        worst = max(heads, key=lambda row: row.value)
        cells = (f"{whole[measure]:.3f}" if measure in whole else "-" for measure in measures)
        table.add_row(str(layer), *cells, f"{worst.head} ({worst.value:.3f})")
    return [table]


def _models(rows: Iterable[Config]) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(row.model for row in rows))  # type: ignore[attr-defined]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


REPORTS = {
    "perplexity": _perplexity,
    "positions": _positions,
    "recall": _recall,
    "tasks": _tasks,
    "diagnostics": _diagnostics,
}
