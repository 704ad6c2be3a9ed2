"""Charts of what evaluations wrote: perplexity, recall, the branch probe, diagnostics, speed and memory by length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from linearize.evals.crossover import Cost, crossover
from linearize.evals.records import BRANCHES, DiagnosticRow, PerplexityRow, RecallRow, SpeedRow
from linearize.report.charts import Chart, Format, Heat, Lines, Point, Series
from linearize.report.facts import RunFacts
from linearize.report.voices import Voice, lines, voices


def perplexity_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """By length, and by position within the longest windows, for every source."""
    found = _ratios(runs)
    for source in _unique(row.source for run in runs for row in run.perplexity):
        title = f"Perplexity by length: {source}"
        found += _perplexity(f"perplexity-{source}", title, source, runs, voices(runs))
    rows = [row for run in runs for row in run.positions]
    for source in _unique(row.source for row in rows):
        longest = max(row.length for row in rows if row.source == source)
        series = lines(
            voices(runs),
            lambda v, s=source, n=longest: (  # type: ignore[misc]
                r for r in v.run.positions if (r.model, r.source, r.length) == (v.model, s, n)
            ),
            lambda row: Point((row.start + row.stop) / 2, row.nll, row.standard_error),
        )
        title = f"Loss by position in {longest:,} tokens: {source}"
        found.append(Lines(f"positions-{source}", title, "position", "nats a token", series, log_x=True))
    return found


def _ratios(runs: Sequence[RunFacts]) -> list[Chart]:
    """Perplexity over the teacher's by length: of one run for every source, of several the mean over sources."""
    found: list[Series] = []
    for tone, run in enumerate(runs):
        nll = {(row.model, row.source, row.length): row.nll for row in run.perplexity}
        gaps: dict[str, dict[int, float]] = {}
        for (model, source, length), value in nll.items():
            if model == "student" and ("teacher", source, length) in nll:
                gaps.setdefault(source, {})[length] = value - nll["teacher", source, length]
        if len(runs) == 1:
            found += [Series(source, _exponentials(gap), n) for n, (source, gap) in enumerate(gaps.items())]
        elif gaps:
            lengths = set.intersection(*(set(gap) for gap in gaps.values()))
            mean = {length: sum(gap[length] for gap in gaps.values()) / len(gaps) for length in lengths}
            found.append(Series(run.name, _exponentials(mean), tone))
    found = [series for series in found if series.points]
    if not found:
        return []
    title = "Perplexity of the student over its teacher's"
    note = "1 is the teacher." if len(runs) == 1 else "1 is the teacher; means over sources, of the logarithms."
    axes = ("tokens a window", "ratio", tuple(found))
    return [Lines("ratio", title, *axes, log_x=True, log_y=True, marks=_trained(runs), note=note)]


def _exponentials(gaps: Mapping[int, float]) -> tuple[Point, ...]:
    return tuple(Point(length, math.exp(gap)) for length, gap in sorted(gaps.items()))


def _perplexity(key: str, title: str, source: str, runs: Sequence[RunFacts], speakers: Sequence[Voice]) -> list[Lines]:
    def rows(voice: Voice) -> list[PerplexityRow]:
        return [row for row in voice.run.perplexity if (row.model, row.source) == (voice.model, source)]

    series = lines(speakers, rows, _perplexity_point)
    axes = ("tokens a window", "perplexity", series)
    note = _beyond(row for voice in speakers for row in rows(voice))
    return [Lines(key, title, *axes, log_x=True, log_y=True, marks=_trained(runs), note=note)]


def _beyond(rows: Iterable[PerplexityRow | RecallRow]) -> str:
    """Lengths that the teacher was not made for: its line there is no measure of the student."""
    lengths = sorted({row.length for row in rows if row.beyond_positions})
    return f"The teacher was trained for fewer positions than {lengths[0]:,}." if lengths else ""


def _perplexity_point(row: PerplexityRow) -> Point:
    perplexity = math.exp(row.nll)
    return Point(row.length, perplexity, None if row.standard_error is None else perplexity * row.standard_error)


