"""The Triton kernels of triton.py as two operations of torch, forward and backward. Shape legend in __init__.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.configs import launch
from linearize_kernels.operations import differentiate, operation, power
from linearize_kernels.windowed_linear_attention import triton as kernels

Optional = Tensor | None


class Inputs:
    """What follows from the shapes of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, window: int) -> None:
        self.batch, self.length, self.heads, self.width = q.shape
        self.groups, self.values = k.shape[2], v.shape[-1]
        self.sinks = 0 if sink_k is None else sink_k.shape[2]
        self.each = sink_k is not None and sink_k.shape[1] > 1  # every query has sinks of its own
        self.dtype, self.past = v.dtype, k.shape[1] - self.length
        self.sizes: dict[str, Any] = {
            "H": self.heads,
            "G": self.groups,
            "width": self.width,
            "values": self.values,
            "K": power(self.width),
            "V": power(self.values),
            "POSITIONED": position is not None,
            "PRECISION": "tf32" if v.dtype == torch.bfloat16 else "tf32x3",
        }
        # rows of G heads: from one batch entry's sinks to the next, from one query's to the next
        entry = self.sinks * self.groups
        per_batch = 0 if sink_k is None else sink_k.shape[1] * entry
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.places = (*strides, per_batch, entry if self.each else 0, window, self.past, self.length)
        self.key_places = (*strides, window, self.past, self.length)

    def config(self, kernel: str) -> tuple[int, dict[str, Any]]:
        """Tokens of a chunk, and the launch arguments of a kernel."""
        chosen = launch(kernel, self.dtype, max(self.sizes["K"], self.sizes["V"]), "window")
        arguments = {"C": chosen.chunk, "num_warps": chosen.warps, "num_stages": chosen.stages}
        return chosen.chunk, self.sizes | arguments

    def rows(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(self.batch, self.length, self.heads, dtype=dtype)


def _fake_window(
    q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional, meta: Optional, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(q, k, v, position, sink_k, window)
    o = q.new_empty(*q.shape[:3], inputs.values, dtype=v.dtype)
    den, top = inputs.rows(q, torch.float32), inputs.rows(q, torch.float32)
    return o, den, top, inputs.rows(q, torch.int32)


@operation("window", _fake_window)
def window_op(
    q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional, meta: Optional, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V], den, top and the largest key [B, T, H].

    All tensors have unit stride in the last dimension; position, sinks [B, X, S, G, .] and meta are contiguous.
    """
    inputs = Inputs(q, k, v, position, sink_k, window)
    found = _fake_window(q, k, v, position, sink_k, sink_v, meta, window)
    chunk, config = inputs.config("window_forward")
    kernels.window_forward[(-(-inputs.length // chunk), inputs.batch * inputs.heads)](
        q, k, v, *(q if x is None else x for x in (position, sink_k, sink_v, meta)), *found, *inputs.places,
        SINKS=inputs.sinks, METAS=0 if meta is None else meta.shape[1], **config,
    )  # fmt: skip
    return found


def _fake_backward(
    do: Tensor, d_den: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional,
    o: Tensor, den: Tensor, top: Tensor, largest: Tensor, window: int,
) -> list[Tensor]:  # fmt: skip
    def new(x: Optional, dtype: torch.dtype) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty(x.shape, dtype=dtype, device=x.device)

    dtype = v.dtype
    return [new(q, dtype), new(k, dtype), new(v, dtype), *(new(x, torch.float32) for x in (sink_k, sink_v, den))]


@operation("window_backward", _fake_backward)
def window_backward(
    do: Tensor, d_den: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Optional, sink_k: Optional, sink_v: Optional,
    o: Tensor, den: Tensor, top: Tensor, largest: Tensor, window: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, sink_k, sink_v (empty where not given), and dden den - do . o [B, T, H]."""
    inputs = Inputs(q, k, v, position, sink_k, window)
    place = q if position is None else position
    dq = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=v.dtype, device=q.device) for x in (k, v))
    term = inputs.rows(q, torch.float32)
    chunk, config = inputs.config("window_query_gradients")
    count = -(-inputs.length // chunk)
    rows = inputs.length if inputs.each else count
    shape = (inputs.batch, rows, inputs.sinks, inputs.heads)
    d_sink_k, d_sink_v = (q.new_empty(*shape, x.shape[-1], dtype=torch.float32) for x in (q, v))
    kernels.window_query_gradients[(count, inputs.batch * inputs.heads)](
        q, k, v, place, *(q if x is None else x for x in (sink_k, sink_v)), o, den, top, largest, do, d_den, term,
        dq, d_sink_k, d_sink_v, *inputs.places, SINKS=inputs.sinks, EACH=inputs.each, **config,
    )  # fmt: skip
    chunk, config = inputs.config("window_key_gradients")
    kernels.window_key_gradients[(-(-k.shape[1] // chunk), inputs.batch * inputs.groups)](
        q, k, v, place, den, top, largest, do, d_den, term, dk, dv, *inputs.key_places, **config
    )

    def shared(gradient: Tensor, like: Optional) -> Tensor:
        """Over the query heads of a group and, where all queries share the sinks, over the chunks."""
        if like is None:
            return q.new_empty(0)
        gradient = gradient.unflatten(3, (inputs.groups, -1)).sum(4)
        return gradient if inputs.each else gradient.sum(1, keepdim=True)

    return [dq, dk, dv, shared(d_sink_k, sink_k), shared(d_sink_v, sink_v), term]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.window = inputs[7]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Optional, d_den: Optional, *_: Any) -> tuple[Any, ...]:
    q, k, v, position, sink_k, sink_v, meta, o, den, top, largest = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do.to(v.dtype).contiguous()
    d_den = torch.zeros_like(den) if d_den is None else d_den.contiguous()
    *found, term = window_backward(do, d_den, q, k, v, position, sink_k, sink_v, o, den, top, largest, ctx.window)
    gradients: list[Optional] = [None] * 8
    for place, gradient in zip((0, 1, 2, 4, 5), found, strict=True):
        tensor = ctx.saved_tensors[place]
        if tensor is not None and ctx.needs_input_grad[place]:
            gradients[place] = gradient.to(tensor.dtype)
    if meta is not None and ctx.needs_input_grad[6]:
        share_BTHM = (meta.float() - top.unsqueeze(-1)).exp() / den.unsqueeze(-1)  # den is at least one meta's weight
        gradients[6] = (share_BTHM * term.unsqueeze(-1)).sum((0, 1)).to(meta.dtype)
    return tuple(gradients)


differentiate("window", _differentiate, _save)
