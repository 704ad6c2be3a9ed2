"""The Triton kernels of triton.py as two operations of torch, forward and backward. Shape legend in __init__.py.

Each of three inputs, and what belongs to it, is an argument of its own: lists would take the dispatcher longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.causal_conv import triton as kernels
from linearize_kernels.configs import launch
from linearize_kernels.operations import differentiate, operation, power

MAX_INPUTS, WIDEST_TILE = 3, 64

Optional = Tensor | None
Tensors = tuple[Optional, ...]
"""What a convolution reads: three inputs, three of taps, of shifts and of tails; positions and padding."""


class Plan:
    """What follows from the forms of a call's tensors, and bound kernels."""

    def __init__(self, tensors: Tensors, silu: bool) -> None:
        xs, taps = ([x for x in part if x is not None] for part in (tensors[:3], tensors[3:6]))
        past, started = taps[0].shape[-1] - 1, tensors[9] is not None and tensors[9].numel() > 0
        self.batch, self.length = xs[0].shape[:2]
        self.device, self.dtype, self.variant = xs[0].device, xs[0].dtype, "silu" if silu else "none"
        self.tile = min(WIDEST_TILE, power(max(x.shape[3] for x in xs)))
        self.columns = sum(x.shape[2] * -(-x.shape[3] // self.tile) for x in xs)
        self.strides = tuple(stride for x in given(xs[0], *tensors[:3]) for stride in x.stride()[:3])
        self.weights = sum(x.numel() for x in tensors[3:9] if x is not None)
        self.constants: dict[str, Any] = {
            "SHAPES": tuple(
                (x.shape[2], weight.shape[0] // x.shape[2], x.shape[3], int(shift is not None))
                for x, weight, shift in zip(xs, taps, tensors[6:9], strict=False)
            ),
            "S": past + 1,
            "W": self.tile,
            "COLUMNS": self.columns,
            "STARTED": started,
            "POSITIONED": tensors[12] is not None,
            "PADDED": tensors[13] is not None,
            "SILU": silu,
        }
        self.forward = self._bind(kernels.convolve, self.length)[0]
        rows = self.length + (past if started else 0)
        self.backward = [
            self._bind(kernels.convolve_gradients, rows, WEIGHTS=self.weights, ENDED=ended) for ended in (False, True)
        ]

    def _bind(self, function: Any, rows: int, **constants: Any) -> tuple[Bound, int]:
        """The kernel, and how many tiles of tokens its grid has."""
        chosen = launch(function.__name__, self.dtype, self.tile, self.variant)
        chunk, warps = (1, 1) if rows == 1 else (chosen.chunk, chosen.warps)
        tiles = -(-rows // chunk)
        constants |= self.constants | {"C": chunk, "num_warps": warps, "num_stages": chosen.stages}
        grid, numbers = (self.batch * tiles * self.columns,), (*self.strides, self.length, tiles)
        return Bound(function, grid, numbers, constants, self.device), self.batch * tiles


def find_plan(tensors: Tensors, silu: bool, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of calls like this one, made once."""
    return plan_for(("causal_convs", device, silu, dtype, *forms(*tensors)), lambda: Plan(tensors, silu))


def _new_outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_1, dtype = arguments[0], arguments[15]

    def new(x: Optional, taps: Optional) -> tuple[Tensor, Tensor]:
        if x is None or taps is None:
            return x_1.new_empty(0), x_1.new_empty(0)
        y = x.new_empty(*x.shape[:2], *taps.shape[:2], dtype=dtype)
        return y, x.new_empty(x.shape[0], taps.shape[2] - 1, *x.shape[2:])

    (y_1, end_1), (y_2, end_2), (y_3, end_3) = map(new, arguments[:3], arguments[3:6])
    return y_1, y_2, y_3, end_1, end_2, end_3


@operation("causal_convs", _new_outputs)
def convolve(
    x_1: Tensor, x_2: Optional, x_3: Optional, taps_1: Tensor, taps_2: Optional, taps_3: Optional,
    shift_1: Optional, shift_2: Optional, shift_3: Optional, tail_1: Optional, tail_2: Optional, tail_3: Optional,
    position: Optional, padding: Optional, silu: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Three outputs [B, T, H, C] in `dtype` and three new tails [B, S - 1, X, C], empty for inputs not given.

    Inputs have unit stride in the last dimension; everything else is contiguous, tails are of their input's dtype.
    """
    weights = (taps_1, taps_2, taps_3, shift_1, shift_2, shift_3)
    tensors = (x_1, x_2, x_3, *weights, tail_1, tail_2, tail_3, position, padding)
    found = _new_outputs(*tensors, silu, dtype)
    find_plan(tensors, silu, dtype, x_1.device).forward((*given(x_1, *tensors), *found))
    return found


def _new_gradients(*arguments: Any) -> list[Tensor]:
    tensors = arguments[6:18]
    dtypes = [None if x is None else torch.float32 if 3 <= place < 9 else x.dtype for place, x in enumerate(tensors)]
    return [
        tensors[0].new_empty(0) if x is None else torch.empty(x.shape, dtype=dtype, device=x.device)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]


@operation("causal_convs_backward", _new_gradients)
def convolve_backward(
    dy_1: Optional, dy_2: Optional, dy_3: Optional, d_end_1: Optional, d_end_2: Optional, d_end_3: Optional,
    x_1: Tensor, x_2: Optional, x_3: Optional, taps_1: Tensor, taps_2: Optional, taps_3: Optional,
    shift_1: Optional, shift_2: Optional, shift_3: Optional, tail_1: Optional, tail_2: Optional, tail_3: Optional,
    position: Optional, padding: Optional, silu: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Gradients of inputs, taps, shifts and tails, empty for what was not given; fp32 for taps and shifts.

    Upstream gradients are contiguous and there for each input; those of the new tails may all be missing.
    """
    inputs, tails = (x_1, x_2, x_3), (tail_1, tail_2, tail_3)
    tensors = (*inputs, taps_1, taps_2, taps_3, shift_1, shift_2, shift_3, *tails, position, padding)
    plan = find_plan(tensors, silu, dtype, x_1.device)
    kernel, tiles = plan.backward[d_end_1 is not None]
    shares = torch.empty(tiles, plan.weights, dtype=torch.float32, device=x_1.device)
    nothing = x_1.new_empty(0)
    found = [nothing if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*inputs, *tails)]
    kernel((*given(x_1, *tensors, dy_1, dy_2, dy_3, d_end_1, d_end_2, d_end_3), *found, shares))
    of_weights, rest = [nothing] * 6, shares.sum(0)
    for place in (0, 3, 1, 4, 2, 5):  # in a share, each input's shift follows its taps
        weight = tensors[3 + place]
        if weight is not None:
            of_weights[place] = rest[: weight.numel()].view(weight.shape)
            rest = rest[weight.numel() :]
    return [*found[:3], *of_weights, *found[3:]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:14])
    ctx.silu, ctx.dtype = inputs[14:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *upstream: Optional) -> tuple[Optional, ...]:
    tensors = ctx.saved_tensors
    dys, d_ends = list(upstream[:3]), list(upstream[3:])
    ended = any(d_end is not None and d_end.numel() > 0 for d_end in d_ends)
    for n, (x, taps) in enumerate(zip(tensors[:3], tensors[3:6], strict=True)):
        if x is None:
            dys[n] = d_ends[n] = None
            continue
        dy, d_end = dys[n], d_ends[n]
        dys[n] = x.new_zeros(*x.shape[:2], *taps.shape[:2], dtype=ctx.dtype) if dy is None else dy.contiguous()
        if not ended:
            d_ends[n] = None
        elif d_end is None:
            d_ends[n] = x.new_zeros(x.shape[0], taps.shape[2] - 1, *x.shape[2:])
        else:
            d_ends[n] = d_end.contiguous()
    found = convolve_backward(*dys, *d_ends, *tensors, ctx.silu, ctx.dtype)
    gradients = [
        gradient.to(x.dtype) if x is not None and needed else None
        for x, gradient, needed in zip(tensors, found, ctx.needs_input_grad, strict=False)
    ]
    return *gradients, None, None, None, None


differentiate("causal_convs", _differentiate, _save)


def convolve_together(
    xs: Sequence[Tensor], taps: Sequence[Tensor], position_BT: Tensor | None, tails: Sequence[Tensor] | None,
    padding_B: Tensor | None, shifts: Sequence[Tensor | None] | None, silu: bool, dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """`causal_convs`, all inputs in one launch."""
    count, none = len(xs), [None] * MAX_INPUTS
    assert count == len(taps) <= MAX_INPUTS, (count, len(taps))
    tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in xs]
    before = none if tails is None else [tail.to(x.dtype).contiguous() for tail, x in zip(tails, xs, strict=True)]
    added = none if shifts is None else [None if shift is None else shift.contiguous() for shift in shifts]
    found = convolve(
        *_slots(tokens), *_slots([x.contiguous() for x in taps]), *_slots(added), *_slots(before),
        None if position_BT is None else position_BT.contiguous(),
        None if padding_B is None else padding_B.contiguous(), silu,
        dtype or torch.promote_types(xs[0].dtype, taps[0].dtype),
    )  # fmt: skip
    return list(found[:count]), list(found[MAX_INPUTS : MAX_INPUTS + count])


def _slots(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Three of them."""
    return (*tensors, None, None)[:3]
