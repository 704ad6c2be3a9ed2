"""The numbers of a run that are set side by side: teacher, student, and how they relate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from linearize.evals.records import RecallRow, SpeedRow, TaskRow
from linearize.report.charts import Format
from linearize.report.facts import RunFacts

MODELS = ("teacher", "student")


class Measure(NamedTuple):
    """One number of both models. Errors are standard errors; None where there is none."""

    label: str
    teacher: float | None
    student: float | None
    format: Format = "exact"
    teacher_error: float | None = None
    student_error: float | None = None

    @property
    def ratio(self) -> float | None:
        """Student over teacher."""
        return self.student / self.teacher if self.student is not None and self.teacher else None


def measures(run: RunFacts) -> list[Measure]:
    """What the first table shows: perplexity, recall, tasks, speed; each as far as it was measured."""
    return [*_perplexities(run), *_recalls(run), *_tasks(run), *_speeds(run)]


def _perplexities(run: RunFacts) -> list[Measure]:
    """From the end of the conversion; and of evaluations the shortest and the longest windows of every source."""
    found = [
        Measure(f"Perplexity, {row['source']}, {row['length']:,} tokens", row["teacher"], row["student"])
        for row in run.results.get("perplexity", [])
    ]
    for source in dict.fromkeys(row.source for row in run.perplexity):
        rows = {(row.model, row.length): row for row in run.perplexity if row.source == source}
        lengths = sorted({length for _, length in rows})
        for length in dict.fromkeys((lengths[0], lengths[-1])):
            values: list[float | None] = []
            errors: list[float | None] = []
            for model in MODELS:
                row = rows.get((model, length))
                value = None if row is None else math.exp(row.nll)
                values.append(value)
                errors.append(
                    None if row is None or value is None or row.standard_error is None else value * row.standard_error
                )
            label = f"Perplexity, {source}, {length:,} tokens, evaluated"
            found.append(Measure(label, values[0], values[1], "exact", errors[0], errors[1]))
    return found


def _recalls(run: RunFacts) -> list[Measure]:
    """Every task, over all depths, at the shortest and the longest context."""
    found = []
    for task in dict.fromkeys(row.task for row in run.recall):
        lengths = sorted({row.length for row in run.recall if row.task == task})
        for length in dict.fromkeys((lengths[0], lengths[-1])):
            shares = [
                _share([r for r in run.recall if (r.model, r.task, r.length) == (m, task, length)]) for m in MODELS
            ]
            (teacher, teacher_error), (student, student_error) = shares
            label = f"Recall, {task}, {length:,} tokens"
            found.append(Measure(label, teacher, student, "share", teacher_error, student_error))
    return found


def _share(rows: Sequence[RecallRow]) -> tuple[float | None, float | None]:
    count = sum(row.count for row in rows)
    if not count:
        return None, None
    share = sum(row.correct for row in rows) / count
    return share, math.sqrt(share * (1 - share) / count)


def task_pairs(run: RunFacts) -> list[tuple[str, TaskRow | None, TaskRow | None]]:
    """Of each task its name, the teacher's row and the student's."""
    rows = {(row.model, row.task): row for row in run.tasks}
    return [
        (task, rows.get(("teacher", task)), rows.get(("student", task))) for task in dict.fromkeys(t for _, t in rows)
    ]


def _tasks(run: RunFacts) -> list[Measure]:
    return [
        Measure(
            f"Accuracy, {task}",
            None if teacher is None else teacher.accuracy,
            None if student is None else student.accuracy,
            "share",
            None if teacher is None else teacher.accuracy_error,
            None if student is None else student.accuracy_error,
        )
        for task, teacher, student in task_pairs(run)
    ]


def _speeds(run: RunFacts) -> list[Measure]:
    """Of each batch, at the longest context that both models took."""
    found = []
    for batch in dict.fromkeys(row.batch for row in run.speed):
        for mode, label in (("prefill", "Time to first token"), ("decode", "Time of one more token")):
            rows = {(row.model, row.length): row for row in run.speed if (row.mode, row.batch) == (mode, batch)}
            both = [n for _, n in rows if all((m, n) in rows and rows[m, n].seconds is not None for m in MODELS)]
            if both:
                teacher, student = (rows[model, max(both)] for model in MODELS)
                place = f"{max(both):,} tokens, batch {batch}"
                found.append(Measure(f"{label}, {place}", teacher.seconds, student.seconds, "seconds"))
                if mode == "decode":
                    found += _memory(teacher, student, place)
    return found


def _memory(teacher: SpeedRow, student: SpeedRow, place: str) -> list[Measure]:
    found = [Measure(f"Decoding state, {place}", teacher.state_bytes, student.state_bytes, "bytes")]
    if teacher.peak_memory_bytes is not None:
        label = f"Peak memory while decoding, {place}"
        found.append(Measure(label, teacher.peak_memory_bytes, student.peak_memory_bytes, "bytes"))
    return found


def recovered(student: float, teacher: float, chance: float) -> float | None:
    """The student's share of what its teacher has beyond `chance`; None where the teacher has nothing beyond it."""
    return (student - chance) / (teacher - chance) if teacher > chance else None