def _trained(runs: Sequence[RunFacts]) -> tuple[tuple[float, str], ...]:
    """The longest training length, where all runs share it."""
    found = {max((stage["length"] for stage in run.recipe.get("stages", [])), default=None) for run in runs}
    (length, *others) = found
    return () if others or length is None else ((float(length), "trained length"),)


def recall_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Accuracy by length for every task, and length by depth for every model."""
    found: list[Chart] = []
    for task in _unique(row.task for run in runs for row in run.recall):
        found.append(_recall(f"recall-{task}", f"{task}: accuracy by length", task, runs, voices(runs)))
        found += [heat for voice in voices(runs) if (heat := _depths(voice, task)) is not None]
    return found


def _recall(key: str, title: str, task: str, runs: Sequence[RunFacts], speakers: Sequence[Voice]) -> Lines:
    """Over all depths; the error is that of a share."""

    def rows(voice: Voice) -> Iterable[tuple[int, int, int]]:
        own = [row for row in voice.run.recall if (row.model, row.task) == (voice.model, task)]
        for length in _unique(row.length for row in own):
            here = [row for row in own if row.length == length]
            yield length, sum(row.count for row in here), sum(row.correct for row in here)

    def point(row: tuple[int, int, int]) -> Point:
        length, count, correct = row
        share = correct / count
        return Point(length, share, math.sqrt(share * (1 - share) / count))

    series = lines(speakers, rows, point)
    asked = [r for voice in speakers for r in voice.run.recall if (r.model, r.task) == (voice.model, task)]
    return Lines(
        key,
        title,
        "tokens of context",
        "correct",
        series,
        y_format="percent",
        log_x=True,
        y_range=(0.0, 1.0),
        marks=_trained(runs),
        note=f"{_questions(asked)} {_beyond(asked)}".strip(),
    )


def _questions(rows: Sequence[RecallRow]) -> str:
    """How many answers a point stands for."""
    counts: dict[tuple[str, int], int] = {}
    for row in rows:
        counts[row.model, row.length] = counts.get((row.model, row.length), 0) + row.count
    least, most = min(counts.values()), max(counts.values())
    return f"{least:,} questions a point." if least == most else f"{least:,} to {most:,} questions a point."


def _depths(voice: Voice, task: str) -> Heat | None:
    rows = [r for r in voice.run.recall if (r.model, r.task) == (voice.model, task) and r.depth is not None]
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows if row.depth is not None})
    if not rows or len(lengths) * len(depths) < 2:
        return None
    found: dict[tuple[float | None, int], list[RecallRow]] = {}
    for row in rows:
        found.setdefault((row.depth, row.length), []).append(row)

    def share(depth: float, length: int) -> float | None:
        here = found.get((depth, length))
        return None if here is None else sum(row.correct for row in here) / sum(row.count for row in here)

    return Heat(
        key=f"recall-{task}-{voice.name}",
        title=f"{task}: {voice.name}",
        x_label="tokens of context",
        y_label="depth of the needle",
        columns=tuple(f"{length:,}" for length in lengths),
        rows=tuple(f"{100 * depth:.0f} %" for depth in depths),
        values=tuple(tuple(share(depth, length) for length in lengths) for depth in depths),
        low=0.0,
        high=1.0,
        format="percent",
        written=True,
        good_is_high=True,
    )


def probe_charts(run: RunFacts) -> list[Chart]:
    """The student with a branch switched off, beside itself and its teacher; nothing where no branch was probed."""
    speakers = voices([run], branches=True)
    found: list[Chart] = []
    for source in _unique(row.source for row in run.perplexity if row.model in BRANCHES):
        found += _perplexity(f"probe-{source}", f"Perplexity, branches off: {source}", source, [run], speakers)
    for task in _unique(row.task for row in run.recall if row.model in BRANCHES):
        found.append(_recall(f"probe-{task}", f"{task}, branches off", task, [run], speakers))
    return found


def diagnostic_charts(run: RunFacts) -> list[Chart]:
    """Errors by layer and head, and by layer and position; entropies by layer."""
    rows = run.diagnostics
    names = {"attention_kl": "KL of attention rows", "relative_error": "Relative error", "monotonicity": "Monotonicity"}
    found: list[Chart] = []
    for measure, name in names.items():
        by_head = [row for row in rows if row.measure == measure and row.head is not None and row.start is None]
        by_place = [row for row in rows if row.measure == measure and row.head is None and row.start is not None]
        found += _by_layer(f"{measure}-heads", f"{name} by layer and head", "head", by_head)
        found += _by_layer(f"{measure}-positions", f"{name} by layer and position", "position", by_place)
    entropies = ("teacher_entropy", "student_entropy")
    series = lines(
        voices([run]),
        lambda v: (r for r in rows if r.measure == f"{v.model}_entropy" and r.head is None and r.start is None),
        lambda row: Point(row.layer, row.value),
    )
    if any(row.measure in entropies for row in rows) and series:
        found.append(Lines("entropy", "Attention entropy by layer", "layer", "nats", series, x_format="count"))
    return found


def _by_layer(key: str, title: str, x_label: str, rows: Sequence[DiagnosticRow]) -> list[Heat]:
    if not rows:
        return []
    layers = sorted({row.layer for row in rows})
    columns = sorted({(row.head or 0, row.start or 0, row.stop or 0) for row in rows})
    found = {(row.layer, (row.head or 0, row.start or 0, row.stop or 0)): row.value for row in rows}
    names = tuple(str(head) if x_label == "head" else f"{start:,}–{stop - 1:,}" for head, start, stop in columns)
    values = [row.value for row in rows]
    return [
        Heat(
            key=key,
            title=title,
            x_label=x_label,
            y_label="layer",
            columns=names,
            rows=tuple(map(str, layers)),
            values=tuple(tuple(found.get((layer, column)) for column in columns) for layer in layers),
            low=min(values),
            high=max(values),
            log=min(values) > 0,
        )
    ]


COSTS: tuple[tuple[str, str, Cost, str, str, Format], ...] = (
    ("prefill", "Time to first token", "seconds", "tokens of prompt", "time", "seconds"),
    ("decode", "Time of one more token", "seconds", "tokens of context", "time", "seconds"),
    ("decode", "Peak memory while decoding", "peak_memory_bytes", "tokens of context", "memory with weights", "bytes"),
    ("decode", "Decoding state", "state_bytes", "tokens of context", "keys, values and states", "bytes"),
)
"""Mode, title, what it costs, and its axes."""


def speed_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """What prefill and decoding cost by length; of one run with the length where student and teacher cross."""
    found: list[Chart] = []
    for batch in _unique(row.batch for run in runs for row in run.speed):
        for mode, title, cost, x_label, y_label, unit in COSTS:

            def rows(voice: Voice, mode: str = mode, batch: int = batch) -> list[SpeedRow]:
                return [r for r in voice.run.speed if (r.model, r.mode, r.batch) == (voice.model, mode, batch)]

            def point(row: SpeedRow, cost: Cost = cost) -> Point | None:
                value = row.model_dump()[cost]
                return Point(row.length, value) if value else None

            series = lines(voices(runs), rows, point)
            if not series:
                continue
            speeds = [row for row in runs[0].speed if row.batch == batch] if len(runs) == 1 else []
            crossed = crossover(speeds, mode, cost)
            at = () if crossed is None or crossed.length is None else ((crossed.length, "equal here"),)
            lost = [
                f"{voice.name} at {row.length:,}" for voice in voices(runs) for row in rows(voice) if row.out_of_memory
            ]
            note = f"Out of memory: {', '.join(lost)}." if lost else ""
            key, title = f"{mode}-{cost}-{batch}", f"{title}, batch {batch}"
            found.append(
                Lines(key, title, x_label, y_label, series, "length", unit, log_x=True, log_y=True, marks=at, note=note)
            )
    return found


def _unique(values: Iterable[Any]) -> list[Any]:
    """In order of their first appearance."""
    return list(dict.fromkeys(values))
