"""Perplexity by the position of a token in its window, and where the student leaves its teacher.

Windows start without context. Teacher and student read the same windows, so that differences are paired: their standard
error is that of the differences, over windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.config import Config
from linearize.evals.perplexity import token_losses
from linearize.evals.records import PerplexityRow, PositionRow

FIRST_EDGES = (1, 64, 128)
"""Where buckets of positions begin; further ones double. Position 0 is never predicted."""

THRESHOLD = 1.05
"""A student has left its teacher where the ratio of perplexities is above this by more than ERRORS standard errors."""

ERRORS = 2.0

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 65_536}
"""Tokens in a batch, at least one window."""


class WindowLosses(Config):
    """Mean NLL of each window, whole and by bucket of positions, in nats a token."""

    length: int
    edges: tuple[int, ...]
    windows: tuple[float, ...]
    buckets: tuple[tuple[float, ...], ...]  # [window][bucket]

    @property
    def mean(self) -> float:
        return sum(self.windows) / len(self.windows)


def edges_of(length: int) -> tuple[int, ...]:
    """Ends of the buckets: 1, 64, 128, 256, ... and the length.

    >>> edges_of(600)
    (1, 64, 128, 256, 512, 600)
    """
    edges = list(FIRST_EDGES)
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return (*(edge for edge in edges if edge < length), length)


def window_losses(model: PreTrainedModel, tokens: np.ndarray, *, length: int, max_tokens: int) -> WindowLosses:
    """Measure the windows of one text; errors as `perplexity`."""
    rows = max(1, TOKENS_AT_ONCE[model.device.type] // length)
    losses_NT = token_losses(model, tokens, length=length, max_tokens=max_tokens, batch_rows=rows).double()
    edges = edges_of(length)
    buckets = torch.stack([losses_NT[:, start - 1 : stop - 1].mean(1) for start, stop in pairwise(edges)], dim=1)
    return WindowLosses(
        length=length,
        edges=edges,
        windows=tuple(losses_NT.mean(1).tolist()),
        buckets=tuple(map(tuple, buckets.tolist())),
    )


def perplexity_row(model: str, source: str, found: WindowLosses, *, beyond: bool) -> PerplexityRow:
    """The row of one text and length."""
    count = len(found.windows)
    return PerplexityRow(
        model=model,
        source=source,
        length=found.length,
        tokens=count * (found.length - 1),
        nll=found.mean,
        standard_error=_error(torch.tensor(found.windows, dtype=torch.float64)),
        beyond_positions=beyond,
    )


def position_rows(
    model: str, source: str, found: WindowLosses, teacher: WindowLosses | None = None
) -> list[PositionRow]:
    """One row a bucket; with the teacher's losses also the log ratio to it."""
    own = torch.tensor(found.buckets, dtype=torch.float64)
    gap = None if teacher is None else own - torch.tensor(teacher.buckets, dtype=torch.float64)
    rows = []
    for index, (start, stop) in enumerate(pairwise(found.edges)):
        rows.append(
            PositionRow(
                model=model,
                source=source,
                length=found.length,
                start=start,
                stop=stop,
                tokens=own.shape[0] * (stop - start),
                nll=own[:, index].mean().item(),
                standard_error=_error(own[:, index]),
                log_ratio=None if gap is None else gap[:, index].mean().item(),
                log_ratio_error=None if gap is None else _error(gap[:, index]),
            )
        )
    return rows


def _error(values: Tensor) -> float | None:
    count = values.numel()
    return values.std().item() / math.sqrt(count) if count > 1 else None


def departure(rows: Sequence[PositionRow], threshold: float = THRESHOLD) -> int | None:
    """The position from which on the student has left its teacher: where the first bucket above the threshold starts.

    A bucket counts when its log ratio exceeds log(threshold) by more than ERRORS standard errors; without a standard
    error (one window) it does not. None where there is no such bucket.

    Args:
        rows: of one model, source and length.
        threshold: a ratio of perplexities.
    """
    for row in sorted(rows, key=lambda row: row.start):
        if row.log_ratio is None or row.log_ratio_error is None:
            continue
        if row.log_ratio - ERRORS * row.log_ratio_error > math.log(threshold):
            return row.start
    return None
