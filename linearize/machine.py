"""What this machine can do: device, precision, memory."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import torch

import linearize
from linearize.errors import RunError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXED: dict[Precision, Literal["no", "bf16"]] = {"fp32": "no", "bf16": "bf16"}

_WORTH_IT = 1.2  # bf16 must beat fp32 by this factor on a CPU
_VERSIONED = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and in which precision."""

    device: torch.device
    precision: Precision
    why: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base weights. Mixers, adapters and their optimiser are fp32 in any case."""
        return DTYPES[self.precision]

    @property
    def mixed_precision(self) -> Literal["no", "bf16"]:
        """How training computes: `bf16` runs forwards under autocast."""
        return MIXED[self.precision]

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s'[: threads > 1]} ({platform.machine()})"


def choose_machine(device: str | None, precision: Literal["auto", "fp32", "bf16"]) -> Machine:
    """Pick the device (CUDA when there is one) and the precision.

    `auto` means bf16 on a GPU that has it, and on a CPU where a short measurement finds bf16 matrix products faster.
    With bf16 on a GPU, fp32 products are tf32 in this process.

    Raises:
        RunError: for a device that is not there.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = read_device(wanted)
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(wanted, error) from None
    on_gpu = chosen.type == "cuda"
    if on_gpu and precision != "fp32" and torch.cuda.is_bf16_supported():
        # the mixers' fp32 products: tf32, still finer than bf16; a resumed run asks for the bf16 it began with
        torch.set_float32_matmul_precision("high")
    if precision != "auto":
        return Machine(chosen, precision, "as asked")
    if on_gpu:
        if torch.cuda.is_bf16_supported():
            return Machine(chosen, "bf16", "the GPU computes in bf16")
        return Machine(chosen, "fp32", "this GPU has no bf16")
    gain = _bf16_gain()
    found = f"bf16 matrix products run at {gain:.1f} times the speed of fp32 on this CPU"
    return Machine(chosen, "bf16" if gain >= _WORTH_IT else "fp32", found)


def read_device(name: str) -> torch.device:
    """A CPU or a GPU by its name, whether it is there or not.

    Raises:
        RunError: for any other name.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, error) from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"'{device.type}' is not supported; use cpu or cuda", place="--device")
    return device


def _unusable(name: str, error: Exception) -> RunError:
    return RunError(
        f"'{name}' is no usable device: {str(error).splitlines()[0].partition('. ')[0]}",
        place="--device",
        remedy="Give cpu, cuda or cuda:N, or leave it out: a GPU is taken when there is one.",
    )


def _bf16_gain() -> float:
    """Speed of a bf16 matrix product over that of an fp32 one, on the CPU."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.randn(512, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(torch.float32) / seconds(torch.bfloat16)


def memory_bytes(device: torch.device) -> int:
    """All memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide what a run computes."""
    ours = {"linearize": linearize.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in _VERSIONED}
