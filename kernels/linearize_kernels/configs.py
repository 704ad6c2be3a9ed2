"""How each kernel is launched: tokens of a chunk, warps, pipeline stages, by shape class.

`configs.json` is written by scripts/tune_kernels.py, which checks every candidate against the reference on the device
before it may win. Shapes that were not tuned get the defaults below. No autotuner runs in the hot path.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("configs.json")


class Launch(NamedTuple):
    """C tokens of a chunk, warps of a program, loads in flight, and values of a tile (0: all of a head's).

    `block_outputs` of 0 tokens: `walk_forward` does its work.
    """

    chunk: int
    warps: int
    stages: int
    values: int = 0


overrides: dict[str, Launch] = {}
"""By kernel name, for the tuner and for tests."""


def key(kernel: str, dtype: torch.dtype, width: int, variant: str) -> str:
    """The shape class: `width` is the widest of key, value and features, as padded."""
    return f"{kernel} {'bf16' if dtype == torch.bfloat16 else 'fp32'} {width} {variant}"


def launch(kernel: str, dtype: torch.dtype, width: int, variant: str) -> Launch:
    """How to launch `kernel` on heads of this shape class."""
    if kernel in overrides:
        return overrides[kernel]
    found = _table().get(key(kernel, dtype, width, variant))
    return found or default(kernel, dtype, width, variant)


def default(kernel: str, dtype: torch.dtype, width: int, variant: str) -> Launch:
    """What was fastest on an H100 for widths of 64 and 128; smaller tiles for fp32, for wider heads, and where the
    features of both signs are held at once.
    """
    if kernel == "distillation_rows":
        return Launch(2048, 8, 2)  # not tuned yet: 16 bytes of bf16 a thread
    if kernel == "window_step":
        return Launch(64 if width <= 64 else 32, 8, 1)  # not tuned yet: few programs, which wait for memory
    if kernel in ("block_states", "block_outputs"):
        if (dtype, width, variant) != (torch.bfloat16, 128, "softmax none"):
            return Launch(0, 1, 1)  # not measured
        return Launch(64, 4, 1) if kernel == "block_states" else Launch(128, 8, 1)
    if dtype != torch.bfloat16:
        return Launch(32 if width <= 64 else 16, 4 if width <= 64 else 8, 1)
    if kernel == "window_forward":
        return Launch(64, 4, 1) if width <= 64 else Launch(32, 4, 2)
    if kernel == "window_key_gradients" and width <= 64:
        return Launch(64, 4, 1)
    if "gradients" in kernel:
        return Launch(32, 4, 2) if width <= 64 else Launch(32, 8, 1) if width <= 128 else Launch(16, 8, 1)
    if width <= 64:
        return Launch(64, 4, 3 if kernel == "add_up_splits" else 2)
    if variant.startswith(("exp", "softmax_joint")):
        return Launch(32, 8, 1)
    return Launch(128, 8, 1) if width <= 128 else Launch(64, 8, 1, 64)


@cache
def _table() -> dict[str, Launch]:
    if not TABLE.is_file():
        return {}
    return {name: Launch(*value) for name, value in json.loads(TABLE.read_text()).items()}
