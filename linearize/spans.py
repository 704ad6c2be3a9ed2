"""Names for the parts of a training step, seen by the profiler and by the count of memory."""

from __future__ import annotations

from typing import Literal, get_args

from torch.profiler import record_function

Span = Literal["data", "teacher", "student", "loss", "backward", "optimizer", "wait"]
SPANS: tuple[Span, ...] = get_args(Span)
"""Making a batch; the teacher's pass; the student's, or its mixers in transfer; losses; gradients; AdamW and clipping;
fetching a step's numbers, for which the host waits.
"""

PREFIX = "linearize: "


def span(name: Span) -> record_function:
    """A part of a step; the innermost one counts."""
    return record_function(PREFIX + name)
