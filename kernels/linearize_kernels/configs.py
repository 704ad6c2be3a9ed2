"""How each kernel is launched: tokens of a chunk, warps, pipeline stages, by shape class.

`configs.json` is written by scripts/tune_kernels.py, which checks every candidate against the reference on the device
before it may win. Shapes that were not tuned get the nearest default below. No autotuner runs in the hot path.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("configs.json")


class Launch(NamedTuple):
    """C tokens of a chunk, warps of a program, loads in flight, and values of a tile (0: all of a head's)."""

    chunk: int
    warps: int
    stages: int
    values: int = 0


overrides: dict[str, Launch] = {}
"""By kernel name, for the tuner and for tests."""


def launch(kernel: str, dtype: torch.dtype, width: int, variant: str) -> Launch:
    """How to launch `kernel` on heads of `width` (the widest of key, value and features, as padded)."""
    if kernel in overrides:
        return overrides[kernel]
    bits = "bf16" if dtype == torch.bfloat16 else "fp32"
    found = _table().get(f"{kernel} {bits} {width} {variant}")
    if found is not None:
        return found
    if dtype != torch.bfloat16:
        return Launch(32, 4, 1)
    return Launch(64, 8 if width > 64 or "gradient" in kernel else 4, 1)


@cache
def _table() -> dict[str, Launch]:
    if not TABLE.is_file():
        return {}
    return {key: Launch(*value) for key, value in json.loads(TABLE.read_text()).items()}
