"""Kernels bound to their grids and constants, so that starting one costs little of the host's time.

Triton's own way sorts and specialises every argument on every call, which takes longer than the small kernels here run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from linearize_kernels import configs

Plan = TypeVar("Plan")

MAX_PLANS = 4096
_plans: dict[Hashable, Any] = {}


def plan_for(key: tuple[Hashable, ...], make: Callable[[], Plan]) -> Plan:
    """What `make` returned for this key before; `key` holds all that it depends on, but for the launch overrides."""
    if configs.overrides:
        return make()
    found: Plan | None = _plans.get(key)
    if found is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        found = _plans[key] = make()
    return found


def forms(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """All that a launch depends on but the addresses."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])


def given(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Missing tensors are never read; kernels need some address all the same."""
    return [stand_in if x is None else x for x in tensors]


class Bound:
    """A kernel, its grid, and its last arguments.

    Args:
        kernel: a Triton kernel whose arguments are tensors, then other run-time scalars, `numbers`, and constants.
        numbers: integers.
        constants: constants by name, and launch options.
        device: where it runs.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.full_grid = (*grid, 1, 1)[:3]
        self.index = device.index if device.type == "cuda" else None
        self.several = self.index is not None and torch.cuda.device_count() > 1  # another device may be current
        self.devices = {-1 if self.index is None else self.index}
        self.rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self.compiled: Any = None
        self.parts: tuple[Any, Any, Any] | None = None

    def __call__(self, tensors: Sequence[Tensor], *scalars: float) -> None:
        """Start it on these tensors, in the current stream of their device."""
        if self.several and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                self._start(tensors, scalars)
        else:
            self._start(tensors, scalars)

    def _start(self, tensors: Sequence[Tensor], scalars: tuple[float, ...]) -> None:
        addresses = [x.data_ptr() for x in tensors]
        together = 0
        for address in addresses:
            together |= address
        if self.compiled is None or together & 15:
            compiled = self.kernel[self.grid](*tensors, *scalars, *self.numbers, **self.constants)
            if not together & 15:  # compiled for addresses like these
                self.compiled, self.parts = compiled, _parts(compiled)
        elif self.parts is None or _watched() or set(map(Tensor.get_device, tensors)) != self.devices:
            self.compiled[self.full_grid](*tensors, *scalars, *self.rest)  # says what is wrong with a tensor's device
        else:
            run, *parts = self.parts
            stream = driver.active.get_current_stream(self.index or 0)
            run(*self.full_grid, stream, *parts, None, None, None, *addresses, *scalars, *self.rest)


def _parts(compiled: Any) -> tuple[Any, Any, Any] | None:
    """What Triton (3.6 to 3.9) starts a compiled kernel with; None in a version that does so in another way, and where
    nothing was compiled, in the interpreter.
    """
    try:
        return compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return None


def _watched() -> bool:
    """Whether hooks, a profiler's, want to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if type(enter) is type(leave) is knobs.HookChain:
        return bool(enter.calls or leave.calls)
    return True
