"""Rows whose length changes as a stage goes on: one `PackedRows` a piece of the schedule, read as one sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from linearize.data.corpus import Corpus
from linearize.data.packing import PackedRows
from linearize.stages.base import Batch, StageConfig


class ScheduledRows:
    """Micro-batches of several `PackedRows` one after another; a micro-batch is still found by its number alone.

    Args:
        parts: with the number of micro-batches that are read from each.
    """

    def __init__(self, parts: Sequence[tuple[PackedRows, int]]) -> None:
        assert all(count <= len(rows) for rows, count in parts)
        self._parts = tuple(rows for rows, _ in parts)
        self._ends = list(accumulate(count for _, count in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Batch:
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def scheduled_rows(corpus: Corpus, config: StageConfig, first_token: int, seed: int) -> PackedRows | ScheduledRows:
    """The tokens [first_token, first_token + config.tokens) as the micro-batches of a stage.

    Args:
        corpus: the tokens.
        config: its budget, and the length of its rows or their schedule.
        first_token: where the stage's text starts.
        seed: orders the rows, within each piece of the schedule.

    Raises:
        DataError: as `PackedRows`, for each piece.
    """
    parts: list[tuple[PackedRows, int]] = []
    for piece in config.pieces():
        rows = PackedRows(
            corpus,
            length=piece.length,
            rows=piece.rows,
            first_token=first_token,
            tokens=piece.tokens,
            seed=seed,
        )
        parts.append((rows, piece.steps * config.accumulation))
        first_token += piece.tokens
    return parts[0][0] if len(parts) == 1 else ScheduledRows(parts)
