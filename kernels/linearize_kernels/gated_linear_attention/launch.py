"""The Triton kernels of triton.py as two operations of torch, forward and backward.

Shape legend in __init__.py; N splits. All state here is per query head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from linearize_kernels.configs import launch
from linearize_kernels.gated_linear_attention import triton as kernels
from linearize_kernels.operations import differentiate, operation, power

SPLIT_UNIT = 128
"""Splits are multiples of so many tokens, a multiple of every chunk."""

MIN_SPLIT, MAX_SPLITS, PROGRAMS = 256, 16, 256
"""Tokens of a split at least, splits of a row at most, and programs that a launch aims for."""

ONE_SIGN_FROM = 128
"""Features per sign from which p and n are walked one after the other: both states would not fit the registers."""

Optional = Tensor | None


def split_tokens(rows: int, length: int) -> int:
    """Tokens of a split, for `rows` = B * H rows: enough programs, none too short."""
    splits = max(1, min(MAX_SPLITS, -(-PROGRAMS // rows), length // MIN_SPLIT))
    tokens = -(-length // splits)
    return -(-tokens // SPLIT_UNIT) * SPLIT_UNIT


@dataclass
class Inputs:
    """The tensors of one call and what follows from their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Optional
    mask: Optional
    segments: Optional
    query_weight: Optional
    key_weight: Optional
    query_bias: Optional
    key_bias: Optional
    feature_map: str
    normalised: bool
    delay: int
    skip: int

    def __post_init__(self) -> None:
        self.batch, self.length, self.heads, self.width = self.q.shape
        self.values = self.v.shape[-1]
        self.features = self.width if self.query_weight is None else self.query_weight.shape[-1]
        f = power(self.features)
        self.passes = 2 if self.feature_map == "softmax" and f >= ONE_SIGN_FROM else 1
        self.signs = 1 if self.query_weight is None or self.passes == 2 else 2
        self.gate_kind = "none" if self.gate is None else "head" if self.gate.ndim == 3 else "feature"
        self.rows = self.batch * self.heads
        self.tokens = split_tokens(self.rows, self.length)
        self.splits = -(-self.length // self.tokens)
        self.carry_width = f if self.gate_kind == "feature" else 1
        self.sizes: dict[str, Any] = {
            "H": self.heads,
            "GH": self.heads if self.gate is None else self.gate.shape[2],
            "width": self.width,
            "features": self.features,
            "values": self.values,
            "K": power(self.width),
            "F": f,
            "V": power(self.values),
            "E": self.carry_width,
            "MAP": self.feature_map,
            "GATE": self.gate_kind,
            "PACKED": self.segments is not None,
            "BIAS": self.query_bias is not None,
            "SIGNS": self.signs,
            "PRECISION": "tf32" if self.v.dtype == torch.bfloat16 else "tf32x3",
        }
        self.key_sizes = {"KH": self.k.shape[2], "VH": self.v.shape[2], "MASKED": self.mask is not None}

    @property
    def q_strides(self) -> tuple[int, ...]:
        return self.q.stride()[:3]

    @property
    def key_strides(self) -> tuple[int, ...]:
        return (*self.k.stride()[:3], *self.v.stride()[:3], self.delay, self.skip)

    def signed(self) -> list["Inputs"]:
        """One entry a pass: the second has the map of -u."""
        if self.passes == 1:
            return [self]
        minus = {name: getattr(self, name) for name in ("query_weight", "key_weight", "query_bias", "key_bias")}
        changes: dict[str, Any] = {name: None if x is None else -x for name, x in minus.items()}
        return [self, replace(self, **changes)]

    def config(self, kernel: str) -> tuple[int, int, dict[str, Any]]:
        """Chunks of a split, tiles of the values, and the launch arguments of a kernel."""
        widest = max(self.sizes["K"], self.sizes["F"], self.sizes["V"])
        chosen = launch(kernel, self.v.dtype, widest, f"{self.feature_map} {self.gate_kind}")
        tile = self.sizes["V"]
        if chosen.values and self.values % chosen.values == 0:
            tile = min(tile, chosen.values)
        arguments = {"C": chosen.chunk, "V": tile, "num_warps": chosen.warps, "num_stages": chosen.stages}
        return self.tokens // chosen.chunk, -(-self.values // tile), self.sizes | arguments

    def or_q(self, *tensors: Optional) -> list[Tensor]:
        """Missing tensors are never read; kernels need some address all the same."""
        return [self.q if tensor is None else tensor for tensor in tensors]

    def masks(self) -> list[Tensor]:
        return self.or_q(self.gate, self.mask, self.segments)

    def maps(self) -> list[Tensor]:
        return self.or_q(self.query_weight, self.key_weight, self.query_bias, self.key_bias)

    def new_sums(self, passes: int) -> tuple[Tensor, Tensor]:
        """Memory for what the splits add, and for their carries."""
        shape = (passes, self.rows, self.splits - 1)
        sums = self.q.new_empty(*shape, self.signs, self.values + 1, self.features, dtype=torch.float32)
        return sums, self.q.new_empty(*shape, self.carry_width, dtype=torch.float32)

    def new_state(self, passes: int) -> tuple[Tensor, Tensor]:
        features = passes * self.signs * self.features
        s = self.q.new_empty(self.batch, self.heads, features, self.values, dtype=torch.float32)
        return s, self.q.new_empty(self.batch, self.heads, features, dtype=torch.float32)

    def new_outputs(self) -> tuple[Tensor, Tensor]:
        dtype = self.v.dtype if self.normalised else torch.float32
        shape = (self.batch, self.length, self.heads)
        return self.q.new_empty(*shape, self.values, dtype=dtype), self.q.new_empty(shape, dtype=torch.float32)

    def own(self, number: int, *states: Optional) -> list[Optional]:
        """This pass's features of states s and z."""
        if self.passes == 1:
            return list(states)
        place = slice(number * self.features, (number + 1) * self.features)
        return [None if x is None else x[:, :, place].contiguous() for x in states]


def _fake_walk(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, epsilon: float, delay: int, skip: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = Inputs(
        q,
        k,
        v,
        gate,
        mask,
        segments,
        query_weight,
        key_weight,
        query_bias,
        key_bias,
        feature_map,
        normalised,
        delay,
        skip,
    )
    return *inputs.new_outputs(), *inputs.new_state(inputs.passes), *inputs.new_sums(inputs.passes)


@operation("walk", _fake_walk)
def walk(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, epsilon: float, delay: int, skip: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, V] and scale [B, T, H] (or numerator and denominator), end state s and z, sums and carries.

    All tensors have unit stride in the last dimension; gate, mask, segments, maps, other and states are contiguous.
    The key and value of token t are those of row t - delay; the first `skip` rows are left out.
    """
    whole = Inputs(
        q,
        k,
        v,
        gate,
        mask,
        segments,
        query_weight,
        key_weight,
        query_bias,
        key_bias,
        feature_map,
        normalised,
        delay,
        skip,
    )
    all_sums, all_carries = whole.new_sums(whole.passes)
    before: tuple[Tensor, Tensor] | None = None
    ends = []
    for number, inputs in enumerate(whole.signed()):
        last = number == whole.passes - 1
        sums, carry = all_sums[number], all_carries[number]
        y, scale = inputs.new_outputs()
        starts = inputs.own(number, start_s, start_z)
        end = inputs.new_state(1)
        if inputs.splits > 1:
            chunks, tiles, config = inputs.config("add_up_splits")
            kernels.add_up_splits[(inputs.rows, inputs.splits - 1, tiles)](
                k, v, *inputs.masks(), *inputs.or_q(inputs.key_weight, inputs.key_bias), sums, carry,
                *inputs.key_strides, inputs.length, chunks, TILED=True, **inputs.key_sizes, **config,
            )  # fmt: skip
        chunks, tiles, config = inputs.config("walk_forward")
        kernels.walk_forward[(inputs.rows, inputs.splits, tiles)](
            q, k, v, *inputs.masks(), *inputs.maps(), *inputs.or_q(other, other_den, *starts), sums, carry, y, scale,
            *end, *inputs.q_strides, *inputs.key_strides, inputs.length, chunks, epsilon if last else 0.0,
            STARTED=start_s is not None, NORMALISED=normalised, OTHER=other is not None, TILED=True,
            **inputs.key_sizes, **config,
        )  # fmt: skip
        ends.append(end)
        if before is not None and not normalised:
            y, scale = y + before[0], scale + before[1]
        if not last and normalised:  # what was found so far is the next pass's other branch
            other, other_den = y, scale.reciprocal()
        before = (y, scale)
    end_s, end_z = ends[0] if len(ends) == 1 else (torch.cat(parts, dim=2) for parts in zip(*ends, strict=True))
    return y, scale, end_s, end_z, all_sums, all_carries


def _fake_walk_backward(
    dy: Tensor, d_scale: Optional, end_s_gradient: Optional, end_z_gradient: Optional,
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, delay: int, skip: int,
    y: Tensor, scale: Tensor, end_s: Tensor, end_z: Tensor, all_sums: Tensor, all_carries: Tensor,
) -> list[Tensor]:  # fmt: skip
    def like(x: Optional, dtype: torch.dtype | None = None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    return [
        like(q), like(k, q.dtype), like(v, q.dtype), like(gate, torch.float32),
        *(like(x, torch.float32) for x in (query_weight, key_weight, query_bias, key_bias)),
        *(like(x) for x in (other, other_den, start_s, start_z)),
    ]  # fmt: skip


@operation("walk_backward", _fake_walk_backward)
def walk_backward(
    dy: Tensor, d_scale: Optional, end_s_gradient: Optional, end_z_gradient: Optional,
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, delay: int, skip: int,
    y: Tensor, scale: Tensor, end_s: Tensor, end_z: Tensor, all_sums: Tensor, all_carries: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, gate, query_weight, key_weight, query_bias, key_bias, other, other_den, start_s, start_z;
    empty tensors for what was not given.
    """
    whole = Inputs(
        q,
        k,
        v,
        gate,
        mask,
        segments,
        query_weight,
        key_weight,
        query_bias,
        key_bias,
        feature_map,
        normalised,
        delay,
        skip,
    )
    dy = dy.to(v.dtype).contiguous()
    d_other, d_other_den = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (other, other_den))
    if normalised:
        row_term = torch.empty_like(scale)
        count = row_term.numel()
        kernels.output_gradients[(-(-count // 64),)](
            dy, y, scale, *whole.or_q(other, other_den), row_term, d_other, d_other_den, count,
            values=whole.values, V=whole.sizes["V"], C=64, OTHER=other is not None,
        )  # fmt: skip
    else:
        row_term = torch.zeros_like(scale) if d_scale is None else d_scale.contiguous()
    if end_s_gradient is not None or end_z_gradient is not None:
        end_s_gradient = torch.zeros_like(end_s) if end_s_gradient is None else end_s_gradient.contiguous()
        end_z_gradient = torch.zeros_like(end_z) if end_z_gradient is None else end_z_gradient.contiguous()
    states = (start_s, start_z, end_s, end_z, end_s_gradient, end_z_gradient)
    found = [
        _one_pass(inputs, dy, scale, row_term, all_sums[number], all_carries[number], inputs.own(number, *states))
        for number, inputs in enumerate(whole.signed())
    ]
    gradients = found[0]
    if len(found) == 2:  # the same q, k, v; maps of opposite sign; the states' features one after the other
        plus, minus = found
        gradients = [a + b if a.numel() else a for a, b in zip(plus[:4], minus[:4], strict=True)]
        gradients += [a - b if a.numel() else a for a, b in zip(plus[4:8], minus[4:8], strict=True)]
        gradients += [torch.cat([a, b], 2) if a.numel() else a for a, b in zip(plus[8:], minus[8:], strict=True)]
    return [*gradients[:8], d_other, d_other_den, *gradients[8:]]


def _one_pass(
    inputs: Inputs, dy: Tensor, scale: Tensor, row_term: Tensor, sums: Tensor, carry: Tensor, states: list[Optional]
) -> list[Tensor]:
    """Gradients of q, k, v, gate, the maps, and the state before."""
    q, k, v, gate = inputs.q, inputs.k, inputs.v, inputs.gate
    batch, length, heads, splits, rows = inputs.batch, inputs.length, inputs.heads, inputs.splits, inputs.rows
    start_s, start_z, end_s, end_z, end_s_gradient, end_z_gradient = states
    (back_sums, back_carry), normalised = inputs.new_sums(1), inputs.normalised
    if splits > 1:
        chunks, _, config = inputs.config("add_up_splits_backwards")
        kernels.add_up_splits_backwards[(rows, splits - 1)](
            q, dy, *inputs.or_q(gate, inputs.segments, inputs.query_weight, inputs.query_bias), scale, row_term,
            back_sums, back_carry, *inputs.q_strides, length, chunks, NORMALISED=normalised, TILED=True, **config,
        )  # fmt: skip

    def per_head(*sizes: int) -> Tensor:
        return q.new_empty(batch, length, heads, *sizes)

    def shares(weight: Optional) -> Tensor:
        shape = (0,) if weight is None else (batch, heads, splits, *weight.shape[1:])
        return q.new_empty(shape, dtype=torch.float32)

    maps = (inputs.query_weight, inputs.key_weight, inputs.query_bias, inputs.key_bias)
    dq, dk, dv = per_head(inputs.width), per_head(inputs.width), per_head(inputs.values)
    if inputs.delay:  # the last keys are nobody's
        dk[:, -inputs.delay :], dv[:, -inputs.delay :] = 0, 0
    d_query_weight, d_key_weight, d_query_bias, d_key_bias = map(shares, maps)
    gate_term, d_gate = q.new_empty(0), q.new_empty(0)
    if gate is not None:
        gate_term = q.new_empty(batch, length, heads, *gate.shape[3:], dtype=torch.float32)
        d_gate = torch.empty_like(gate_term)
    strides, started = (*inputs.q_strides, *inputs.key_strides), start_s is not None
    chunks, _, config = inputs.config("walk_query_gradients")
    kernels.walk_query_gradients[(rows, splits)](
        q, k, v, *inputs.masks(), *inputs.maps(), *inputs.or_q(start_s, start_z), sums, carry, dy, scale, row_term,
        dq, d_query_weight, d_query_bias, gate_term, *strides, length, chunks,
        STARTED=started, NORMALISED=normalised, TILED=False, **inputs.key_sizes, **config,
    )  # fmt: skip
    d_start_s, d_start_z = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (start_s, start_z))
    chunks, _, config = inputs.config("walk_key_gradients")
    kernels.walk_key_gradients[(rows, splits)](
        q, k, v, *inputs.masks(), *inputs.maps(), *inputs.or_q(start_s, start_z, end_s, end_z),
        *inputs.or_q(end_s_gradient, end_z_gradient), sums, carry, back_sums, back_carry, dy, scale, row_term,
        gate_term, dk, dv, d_key_weight, d_key_bias, d_gate, d_start_s, d_start_z, *strides, length, chunks,
        STARTED=started, ENDED=end_s_gradient is not None, NORMALISED=normalised, TILED=False,
        **inputs.key_sizes, **config,
    )  # fmt: skip

    def grouped(gradient: Tensor, like: Optional) -> Tensor:
        """Summed over the query heads that read one head of `like`."""
        if like is None or gradient.shape[2] == like.shape[2]:
            return gradient
        return gradient.unflatten(2, (like.shape[2], -1)).sum(3)

    shared = (d_query_weight, d_key_weight, d_query_bias, d_key_bias)
    return [
        dq, grouped(dk, k), grouped(dv, v), grouped(d_gate, gate),
        *(x if x.ndim == 1 else x.sum((0, 2)) for x in shared), d_start_s, d_start_z,
    ]  # fmt: skip


DIFFERENTIABLE = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13)
"""Arguments of `walk` that get the gradients of `walk_backward`, in order."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:14], *output)
    ctx.feature_map, ctx.normalised = inputs[14:16]
    ctx.delay, ctx.skip = inputs[17:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Optional, d_scale: Optional, d_s: Optional, d_z: Optional, *_: Any) -> tuple[Any, ...]:
    tensors, outputs = ctx.saved_tensors[:14], ctx.saved_tensors[14:]
    dy = torch.zeros_like(outputs[0]) if dy is None else dy
    found = walk_backward(
        dy,
        None if ctx.normalised else d_scale,
        d_s,
        d_z,
        *tensors,
        ctx.feature_map,
        ctx.normalised,
        ctx.delay,
        ctx.skip,
        *outputs,
    )
    gradients: list[Optional] = [None] * 19
    for place, gradient in zip(DIFFERENTIABLE, found, strict=True):
        tensor = tensors[place]
        gradients[place] = gradient.to(tensor.dtype) if tensor is not None and ctx.needs_input_grad[place] else None
    return tuple(gradients)


differentiate("walk", _differentiate, _save)
