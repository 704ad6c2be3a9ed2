"""A student's task scores beside its teacher's: what is recovered, and whether the difference may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from linearize.evals.records import TaskRow


def mcnemar(left: Sequence[bool], right: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test: among documents that only one of both gets right, each is as likely.

    >>> mcnemar([True] * 5, [False] * 5)
    0.0625
    """
    assert len(left) == len(right)
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    count, fewer = only_left + only_right, min(only_left, only_right)
    tail = sum(comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def compared(
    student: TaskRow, teacher: TaskRow, student_correct: Sequence[bool], teacher_correct: Sequence[bool]
) -> TaskRow:
    """The student's row with its share of the teacher's accuracy, raw and above chance, and the paired test.

    A share has no value where the teacher's accuracy, or what it has above chance, is not positive.
    """
    above = None
    if student.chance is not None and teacher.accuracy > student.chance:
        above = (student.accuracy - student.chance) / (teacher.accuracy - student.chance)
    return student.model_copy(
        update={
            "recovered": student.accuracy / teacher.accuracy if teacher.accuracy else None,
            "recovered_above_chance": above,
            "paired_p": mcnemar(student_correct, teacher_correct),
        }
    )
