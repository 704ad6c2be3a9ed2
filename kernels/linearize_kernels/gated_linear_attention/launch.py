"""The Triton kernels of triton.py and triton_*_gradients.py as two operations of torch, forward and backward.

Shape legend in __init__.py; N splits. All state here is per query head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.configs import Launch, launch
from linearize_kernels.gated_linear_attention import triton, triton_key_gradients, triton_query_gradients
from linearize_kernels.gated_linear_attention.launch_blocks import BlockPlan, by_blocks, walk_blocks
from linearize_kernels.operations import differentiate, operation, power

SPLIT_UNIT = 128
"""Splits are multiples of so many tokens, a multiple of every chunk."""

MIN_SPLIT, MAX_SPLITS, PROGRAMS = 256, 16, 256
"""Tokens of a split at least, splits of a row at most, and programs that a launch aims for."""

ONE_SIGN_FROM = 128
"""Features per sign from which p and n are walked one after the other: both states would not fit the registers."""

FORWARD = {"add_up_splits": triton.add_up_splits, "walk_forward": triton.walk_forward}
"""Kernels that may share a head's values out over several programs."""

BACKWARD = {
    "add_up_splits_backwards": triton_key_gradients.add_up_splits_backwards,
    "walk_query_gradients": triton_query_gradients.walk_query_gradients,
    "walk_key_gradients": triton_key_gradients.walk_key_gradients,
}

Optional = Tensor | None


