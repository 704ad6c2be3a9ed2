"""Which implementation of an operation runs: the one place that decides.

Triton on CUDA devices, torch everywhere else. `LINEARIZE_BACKEND` = triton or torch forces one; Triton on a CPU needs
its interpreter, TRITON_INTERPRET=1. What was chosen for an operation, and why, is logged once, by "linearize_kernels".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

VARIABLE = "LINEARIZE_BACKEND"
DTYPES = (torch.float32, torch.bfloat16)
MAX_WIDTH = 256
"""Of a head, its values and its features of both signs, in bf16; half of it in fp32. More does not fit a program."""

_stand_for: str | None = None

_log = logging.getLogger("linearize_kernels")


def uses_triton(operation: str, tensor: Tensor, *widths: int) -> bool:
    """Whether `operation` runs in Triton on tensors like this one.

    Args:
        operation: its name, for the log.
        tensor: one of its inputs; device and dtype decide.
        widths: head widths and feature counts.

    Raises:
        ValueError: where LINEARIZE_BACKEND is unknown, or asks for Triton where it cannot run.
    """
    return _decide(operation, device_kind(tensor), tensor.dtype, max(widths, default=0))


def device_kind(tensor: Tensor) -> str:
    """The type of the tensor's device, or of the one that it stands for."""
    return _stand_for or tensor.device.type


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Inside, all tensors stand for ones of this kind of device: for tracing operations without memory or a GPU."""
    global _stand_for
    before, _stand_for = _stand_for, device
    try:
        yield
    finally:
        _stand_for = before


@torch.compiler.assume_constant_result
def _decide(operation: str, device: str, dtype: torch.dtype, width: int) -> bool:
    forced = os.environ.get(VARIABLE, "auto")
    if forced not in ("auto", "triton", "torch"):
        raise ValueError(f"{VARIABLE}={forced} is unknown; use triton, torch or auto")
    if forced == "torch":
        return _say(operation, False, f"{VARIABLE}=torch")
    obstacle = _obstacle(dtype, width)
    if device != "cuda" and not (forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        obstacle = f"the tensors are on {device}"
    if forced == "triton" and obstacle:
        raise ValueError(f"{VARIABLE}=triton, but {operation} cannot run there: {obstacle}; use torch or auto")
    return _say(operation, not obstacle, obstacle or f"{device}, {dtype}")


@cache
def _obstacle(dtype: torch.dtype, width: int) -> str:
    """Why Triton cannot run it; empty where it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"the kernels are written for float32 and bfloat16, not for {dtype}"
    limit = MAX_WIDTH if dtype == torch.bfloat16 else MAX_WIDTH // 2
    if width > limit:
        return f"heads or features of {width}; in {dtype} the kernels hold at most {limit}"
    return ""


@cache
def _say(operation: str, triton: bool, why: str) -> bool:
    _log.info("%s runs in %s (%s)", operation, "Triton" if triton else "torch", why)
    return triton
