"""The Triton kernels of triton.py and triton_gradients.py as two operations of torch, forward and backward.

Shape legend in __init__.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.configs import launch
from linearize_kernels.gated_delta import triton, triton_gradients
from linearize_kernels.operations import differentiate, operation, power

MIN_CHUNK, MAX_CHUNK = 32, 64
"""Tokens of a chunk: the inverse is made of blocks of 16, and at most four of them."""


class Needs(NamedTuple):
    """Bytes of values that a program holds per token, and warps and stages that it has at least."""

    bytes: int = 128
    warps: int = 1
    stages: int = 1


NEEDS = {
    "walk_states": Needs(bytes=64, stages=3),  # one head's values make several programs, which wait for their loads
    "walk_gradients": Needs(bytes=64, stages=3),
    "chunk_gradients": Needs(bytes=64, warps=8),  # its registers
}

KERNELS = {
    "solve_chunks": triton.solve_chunks,
    "walk_states": triton.walk_states,
    "read_states": triton.read_states,
    "gather_gradients": triton_gradients.gather_gradients,
    "walk_gradients": triton_gradients.walk_gradients,
    "chunk_gradients": triton_gradients.chunk_gradients,
}

STRIDES = {
    "solve_chunks": "kv",
    "walk_states": "k",
    "read_states": "qk",
    "gather_gradients": "qk",
    "walk_gradients": "k",
    "chunk_gradients": "qkv",
}
"""Of which inputs each kernel takes the strides."""

WALKS = ("walk_states", "walk_gradients")
"""Kernels with a program for all chunks of a row; others have one for each."""

WHOLE = ("solve_chunks", "chunk_gradients")
"""Kernels whose programs go through all values themselves."""

Optional = Tensor | None


class Plan:
    """What follows from the forms of a call's tensors, and bound kernels."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, segments: Optional) -> None:
        self.batch, self.length, heads, self.width = q.shape
        self.heads, self.values = v.shape[2:]
        self.dtype, self.device = v.dtype, v.device
        self.strides = {"q": q.stride()[:3], "k": k.stride()[:3], "v": v.stride()[:3]}
        self.sizes: dict[str, Any] = {
            "J": self.heads,
            "P": heads // self.heads,
            "width": self.width,
            "values": self.values,
            "K": power(self.width),
            "PACKED": segments is not None,
            "PRECISION": "tf32" if self.dtype == torch.bfloat16 else "tf32x3",
        }
        self.widest = max(power(self.width), power(self.values))
        self.chunk = min(MAX_CHUNK, max(MIN_CHUNK, launch("delta_chunk", self.dtype, self.widest, "delta").chunk))
        self.chunks = -(-self.length // self.chunk)
        self.rows = self.batch * self.heads
        self.bound: dict[tuple[Any, ...], Bound] = {}

    def kernel(self, name: str, *flags: tuple[str, bool]) -> Bound:
        """A kernel, bound; `flags` are the constants that depend on the call."""
        found = self.bound.get((name, *flags))
        if found is None:
            found = self.bound[name, *flags] = self._bind(name, dict(flags))
        return found

    def _bind(self, name: str, flags: dict[str, bool]) -> Bound:
        function = KERNELS[name]
        tiles, constants = self.config(name)
        grid = [self.rows] if name in WALKS else [self.rows, self.chunks]
        if name not in WHOLE:
            grid.append(tiles)
        numbers = (*(stride for x in STRIDES[name] for stride in self.strides[x]), self.length)
        taken = (*function.arg_names, "num_warps", "num_stages")
        constants = {key: value for key, value in (constants | flags).items() if key in taken}
        return Bound(function, tuple(grid), numbers, constants, self.device)

    def config(self, kernel: str) -> tuple[int, dict[str, Any]]:
        """Tiles of the values, and the launch arguments of a kernel."""
        chosen, needs = launch(f"delta_{kernel}", self.dtype, self.widest, "delta"), NEEDS.get(kernel, Needs())
        tile = min(power(self.values), chosen.values or needs.bytes // self.dtype.itemsize)
        stages = min(needs.stages, 2 if self.widest > 128 else 3)  # more do not fit a program's shared memory
        warps, stages = max(needs.warps, chosen.warps), max(stages, chosen.stages)
        if self.dtype == torch.float32 and tile < 32:  # Triton 3.6: two warpgroups that share 16 fp32 columns read
            warps = min(warps, 4)  # beyond shared memory
        arguments = {"C": self.chunk, "V": tile, "num_warps": warps, "num_stages": stages}
        return -(-self.values // tile), self.sizes | arguments

    def per_chunk(self, like: Tensor, *sizes: int) -> Tensor:
        return like.new_empty(self.batch, self.heads, self.chunks, *sizes, dtype=self.dtype)

    def per_token(self, like: Tensor, size: int) -> Tensor:
        return like.new_empty(self.batch, self.heads, self.length, size, dtype=self.dtype)


def find_plan(q: Tensor, k: Tensor, v: Tensor, segments: Optional) -> Plan:
    """The plan of calls like this one, made once."""
    key = ("delta", v.device, *forms(q, k, v, segments))
    return plan_for(key, lambda: Plan(q, k, v, segments))


def _fake_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, start: Optional, segments: Optional
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(Plan(q, k, v, segments), q, v)


def _new_outputs(plan: Plan, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    end = q.new_empty(plan.batch, plan.heads, plan.width, plan.values, dtype=torch.float32)
    return (
        q.new_empty(*q.shape[:3], plan.values, dtype=v.dtype),
        end,
        plan.per_chunk(q, plan.chunk, plan.chunk),
        plan.per_token(q, plan.values),
        plan.per_token(q, plan.width),
        plan.per_chunk(q, plan.width, plan.values),
    )


@operation("delta", _fake_delta)
def delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, start: Optional, segments: Optional
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V] and the end state [B, J, K, V]; for the backward pass, the inverses [B, J, N, C, C], U
    [B, J, T, V], W [B, J, T, K] and the states before each chunk [B, J, N, K, V].

    q, k and v have one dtype and unit stride in the last dimension; all else is contiguous, gates and state in fp32.
    """
    plan = find_plan(q, k, v, segments)
    found = _new_outputs(plan, q, v)
    o, end, inverse, u, erase, states = found
    (places,) = given(log_decay, segments)
    plan.kernel("solve_chunks")((k, v, log_decay, beta, places, inverse, u, erase))
    (before,) = given(end, start)
    plan.kernel("walk_states", ("STARTED", start is not None))((k, log_decay, places, u, erase, before, states, end))
    plan.kernel("read_states")((q, k, log_decay, places, u, states, o))
    return found


def _fake_backward(
    do: Tensor, end_gradient: Optional, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    start: Optional, segments: Optional, inverse: Tensor, u: Tensor, erase: Tensor, states: Tensor,
) -> list[Tensor]:  # fmt: skip
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay, beta)]
    return [*found, q.new_empty(0, dtype=torch.float32) if start is None else torch.empty_like(start)]


@operation("delta_backward", _fake_backward)
def delta_backward(
    do: Tensor, end_gradient: Optional, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    start: Optional, segments: Optional, inverse: Tensor, u: Tensor, erase: Tensor, states: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay, beta and start (empty where not given), from do, contiguous in the dtype of v,
    and from the end state's.
    """
    plan = find_plan(q, k, v, segments)
    found = _fake_backward(do, end_gradient, q, k, v, log_decay, beta, start, segments, inverse, u, erase, states)
    *gradients, d_start = found
    du, state_gradients = torch.empty_like(u), torch.empty_like(states)
    (places,) = given(log_decay, segments)
    plan.kernel("gather_gradients")((q, k, log_decay, places, do, du, state_gradients))
    (d_end,) = given(d_start, end_gradient)
    flags = (("STARTED", start is not None), ("ENDED", end_gradient is not None))
    plan.kernel("walk_gradients", *flags)((k, log_decay, places, erase, du, state_gradients, d_end, d_start))
    plan.kernel("chunk_gradients")(
        (q, k, v, log_decay, beta, places, inverse, u, states, do, du, state_gradients, *gradients)
    )
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Optional, end_gradient: Optional, *_: Any) -> tuple[Any, ...]:
    q, k, v, log_decay, beta, start, segments, *kept = ctx.saved_tensors
    do = v.new_zeros(*q.shape[:3], v.shape[-1]) if do is None else do.to(v.dtype).contiguous()
    end_gradient = None if end_gradient is None else end_gradient.contiguous()
    found = delta_backward(do, end_gradient, q, k, v, log_decay, beta, start, segments, *kept)
    needed = ctx.needs_input_grad
    return *(gradient if need else None for gradient, need in zip(found, needed, strict=False)), None


differentiate("delta", _differentiate, _save)
