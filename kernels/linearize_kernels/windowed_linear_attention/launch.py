"""The Triton kernels of triton.py as two operations of torch, forward and backward. Shape legend in __init__.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.configs import launch
from linearize_kernels.operations import differentiate, operation, power
from linearize_kernels.windowed_linear_attention import triton as kernels

Optional = Tensor | None


class Plan:
    """What follows from the forms of a call's tensors, and bound kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, meta: Optional, window: int
    ) -> None:
        self.batch, self.length, self.heads, self.width = q.shape
        self.groups, self.values = k.shape[2], v.shape[-1]
        self.sinks = 0 if sink_k is None else sink_k.shape[2]
        self.each = sink_k is not None and sink_k.shape[1] > 1  # every query has sinks of its own
        self.dtype, self.device, self.keys = v.dtype, v.device, k.shape[1]
        self.constants: dict[str, Any] = {
            "H": self.heads,
            "G": self.groups,
            "width": self.width,
            "values": self.values,
            "K": power(self.width),
            "V": power(self.values),
            "SINKS": self.sinks,
            "METAS": 0 if meta is None else meta.shape[1],
            "EACH": self.each,
            "POSITIONED": position is not None,
            "PRECISION": "tf32" if v.dtype == torch.bfloat16 else "tf32x3",
        }
        # rows of G heads: from one batch entry's sinks to the next, from one query's to the next
        entry = self.sinks * self.groups
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        sinks = (0 if sink_k is None else sink_k.shape[1] * entry, entry if self.each else 0)
        size = (window, self.keys - self.length, self.length)
        self.forward, _ = self._bind(kernels.window_forward, self.length, self.heads, (*strides, *sinks, *size))
        self.query_gradients, self.query_chunks = self._bind(
            kernels.window_query_gradients, self.length, self.heads, (*strides, *sinks, *size)
        )
        self.key_gradients, _ = self._bind(kernels.window_key_gradients, self.keys, self.groups, (*strides, *size))

    def _bind(self, function: Any, tokens: int, heads: int, numbers: tuple[int, ...]) -> tuple[Bound, int]:
        """The kernel, and the chunks of its grid."""
        chosen = launch(function.__name__, self.dtype, max(self.constants["K"], self.constants["V"]), "window")
        constants = {"C": chosen.chunk} | self.constants
        constants = {key: value for key, value in constants.items() if key in function.arg_names}
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        chunks = -(-tokens // chosen.chunk)
        return Bound(function, (chunks, self.batch * heads), numbers, constants | options, self.device), chunks

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=self.device)


def find_plan(
    q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, meta: Optional, window: int
) -> Plan:
    """The plan of calls like this one, made once."""
    tensors = (q, k, v, position, sink_k, meta)
    return plan_for(("window", v.device, window, *forms(*tensors)), lambda: Plan(*tensors, window))


def _fake_window(
    q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional, meta: Optional, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = q.shape[:3]
    den, top = q.new_empty(rows, dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)
    return q.new_empty(*rows, v.shape[-1], dtype=v.dtype), den, top, q.new_empty(rows, dtype=torch.int32)


@operation("window", _fake_window)
def window_op(
    q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional, meta: Optional, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V], den, top and the largest key [B, T, H].

    All tensors have unit stride in the last dimension; position, sinks [B, X, S, G, .] and meta are contiguous.
    """
    found = _fake_window(q, k, v, position, sink_k, sink_v, meta, window)
    plan = find_plan(q, k, v, position, sink_k, meta, window)
    plan.forward((q, k, v, *given(q, position, sink_k, sink_v, meta), *found))
    return found


def _fake_backward(
    do: Tensor, d_den: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional,
    meta: Optional, o: Tensor, den: Tensor, top: Tensor, largest: Tensor, window: int,
) -> list[Tensor]:  # fmt: skip
    def new(x: Optional, dtype: torch.dtype) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty(x.shape, dtype=dtype, device=x.device)

    dtype = v.dtype
    return [new(q, dtype), new(k, dtype), new(v, dtype), *(new(x, torch.float32) for x in (sink_k, sink_v, den))]


@operation("window_backward", _fake_backward)
def window_backward(
    do: Tensor, d_den: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional,
    meta: Optional, o: Tensor, den: Tensor, top: Tensor, largest: Tensor, window: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, sink_k, sink_v (empty where not given), and dden den - do . o [B, T, H]."""
    plan = find_plan(q, k, v, position, sink_k, meta, window)
    dtype, (place,) = plan.dtype, given(q, position)
    dq, dk, dv = (plan.new(*x.shape, dtype=dtype) for x in (q, k, v))
    term = plan.new(*q.shape[:3])
    shape = (plan.batch, plan.length if plan.each else plan.query_chunks, plan.sinks, plan.heads)
    d_sink_k, d_sink_v = plan.new(*shape, plan.width), plan.new(*shape, plan.values)
    rows = (den, top, largest, do, d_den, term)
    plan.query_gradients((q, k, v, place, *given(q, sink_k, sink_v), o, *rows, dq, d_sink_k, d_sink_v))
    plan.key_gradients((q, k, v, place, *rows, dk, dv))

    def shared(gradient: Tensor, like: Optional) -> Tensor:
        """Over the query heads of a group and, where all queries share the sinks, over the chunks."""
        if like is None:
            return plan.new(0)
        gradient = gradient.unflatten(3, (plan.groups, -1)).sum(4)
        return gradient if plan.each else gradient.sum(1, keepdim=True)

    return [dq, dk, dv, shared(d_sink_k, sink_k), shared(d_sink_v, sink_v), term]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.window = inputs[7]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Optional, d_den: Optional, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: where activations are recomputed, a second look is refused
    q, k, v, position, sink_k, sink_v, meta, o, den, top, largest = saved
    do = torch.zeros_like(o) if do is None else do.to(v.dtype).contiguous()
    d_den = torch.zeros_like(den) if d_den is None else d_den.contiguous()
    *found, term = window_backward(do, d_den, q, k, v, position, sink_k, sink_v, meta, o, den, top, largest, ctx.window)
    gradients: list[Optional] = [None] * 8
    for place, gradient in zip((0, 1, 2, 4, 5), found, strict=True):
        tensor = saved[place]
        if tensor is not None and ctx.needs_input_grad[place]:
            gradients[place] = gradient.to(tensor.dtype)
    if meta is not None and ctx.needs_input_grad[6]:
        share_BTHM = (meta.float() - top.unsqueeze(-1)).exp() / den.unsqueeze(-1)  # den is at least one meta's weight
        gradients[6] = (share_BTHM * term.unsqueeze(-1)).sum((0, 1)).to(meta.dtype)
    return tuple(gradients)


differentiate("window", _differentiate, _save)
