"""The recall tasks by name."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.errors import DataError, unknown_name
from linearize.evals.recall.babilong import BABILONG
from linearize.evals.recall.base import RecallTask
from linearize.evals.recall.needles import NIAH_1, NIAH_2_LIKE, NIAH_3_LIKE, PASSKEY
from linearize.evals.recall.tokens import COPY, MQAR

TASKS: dict[str, RecallTask] = {
    "passkey": PASSKEY,
    "niah-1": NIAH_1,
    "niah-2-like": NIAH_2_LIKE,
    "niah-3-like": NIAH_3_LIKE,
    **BABILONG,
    "mqar": MQAR,
    "copy": COPY,
}


def find_tasks(names: Sequence[str], option: str = "--recall") -> dict[str, RecallTask]:
    """The tasks of those names; `all` is every one.

    Raises:
        DataError: for a name that no task has.
    """
    if list(names) == ["all"]:
        return dict(TASKS)
    for name in names:
        if name not in TASKS:
            raise DataError(unknown_name("recall task", name, TASKS), place=option)
    return {name: TASKS[name] for name in names}
