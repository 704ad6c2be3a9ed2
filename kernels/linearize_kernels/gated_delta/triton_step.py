"""One decoding step of the gated delta rule in one Triton launch: the state is read once and written once.

    u = beta (v - e S^T k),  S' = e S + k u^T,  o_p = S'^T q_p   for the P query heads that share the state

Columns of the state do not meet: a program holds K x TILE of them at a time. Legend in __init__.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize_kernels.bound import Bound, forms, plan_for
from linearize_kernels.operations import operation, power

FORGOTTEN = tl.constexpr(-100.0)
TILE = 32
PROGRAMS = 264
"""Programs below which a state is shared out over several."""


@triton.jit
def step_kernel(q, k, v, log_decay, beta, state, new_state, o, q_batch, q_head, k_batch, k_head, v_batch, v_head,
                J: tl.constexpr, P: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr,
                TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Grid (B * J, shares of V), TILES tiles each; new_state may be state."""
    row = tl.program_id(0).to(tl.int64)
    b = row // J
    j = row % J
    at = tl.arange(0, K)
    inside = at < width
    key = tl.load(k + b * k_batch + j * k_head + at, mask=inside, other=0.0).to(tl.float32)
    keep = tl.exp(tl.maximum(tl.load(log_decay + row).to(tl.float32), FORGOTTEN))
    strength = tl.load(beta + row).to(tl.float32)
    for tile in tl.static_range(TILES):
        column = (tl.program_id(1) * TILES + tile) * TILE + tl.arange(0, TILE)
        real = column < values
        value = tl.load(v + b * v_batch + j * v_head + column, mask=real, other=0.0).to(tl.float32)
        place = row * width * values + at[:, None] * values + column[None, :]
        both = inside[:, None] & real[None, :]
        s = tl.load(state + place, mask=both, other=0.0) * keep
        s += key[:, None] * (strength * (value - tl.sum(s * key[:, None], 0)))[None, :]
        tl.store(new_state + place, s, mask=both)
        for p in tl.static_range(P):
            query = tl.load(q + b * q_batch + (j * P + p) * q_head + at, mask=inside, other=0.0).to(tl.float32)
            answer = tl.sum(query[:, None] * s, 0)
            tl.store(o + (row * P + p) * values + column, answer.to(o.dtype.element_ty), mask=real)


def _empty(
    q_B1HK: Tensor, k_B1JK: Tensor, v_B1JV: Tensor, log_decay_B1J: Tensor, beta_B1J: Tensor, state_BJKV: Tensor
) -> tuple[Tensor, Tensor]:
    o_B1HV = q_B1HK.new_empty(*q_B1HK.shape[:3], v_B1JV.shape[-1], dtype=v_B1JV.dtype)
    return o_B1HV, torch.empty_like(state_BJKV)


@operation("delta_step", _empty)
def step(
    q_B1HK: Tensor, k_B1JK: Tensor, v_B1JV: Tensor, log_decay_B1J: Tensor, beta_B1J: Tensor, state_BJKV: Tensor
) -> tuple[Tensor, Tensor]:
    """o [B, 1, H, V] and the new state; the old one stays as it is. Gates and state are contiguous."""
    o_B1HV, new_BJKV = _empty(q_B1HK, k_B1JK, v_B1JV, log_decay_B1J, beta_B1J, state_BJKV)
    _launch(q_B1HK, k_B1JK, v_B1JV, log_decay_B1J, beta_B1J, state_BJKV, new_BJKV, o_B1HV)
    return o_B1HV, new_BJKV


def step_(
    q_B1HK: Tensor, k_B1JK: Tensor, v_B1JV: Tensor, log_decay_B1J: Tensor, beta_B1J: Tensor, state_BJKV: Tensor,
    o_B1HV: Tensor,
) -> None:  # fmt: skip
    """The step in place: the state is updated, o is written, nothing is allocated. For loops that hold their own
    state, and for CUDA graphs.
    """
    _launch(q_B1HK, k_B1JK, v_B1JV, log_decay_B1J, beta_B1J, state_BJKV, state_BJKV, o_B1HV)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, new_state: Tensor, o: Tensor
) -> None:
    def bind() -> Bound:
        batch, _, heads, width = q.shape
        state_heads, values = v.shape[2:]
        tiles = -(-values // TILE)
        shares = 1 if batch * state_heads >= PROGRAMS else tiles
        constants = {
            "J": state_heads, "P": heads // state_heads, "width": width, "values": values, "K": power(width),
            "TILE": TILE, "TILES": tiles // shares, "num_warps": 4,
        }  # fmt: skip
        strides = (q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2))
        return Bound(step_kernel, (batch * state_heads, shares), strides, constants, v.device)

    kinds = (log_decay.dtype, beta.dtype, state.dtype, o.dtype)
    plan_for(("delta_step", v.device, kinds, *forms(q, k, v)), bind)((q, k, v, log_decay, beta, state, new_state, o))
