"""How gates start: decays by their half-lives, output gates open."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator

OPEN_GATE = 1.2784645427610738
"""silu of it is 1: an output gate with this bias starts by changing nothing."""


def _ordered(half_life: tuple[float, float]) -> tuple[float, float]:
    if not 0 < half_life[0] <= half_life[1] < math.inf:
        raise ValueError(f"{list(half_life)} must be two positive numbers, the smaller one first")
    return half_life


HalfLife = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Tokens after which a decay has halved what was written: heads start spread between the two."""


def rates(heads: int, half_life: tuple[float, float]) -> list[float]:
    """-log decay per token of each head, log(2) / half-life; half-lives are spread evenly in the log.

    A single head gets the middle one. Plain numbers: a mixer is also built without memory, for its plan.
    """
    first, last = (math.log(life) for life in half_life)
    logs = [first + (last - first) * head / (heads - 1) for head in range(heads)] if heads > 1 else [(first + last) / 2]
    return [math.log(2) / math.exp(log) for log in logs]
