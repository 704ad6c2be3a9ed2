"""The Triton kernels of triton.py as two operations of torch, forward and backward. Shape legend in __init__.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize_kernels.configs import launch
from linearize_kernels.gated_delta import triton as kernels
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

Optional = Tensor | None


class Inputs:
    """What follows from the tensors of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Optional) -> None:
        self.batch, self.length, heads, self.width = q.shape
        self.heads, self.values = v.shape[2:]
        self.dtype = v.dtype
        self.segments = log_decay if segments is None else segments  # never read where missing
        self.q_strides, self.k_strides, self.v_strides = q.stride()[:3], k.stride()[:3], v.stride()[:3]
        self.sizes: dict[str, Any] = {
            "J": self.heads,
            "width": self.width,
            "values": self.values,
            "K": power(self.width),
            "PACKED": segments is not None,
            "PRECISION": "tf32" if self.dtype == torch.bfloat16 else "tf32x3",
        }
        self.shared = {"P": heads // self.heads}
        self.widest = max(power(self.width), power(self.values))
        self.chunk = min(MAX_CHUNK, max(MIN_CHUNK, launch("delta_chunk", self.dtype, self.widest, "delta").chunk))
        self.chunks = -(-self.length // self.chunk)
        self.rows = self.batch * self.heads

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


def _fake_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, start: Optional, segments: Optional
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(q, k, v, log_decay, segments)
    end = q.new_empty(inputs.batch, inputs.heads, inputs.width, inputs.values, dtype=torch.float32)
    return (
        q.new_empty(*q.shape[:3], inputs.values, dtype=v.dtype),
        end,
        inputs.per_chunk(q, inputs.chunk, inputs.chunk),
        inputs.per_token(q, inputs.values),
        inputs.per_token(q, inputs.width),
        inputs.per_chunk(q, inputs.width, inputs.values),
    )


@operation("delta", _fake_delta)
def delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, start: Optional, segments: Optional
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, H, V] and the end state [B, J, K, V]; for the backward pass, the inverses [B, J, N, C, C], U
    [B, J, T, V], W [B, J, T, K] and the states before each chunk [B, J, N, K, V].

    q, k and v have one dtype and unit stride in the last dimension; all else is contiguous, gates and state in fp32.
    """
    inputs = Inputs(q, k, v, log_decay, segments)
    found = _fake_delta(q, k, v, log_decay, beta, start, segments)
    o, end, inverse, u, erase, states = found
    rows, chunks, length = inputs.rows, inputs.chunks, inputs.length
    _, config = inputs.config("solve_chunks")
    kernels.solve_chunks[(rows, chunks)](
        k, v, log_decay, beta, inputs.segments, inverse, u, erase, *inputs.k_strides, *inputs.v_strides, length,
        **config,
    )  # fmt: skip
    tiles, config = inputs.config("walk_states")
    kernels.walk_states[(rows, tiles)](
        k, log_decay, inputs.segments, u, erase, end if start is None else start, states, end, *inputs.k_strides,
        length, STARTED=start is not None, **config,
    )  # fmt: skip
    tiles, config = inputs.config("read_states")
    kernels.read_states[(rows, chunks, tiles)](
        q, k, log_decay, inputs.segments, u, states, o, *inputs.q_strides, *inputs.k_strides, length,
        **inputs.shared, **config,
    )  # fmt: skip
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
    inputs = Inputs(q, k, v, log_decay, segments)
    found = _fake_backward(do, end_gradient, q, k, v, log_decay, beta, start, segments, inverse, u, erase, states)
    dq, dk, dv, d_log_decay, d_beta, d_start = found
    du, state_gradients = torch.empty_like(u), torch.empty_like(states)
    rows, chunks, length = inputs.rows, inputs.chunks, inputs.length
    tiles, config = inputs.config("gather_gradients")
    kernels.gather_gradients[(rows, chunks, tiles)](
        q, k, log_decay, inputs.segments, do, du, state_gradients, *inputs.q_strides, *inputs.k_strides, length,
        **inputs.shared, **config,
    )  # fmt: skip
    tiles, config = inputs.config("walk_gradients")
    kernels.walk_gradients[(rows, tiles)](
        k, log_decay, inputs.segments, erase, du, state_gradients, d_start if end_gradient is None else end_gradient,
        d_start, *inputs.k_strides, length, STARTED=start is not None, ENDED=end_gradient is not None, **config,
    )  # fmt: skip
    _, config = inputs.config("chunk_gradients")
    kernels.chunk_gradients[(rows, chunks)](
        q, k, v, log_decay, beta, inputs.segments, inverse, u, states, do, du, state_gradients,
        dq, dk, dv, d_log_decay, d_beta, *inputs.q_strides, *inputs.k_strides, *inputs.v_strides, length,
        **inputs.shared, **config,
    )  # fmt: skip
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
