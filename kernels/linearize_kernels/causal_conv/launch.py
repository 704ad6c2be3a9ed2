"""The Triton kernels of triton.py as two operations of torch, forward and backward.

Up to three inputs a launch, each an argument of its own: lists would take the dispatcher half as long again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize_kernels.causal_conv import triton as kernels
from linearize_kernels.configs import launch
from linearize_kernels.operations import differentiate, operation

MAX_INPUTS, WIDEST_TILE = 3, 64

Optional = Tensor | None


@dataclass
class Inputs:
    """The tensors of one call, in the operation's order, and what follows from their shapes."""

    tensors: tuple[Optional, ...]
    silu: bool

    def __post_init__(self) -> None:
        tensors = self.tensors
        self.xs = [x for x in tensors[:3] if x is not None]
        self.taps = [x for x in tensors[3:6] if x is not None]
        self.count = len(self.xs)
        self.shifts, self.tails = tensors[6 : 6 + self.count], tensors[9 : 9 + self.count]
        self.batch, self.length = self.xs[0].shape[:2]
        self.past = self.taps[0].shape[-1] - 1
        self.started = self.past > 0 and self.tails[0] is not None
        self.shapes = tuple(
            (x.shape[2], taps.shape[0] // x.shape[2], x.shape[3], int(shift is not None))
            for x, taps, shift in zip(self.xs, self.taps, self.shifts, strict=True)
        )

    def new_outputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Outputs, then new tails; empty tensors for inputs that were not given."""
        x = self.xs[0]
        ys = [x.new_empty(self.batch, self.length, *taps.shape[:2], dtype=dtype) for taps in self.taps]
        ends = [x.new_empty(self.batch, self.past, *x.shape[2:]) for x in self.xs]
        missing = [x.new_empty(0) for _ in range(MAX_INPUTS - self.count)]
        return *ys, *missing, *ends, *(torch.empty_like(x) for x in missing)

    def new_gradients(self) -> list[Tensor]:
        """Of all tensors, in order; those of taps and shifts are found elsewhere. Empty where nothing was given."""
        empty = self.xs[0].new_empty(0)
        return [
            empty if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (*self.tensors[:3], *[None] * 6, *self.tensors[9:12])
        ]

    def launch(self, kernel: str, rows: int, **constants: Any) -> tuple[tuple[int], int, dict[str, Any]]:
        """Grid, tiles of tokens of a row, and the launch arguments of a kernel that reads so many rows."""
        widest = max(16, 1 << (max(shape[2] for shape in self.shapes) - 1).bit_length())
        tile = min(widest, WIDEST_TILE)
        chosen = launch(kernel, self.xs[0].dtype, widest, "silu" if self.silu else "none")
        chunk, warps = (1, 1) if self.length == 1 and kernel == "convolve" else (chosen.chunk, chosen.warps)
        columns = sum(heads * -(-width // tile) for heads, _, width, _ in self.shapes)
        tiles = -(-rows // chunk)
        constants |= {
            "SHAPES": self.shapes, "COUNT": self.count, "S": self.past + 1, "C": chunk, "W": tile, "COLUMNS": columns,
            "STARTED": self.started, "PADDED": self.tensors[13] is not None, "SILU": self.silu, "num_warps": warps,
            "num_stages": chosen.stages,
        }  # fmt: skip
        return (self.batch * tiles * columns,), tiles, constants

    def pointers(self) -> tuple[tuple[Tensor, ...], ...]:
        """Inputs, taps, shifts and tails. Missing tensors are never read; kernels need some address all the same."""
        shifts, tails = (
            tuple(own if x is None else x for x, own in zip(tensors, self.xs, strict=True))
            for tensors in (self.shifts, self.tails)
        )
        return tuple(self.xs), tuple(self.taps), shifts, tails

    def places(self) -> tuple[Any, ...]:
        """Strides of the inputs, positions and padding."""
        position, padding = self.tensors[12:]
        strides = tuple(stride for x in self.xs for stride in x.stride()[:3])
        return strides, position, position if padding is None else padding, self.length


def _fake(*given: Any) -> tuple[Tensor, ...]:
    return Inputs(given[:14], given[14]).new_outputs(given[15])


@operation("causal_convs", _fake)
def convolve(
    x_1: Tensor, x_2: Optional, x_3: Optional, taps_1: Tensor, taps_2: Optional, taps_3: Optional,
    shift_1: Optional, shift_2: Optional, shift_3: Optional, tail_1: Optional, tail_2: Optional, tail_3: Optional,
    position: Tensor, padding: Optional, silu: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Three outputs [B, T, H, C] in `dtype` and three new tails [B, S - 1, X, C], empty for inputs not given.

    Inputs have unit stride in the last dimension; everything else is contiguous, tails are of their input's dtype.
    """
    tensors = (
        x_1, x_2, x_3, taps_1, taps_2, taps_3, shift_1, shift_2, shift_3, tail_1, tail_2, tail_3, position, padding
    )  # fmt: skip
    inputs = Inputs(tensors, silu)
    found = inputs.new_outputs(dtype)
    grid, tiles, constants = inputs.launch("convolve", inputs.length)
    kernels.convolve[grid](
        *inputs.pointers(), found[: inputs.count], found[3 : 3 + inputs.count], *inputs.places(), tiles, **constants
    )
    y_1, y_2, y_3, end_1, end_2, end_3 = found
    return y_1, y_2, y_3, end_1, end_2, end_3


def _fake_backward(*given: Any) -> list[Tensor]:
    inputs = Inputs(given[6:20], given[20])
    found = inputs.new_gradients()
    for place, tensor in enumerate(inputs.tensors[3:9], start=3):
        found[place] = found[place] if tensor is None else tensor.new_empty(tensor.shape, dtype=torch.float32)
    return found


@operation("causal_convs_backward", _fake_backward)
def convolve_backward(
    dy_1: Optional, dy_2: Optional, dy_3: Optional, d_end_1: Optional, d_end_2: Optional, d_end_3: Optional,
    x_1: Tensor, x_2: Optional, x_3: Optional, taps_1: Tensor, taps_2: Optional, taps_3: Optional,
    shift_1: Optional, shift_2: Optional, shift_3: Optional, tail_1: Optional, tail_2: Optional, tail_3: Optional,
    position: Tensor, padding: Optional, silu: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Gradients of three inputs, taps, shifts and tails, empty for what was not given; fp32 for taps and shifts."""
    tensors = (
        x_1, x_2, x_3, taps_1, taps_2, taps_3, shift_1, shift_2, shift_3, tail_1, tail_2, tail_3, position, padding
    )  # fmt: skip
    inputs = Inputs(tensors, silu)
    count, batch, x = inputs.count, inputs.batch, x_1
    dys = tuple(
        x.new_zeros(batch, inputs.length, *taps.shape[:2], dtype=dtype) if dy is None else dy.contiguous()
        for dy, taps in zip((dy_1, dy_2, dy_3)[:count], inputs.taps, strict=True)
    )
    d_ends = (d_end_1, d_end_2, d_end_3)[:count]
    ended = inputs.past > 0 and any(d_end is not None for d_end in d_ends)
    if ended:
        d_ends = tuple(
            x.new_zeros(batch, inputs.past, *x.shape[2:]) if d_end is None else d_end.contiguous()
            for d_end, x in zip(d_ends, inputs.xs, strict=True)
        )
    found = inputs.new_gradients()
    weights = sum(tensor.numel() for tensor in tensors[3:9] if tensor is not None)
    rows = inputs.length + (inputs.past if inputs.started else 0)
    grid, tiles, constants = inputs.launch("convolve_gradients", rows, WEIGHTS=weights, ENDED=ended)
    shares = x.new_empty(batch * tiles, weights, dtype=torch.float32)
    dxs, d_tails = found[:count], found[9 : 9 + count]
    kernels.convolve_gradients[grid](
        *inputs.pointers(), dys, d_ends if ended else dys, tuple(dxs), tuple(d_tails), shares, *inputs.places(), tiles,
        **constants,
    )  # fmt: skip
    total, start = shares.sum(0), 0
    for number in range(count):
        for place in (3 + number, 6 + number):  # as the kernel lays them out: an input's taps, then its shift
            tensor = tensors[place]
            if tensor is not None:
                found[place] = total[start : start + tensor.numel()].view(tensor.shape)
                start += tensor.numel()
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:14])
    ctx.silu, ctx.dtype = inputs[14:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *upstream: Optional) -> tuple[Optional, ...]:
    tensors = ctx.saved_tensors
    found = convolve_backward(*upstream, *tensors, ctx.silu, ctx.dtype)
    gradients = [
        gradient.to(tensor.dtype) if tensor is not None and needed else None
        for tensor, gradient, needed in zip(tensors, found, ctx.needs_input_grad, strict=False)
    ]
    return *gradients, None, None, None, None


differentiate("causal_convs", _differentiate, _save)
