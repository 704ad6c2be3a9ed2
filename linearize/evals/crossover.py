"""The length from which a student costs less than its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from linearize.evals.records import SpeedRow

Cost = Literal["seconds", "peak_memory_bytes", "state_bytes"]


class Crossover(NamedTuple):
    """`length` is where the lines cross; None when they do not among the measured lengths, and `always` tells which
    side of them lies lower."""

    length: float | None
    always: Literal["student", "teacher"] | None

    def in_words(self) -> str:
        """`the student's is smaller from about 3,100 tokens on`."""
        if self.length is not None:
            return f"the student's is smaller from about {float(f'{self.length:.2g}'):,.0f} tokens on"
        if self.always == "student":
            return "the student's is smaller at every measured length"
        return "the teacher's is smaller at the longest measured length"


def crossover(rows: Sequence[SpeedRow], mode: str, cost: Cost) -> Crossover | None:
    """Where the student's cost falls below its teacher's, and stays there at every longer measured length.

    Between two measured lengths costs are taken as straight lines of log cost over log length. None when fewer than
    two lengths were measured of both.
    """
    student, teacher = _costs(rows, mode, cost, "student"), _costs(rows, mode, cost, "teacher")
    lengths = sorted(student.keys() & teacher.keys())
    if len(lengths) < 2:
        return None
    gaps = [math.log(student[length] / teacher[length]) for length in lengths]  # below 0: the student costs less
    if gaps[-1] >= 0:
        return Crossover(None, "teacher")
    last_above = max((index for index, gap in enumerate(gaps) if gap >= 0), default=None)
    if last_above is None:
        return Crossover(None, "student")
    below, above = gaps[last_above + 1], gaps[last_above]
    share = above / (above - below)
    low, high = math.log(lengths[last_above]), math.log(lengths[last_above + 1])
    return Crossover(math.exp(low + share * (high - low)), None)


def _costs(rows: Sequence[SpeedRow], mode: str, cost: Cost, model: str) -> Mapping[int, float]:
    found = {row.length: row.model_dump()[cost] for row in rows if row.model == model and row.mode == mode}
    return {length: value for length, value in found.items() if value}
