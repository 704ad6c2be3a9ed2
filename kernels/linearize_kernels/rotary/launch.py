"""The Triton kernel of triton.py as two operations of torch, forward and backward. Shape legend in __init__.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.bound import Bound, forms, plan_for
from linearize_kernels.configs import launch
from linearize_kernels.gated_linear_attention import unit
from linearize_kernels.operations import differentiate, operation, power
from linearize_kernels.rotary import triton as kernels


def _bind(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Bound:
    batch, length, heads, width = q.shape
    rotated = cos.shape[-1]
    chosen = launch("rotate_heads", q.dtype, power(width), "rotary")
    tiles = -(-length // chosen.chunk)
    turns = [stride if x.shape[0] > 1 else 0 for x in (cos, sin) for stride in x.stride()[:1]]
    numbers = (*q.stride()[:3], *k.stride()[:3], turns[0], cos.stride(1), turns[1], sin.stride(1), length, tiles)
    constants = {
        "H": heads, "G": k.shape[2], "width": width, "rotated": rotated, "P": power(rotated // 2), "K": power(width),
        "C": chosen.chunk, "BACK": back, "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip
    return Bound(kernels.rotate_heads, (batch * tiles, heads + k.shape[2]), numbers, constants, q.device)


def _run(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype, back: bool
) -> tuple[Tensor, Tensor]:
    found = _new_outputs(q, k, cos, sin, scale, dtype)
    key = ("rotary", back, dtype, q.device, *forms(q, k, cos, sin))
    plan_for(key, lambda: _bind(q, k, cos, sin, back))((q, k, cos, sin, *found), scale)
    return found


def _new_outputs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    form = torch.contiguous_format
    return torch.empty_like(q, dtype=dtype, memory_format=form), torch.empty_like(k, dtype=dtype, memory_format=form)


@operation("rotary", _new_outputs)
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotated q, times `scale`, and rotated k. All tensors have unit stride in the last dimension."""
    return _run(q, k, cos, sin, scale, dtype, False)


@operation("rotary_backward", _new_outputs)
def rotate_back(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from those of the results."""
    return _run(dq, dk, cos, sin, scale, dtype, True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.dtype, ctx.scale = inputs[0].dtype, inputs[4]


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    return *rotate_back(unit(dq), unit(dk), *ctx.saved_tensors, ctx.scale, ctx.dtype), None, None, None, None


differentiate("rotary", _differentiate, _save)
