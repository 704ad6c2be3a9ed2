"""Who speaks in a chart: the models of one run, or the students of several beside their teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from linearize.evals.records import BRANCHES
from linearize.report.charts import Point, Series
from linearize.report.facts import RunFacts

Row = TypeVar("Row")


class Voice(NamedTuple):
    """A model of a run, its name in legends and tables, and its colour (None: the teacher's)."""

    run: RunFacts
    model: str
    name: str
    tone: int | None


def voices(runs: Sequence[RunFacts], *, branches: bool = False) -> list[Voice]:
    """Teacher and student of one run, with its branch probe if asked; of several runs every student, and each teacher
    once."""
    if len(runs) == 1:
        (run,) = runs
        found = [Voice(run, "teacher", "teacher", None), Voice(run, "student", "student", 0)]
        return found + [Voice(run, branch, branch, tone) for tone, branch in enumerate(BRANCHES, 1) if branches]
    teachers = {teacher_identity(run): run for run in reversed(runs)}
    same = len(teachers) == 1
    found = [Voice(run, "teacher", "teacher" if same else f"teacher of {run.name}", None) for run in teachers.values()]
    return found + [Voice(run, "student", run.name, tone) for tone, run in enumerate(runs)]


def teacher_identity(run: RunFacts) -> str:
    """Equal for equal weights."""
    teacher = run.facts.get("teacher", {})
    return str(teacher.get("sha256") or teacher.get("revision") or teacher.get("origin"))


def lines(
    speakers: Iterable[Voice], rows: Callable[[Voice], Iterable[Row]], point: Callable[[Row], Point | None]
) -> tuple[Series, ...]:
    """A series for each voice that has rows, ordered by x."""
    found = []
    for voice in speakers:
        points = sorted(p for row in rows(voice) if (p := point(row)) is not None)
        if points:
            found.append(Series(voice.name, tuple(points), voice.tone))
    return tuple(found)