def split_tokens(rows: int, length: int) -> int:
    """Tokens of a split, for `rows` = B * H rows: enough programs, none too short."""
    splits = max(1, min(MAX_SPLITS, -(-PROGRAMS // rows), length // MIN_SPLIT))
    tokens = -(-length // splits)
    return -(-tokens // SPLIT_UNIT) * SPLIT_UNIT


class Plan:
    """What follows from the forms of a call's tensors: sizes, how the sequence is split, and bound kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
        query_weight: Optional, query_bias: Optional, feature_map: str, normalised: bool, delay: int, skip: int,
    ) -> None:  # fmt: skip
        self.batch, self.length, self.heads, self.width = q.shape
        self.values, self.dtype, self.device = v.shape[-1], v.dtype, v.device
        self.features = self.width if query_weight is None else query_weight.shape[-1]
        self.feature_map, self.normalised, self.delay = feature_map, normalised, delay
        f = power(self.features)
        self.passes = 2 if feature_map == "softmax" and f >= ONE_SIGN_FROM else 1
        self.signs = 1 if query_weight is None or self.passes == 2 else 2
        self.gate_kind = "none" if gate is None else "head" if gate.ndim == 3 else "feature"
        self.rows = self.batch * self.heads
        self.tokens = split_tokens(self.rows, self.length)
        self.splits = -(-self.length // self.tokens)
        self.carry_width = f if self.gate_kind == "feature" else 1
        self.key_heads, self.value_heads = k.shape[2], v.shape[2]
        self.constants: dict[str, Any] = {
            "H": self.heads,
            "KH": self.key_heads,
            "VH": self.value_heads,
            "GH": self.heads if gate is None else gate.shape[2],
            "width": self.width,
            "features": self.features,
            "values": self.values,
            "K": power(self.width),
            "F": f,
            "V": power(self.values),
            "E": self.carry_width,
            "MAP": feature_map,
            "GATE": self.gate_kind,
            "MASKED": mask is not None,
            "PACKED": segments is not None,
            "BIAS": query_bias is not None,
            "SIGNS": self.signs,
            "NORMALISED": normalised,
            "PRECISION": "tf32" if v.dtype == torch.bfloat16 else "tf32x3",
        }
        self.q_strides = q.stride()[:3]
        self.key_strides = (*k.stride()[:3], *v.stride()[:3], delay, skip)
        self.bound: dict[tuple[Any, ...], Bound] = {}
        self.blocks = BlockPlan(self) if by_blocks(self) else None

    def chosen(self, name: str) -> Launch:
        """How the launch table starts a kernel for these sizes."""
        return launch(
            name, self.dtype, max(self.constants[size] for size in "KFV"), f"{self.feature_map} {self.gate_kind}"
        )

    def kernel(self, name: str, splits: int, *flags: tuple[str, bool]) -> Bound:
        """A walk's kernel, bound; `flags` are the constants that depend on the call."""
        found = self.bound.get((name, *flags))
        if found is None:
            found = self.bound[name, *flags] = self._bind(name, splits, dict(flags))
        return found

    def _bind(self, name: str, splits: int, flags: dict[str, bool]) -> Bound:
        function = (FORWARD | BACKWARD)[name]
        constants = self.constants | flags | {"TILED": "gradients" not in name}
        chosen = self.chosen(name)
        grid: tuple[int, ...] = (self.rows, splits)
        if name in FORWARD:
            if chosen.values and self.values % chosen.values == 0:
                constants["V"] = min(constants["V"], chosen.values)
            grid = (*grid, -(-self.values // constants["V"]))
        strides = {"add_up_splits": self.key_strides, "add_up_splits_backwards": self.q_strides}
        numbers = (*strides.get(name, (*self.q_strides, *self.key_strides)), self.length, self.tokens // chosen.chunk)
        constants["C"] = chosen.chunk
        constants = {key: value for key, value in constants.items() if key in function.arg_names}
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        return Bound(function, grid, numbers, constants | options, self.device)

    def output_gradients(self, other: bool) -> Bound:
        found = self.bound.get(("output_gradients", other))
        if found is None:
            constants = {"values": self.values, "V": self.constants["V"], "C": 64, "OTHER": other}
            rows = self.rows * self.length
            found = Bound(triton_query_gradients.output_gradients, (-(-rows // 64),), (rows,), constants, self.device)
            self.bound["output_gradients", other] = found
        return found

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=self.device)

    def new_sums(self, passes: int) -> tuple[Tensor, Tensor]:
        """Memory for what the splits add, and for their carries."""
        shape = (passes, self.rows, self.splits - 1)
        return self.new(*shape, self.signs, self.values + 1, self.features), self.new(*shape, self.carry_width)

    def new_state(self, passes: int) -> tuple[Tensor, Tensor]:
        shape = (self.batch, self.heads, passes * self.signs * self.features)
        return self.new(*shape, self.values), self.new(*shape)

    def new_output(self) -> Tensor:
        dtype = self.dtype if self.normalised else torch.float32
        return self.new(self.batch, self.length, self.heads, self.values, dtype=dtype)

    def new_scale(self) -> Tensor:
        return self.new(self.batch, self.length, self.heads)

    def own(self, number: int, *states: Optional) -> list[Optional]:
        """This pass's features of states s and z."""
        if self.passes == 1:
            return list(states)
        place = slice(number * self.features, (number + 1) * self.features)
        return [None if x is None else x[:, :, place].contiguous() for x in states]


def find_plan(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    feature_map: str, normalised: bool, delay: int, skip: int,
) -> Plan:  # fmt: skip
    """The plan of calls like this one, made once."""
    tensors = (q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias)
    rest = (feature_map, normalised, delay, skip)
    settings = (SPLIT_UNIT, MIN_SPLIT, MAX_SPLITS, PROGRAMS, ONE_SIGN_FROM)
    key = ("walk", v.device, settings, *rest, *forms(*tensors))
    return plan_for(key, lambda: Plan(*tensors[:7], query_bias, *rest))


def signed(number: int, *maps: Optional) -> tuple[Optional, ...]:
    """The maps of a pass: the second has those of -u."""
    return maps if number == 0 else tuple(None if x is None else -x for x in maps)


def _fake_walk(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, epsilon: float, delay: int, skip: int, ended: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    plan = Plan(q, k, v, gate, mask, segments, query_weight, query_bias, feature_map, normalised, delay, skip)
    return plan.new_output(), plan.new_scale(), *plan.new_state(plan.passes), *plan.new_sums(plan.passes)


def _walk(
    kept: bool, q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, epsilon: float, delay: int, skip: int, ended: bool,
) -> tuple[Tensor, Optional, Optional, Optional, Optional, Optional]:  # fmt: skip
    """`walk`; where not `kept`, without what only its backward pass reads, and without the state if not `ended`."""
    maps = (query_weight, key_weight, query_bias, key_bias)
    plan = find_plan(q, k, v, gate, mask, segments, *maps, feature_map, normalised, delay, skip)
    masks = given(q, gate, mask, segments)
    if plan.blocks is not None and not kept:  # the backward pass needs the sums below
        states = (other, other_den, start_s, start_z)
        return *walk_blocks(plan.blocks, q, k, v, masks, maps, *states, epsilon, ended), None, None
    all_sums, all_carries = plan.new_sums(plan.passes) if kept or plan.splits > 1 else (None, None)
    before: tuple[Tensor, Tensor] | None = None
    ends = []
    for number in range(plan.passes):
        last = number == plan.passes - 1
        scaled = kept or not normalised or not last
        y, scale = plan.new_output(), plan.new_scale() if scaled else None
        end = plan.new_state(1) if ended else (None, None)
        sums, carry = given(y, all_sums, all_carries)
        if plan.passes > 1 and all_sums is not None:
            sums, carry = sums[number], carry[number]
        starts = plan.own(number, start_s, start_z)
        own_maps, others = given(q, *signed(number, *maps)), given(q, other, other_den, *starts)
        if plan.splits > 1:
            plan.kernel("add_up_splits", plan.splits - 1)((k, v, *masks, own_maps[1], own_maps[3], sums, carry))
        flags = (("STARTED", start_s is not None), ("OTHER", other is not None), ("SCALED", scaled), ("ENDED", ended))
        plan.kernel("walk_forward", plan.splits, *flags)(
            (q, k, v, *masks, *own_maps, *others, sums, carry, y, *given(y, scale, *end)),
            epsilon if last else 0.0,
        )
        ends.append(end)
        if before is not None and scale is not None and not normalised:
            y, scale = y + before[0], scale + before[1]
        if scale is not None and not last:
            before = (y, scale)
            if normalised:  # what was found so far is the next pass's other branch
                other, other_den = y, scale.reciprocal()
    end_s, end_z = ends[0]
    if ended and len(ends) == 2:
        end_s, end_z = (torch.cat(parts, dim=2) for parts in zip(*ends, strict=True))
    return y, scale, end_s, end_z, all_sums, all_carries


def _walk_alone(*arguments: Any) -> tuple[Optional, ...]:
    return _walk(False, *arguments)


@operation("walk", _fake_walk, alone=_walk_alone)
def walk(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, mask: Optional, segments: Optional,
    query_weight: Optional, key_weight: Optional, query_bias: Optional, key_bias: Optional,
    other: Optional, other_den: Optional, start_s: Optional, start_z: Optional,
    feature_map: str, normalised: bool, epsilon: float, delay: int, skip: int, ended: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, V] and scale [B, T, H] (or numerator and denominator), end state s and z, sums and carries.

    All tensors have unit stride in the last dimension; gate, mask, segments, maps, other and states are contiguous.
    The key and value of token t are those of row t - delay; the first `skip` rows are left out. If not `ended`, nobody
    reads the end state, and None may stand for it.
    """
    found = _walk(
        True, q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias,
        other, other_den, start_s, start_z, feature_map, normalised, epsilon, delay, skip, True,
    )  # fmt: skip
    return found  # type: ignore[return-value]  # all are there


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
    maps = (query_weight, key_weight, query_bias, key_bias)
    plan = find_plan(q, k, v, gate, mask, segments, *maps, feature_map, normalised, delay, skip)
    dy = dy.to(v.dtype).contiguous()
    nothing = plan.new(0)
    d_other, d_other_den = (nothing if x is None else torch.empty_like(x) for x in (other, other_den))
    if normalised:
        row_term = torch.empty_like(scale)
        plan.output_gradients(other is not None)(
            (dy, y, scale, *given(q, other, other_den), row_term, d_other, d_other_den)
        )
    else:
        row_term = torch.zeros_like(scale) if d_scale is None else d_scale.contiguous()
    if end_s_gradient is not None or end_z_gradient is not None:
        end_s_gradient = torch.zeros_like(end_s) if end_s_gradient is None else end_s_gradient.contiguous()
        end_z_gradient = torch.zeros_like(end_z) if end_z_gradient is None else end_z_gradient.contiguous()
    states = (start_s, start_z, end_s, end_z, end_s_gradient, end_z_gradient)
    parts = [(all_sums, all_carries)] if plan.passes == 1 else zip(all_sums, all_carries, strict=True)
    found = [
        _one_pass(
            plan, (q, k, v), (gate, mask, segments), signed(number, *maps), dy, scale, row_term,
            *part, plan.own(number, *states), nothing,
        )
        for number, part in enumerate(parts)
    ]  # fmt: skip
    gradients = found[0]
    if len(found) == 2:  # the same q, k, v; maps of opposite sign; the states' features one after the other
        plus, minus = found
        gradients = [a + b if a.numel() else a for a, b in zip(plus[:4], minus[:4], strict=True)]
        gradients += [a - b if a.numel() else a for a, b in zip(plus[4:8], minus[4:8], strict=True)]
        gradients += [torch.cat([a, b], 2) if a.numel() else a for a, b in zip(plus[8:], minus[8:], strict=True)]
    return [*gradients[:8], d_other, d_other_den, *gradients[8:]]


def _one_pass(
    plan: Plan, heads: tuple[Tensor, ...], flags: tuple[Optional, ...], maps: tuple[Optional, ...], dy: Tensor,
    scale: Tensor, row_term: Tensor, sums: Tensor, carry: Tensor, states: list[Optional], nothing: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, gate, the maps, and the state before."""
    q, gate = heads[0], flags[0]
    start_s, start_z, end_s, end_z, end_s_gradient, end_z_gradient = states
    masks, own_maps = given(q, *flags), given(q, *maps)
    back_sums, back_carry = row_term, row_term
    if plan.splits > 1:
        back_sums, back_carry = plan.new_sums(1)
        plan.kernel("add_up_splits_backwards", plan.splits - 1)(
            (q, dy, masks[0], masks[2], own_maps[0], own_maps[2], scale, row_term, back_sums, back_carry)
        )

    shape = (plan.batch, plan.length, plan.heads)
    dtype = plan.dtype
    dq, dk = plan.new(*shape, plan.width, dtype=dtype), plan.new(*shape, plan.width, dtype=dtype)
    dv = plan.new(*shape, plan.values, dtype=dtype)
    if plan.delay:  # the last keys are nobody's
        dk[:, -plan.delay :], dv[:, -plan.delay :] = 0, 0

    def shares(weight: Optional) -> Tensor:
        return nothing if weight is None else plan.new(plan.batch, plan.heads, plan.splits, *weight.shape[1:])

    d_query_weight, d_key_weight, d_query_bias, d_key_bias = map(shares, maps)
    gate_term, d_gate = nothing, nothing
    if gate is not None:
        gate_term, d_gate = plan.new(*shape, *gate.shape[3:]), plan.new(*shape, *gate.shape[3:])
    started = ("STARTED", start_s is not None)
    plan.kernel("walk_query_gradients", plan.splits, started)(
        (*heads, *masks, *own_maps, *given(q, start_s, start_z), sums, carry, dy, scale, row_term,
         dq, d_query_weight, d_query_bias, gate_term)
    )  # fmt: skip
    d_start_s, d_start_z = (nothing if x is None else torch.empty_like(x) for x in (start_s, start_z))
    plan.kernel("walk_key_gradients", plan.splits, started, ("ENDED", end_s_gradient is not None))(
        (*heads, *masks, *own_maps, *given(q, start_s, start_z, end_s, end_z, end_s_gradient, end_z_gradient),
         sums, carry, back_sums, back_carry, dy, scale, row_term, gate_term,
         dk, dv, d_key_weight, d_key_bias, d_gate, d_start_s, d_start_z)
    )  # fmt: skip

    def grouped(gradient: Tensor, like: Optional) -> Tensor:
        """Summed over the query heads that read one head of `like`."""
        if like is None or gradient.shape[2] == like.shape[2]:
            return gradient
        return gradient.unflatten(2, (like.shape[2], -1)).sum(3)

    shared = (d_query_weight, d_key_weight, d_query_bias, d_key_bias)
    return [
        dq, grouped(dk, heads[1]), grouped(dv, heads[2]), grouped(d_gate, gate),
        *(x if x.ndim == 1 else x.sum((0, 2)) for x in shared), d_start_s, d_start_z,
    ]  # fmt: skip


DIFFERENTIABLE = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13)
"""Arguments of `walk` that get the gradients of `walk_backward`, in order."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:14], *output)
    ctx.mark_non_differentiable(*output[1 if inputs[15] else 2 : 2], *output[4:])
    ctx.feature_map, ctx.normalised = inputs[14:16]
    ctx.delay, ctx.skip = inputs[17:19]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Optional, d_scale: Optional, d_s: Optional, d_z: Optional, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: where activations are recomputed, a second look is refused
    tensors, outputs = saved[:14], saved[14:]
    dy = torch.zeros_like(outputs[0]) if dy is None else dy
    found = walk_backward(
        dy, None if ctx.normalised else d_scale, d_s, d_z, *tensors, ctx.feature_map, ctx.normalised, ctx.delay,
        ctx.skip, *outputs,
    )  # fmt: skip
    gradients: list[Optional] = [None] * 20
    for place, gradient in zip(DIFFERENTIABLE, found, strict=True):
        tensor = tensors[place]
        gradients[place] = gradient.to(tensor.dtype) if tensor is not None and ctx.needs_input_grad[place] else None
    return tuple(gradients)


differentiate("walk", _differentiate, _save)
