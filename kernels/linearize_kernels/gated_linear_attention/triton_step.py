"""One decoding step of linear attention in one Triton launch: each state is read once and written once.

    S' = e S + b v^T,  z' = e z + b,  y_p = a_p S' / (a_p . z' + epsilon)   for the P query heads that share the state

A program holds a state of F x V in tiles of V. Legend in __init__.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize_kernels.bound import Bound, forms, plan_for
from linearize_kernels.operations import operation, power

MIN_LOG_GATE = tl.constexpr(-5.0)
FORGOTTEN = tl.constexpr(-100.0)
TILE = 32
PROGRAMS = 264
"""Programs below which a state is shared out over several."""

Optional = Tensor | None


@triton.jit
def step_kernel(q, k, v, gate, s, z, new_s, new_z, y, den, epsilon, q_batch, q_head, k_batch, k_head, v_batch, v_head,
                J: tl.constexpr, P: tl.constexpr, M: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                F: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GATE: tl.constexpr,
                NORMALISED: tl.constexpr):  # fmt: skip
    """Grid (B * J, shares of V), TILES tiles each. z and new_z are different memory, so that shares do not race."""
    row = tl.program_id(0).to(tl.int64)
    b = row // J
    j = row % J
    share = tl.program_id(1)
    f = tl.arange(0, F)
    inside = f < features
    key = tl.load(k + b * k_batch + j * k_head + f, mask=inside, other=0.0).to(tl.float32)
    if GATE == "feature":
        keep = tl.load(gate + row * features + f, mask=inside, other=0.0).to(tl.float32)
        keep = tl.exp(tl.maximum(keep, MIN_LOG_GATE))
    elif GATE == "head":
        keep = tl.exp(tl.maximum(tl.load(gate + row + f * 0).to(tl.float32), FORGOTTEN))
    else:
        keep = tl.full((F,), 1.0, tl.float32)
    norm = tl.load(z + row * features + f, mask=inside, other=0.0) * keep + key
    query = q + b * q_batch + j * P * q_head
    if share == 0:
        tl.store(new_z + row * features + f, norm, mask=inside)
        if not NORMALISED:
            for p in tl.static_range(P):
                one = tl.load(query + p * q_head + f, mask=inside, other=0.0).to(tl.float32)
                tl.store(den + row * P + p, tl.sum(one * norm, 0))
    for tile in tl.static_range(TILES):
        column = (share * TILES + tile) * TILE + tl.arange(0, TILE)
        real = column < values
        value = tl.load(v + b * v_batch + (j // M) * v_head + column, mask=real, other=0.0).to(tl.float32)
        at = row * features * values + f[:, None] * values + column[None, :]
        both = inside[:, None] & real[None, :]
        state = tl.load(s + at, mask=both, other=0.0) * keep[:, None] + key[:, None] * value[None, :]
        tl.store(new_s + at, state, mask=both)
        for p in tl.static_range(P):
            one = tl.load(query + p * q_head + f, mask=inside, other=0.0).to(tl.float32)
            answer = tl.sum(one[:, None] * state, 0)
            if NORMALISED:
                total = tl.sum(one * norm, 0) + epsilon
                answer = answer / tl.where(total == 0, 1.0, total)
            tl.store(y + (row * P + p) * values + column, answer.to(y.dtype.element_ty), mask=real)


def _empty(
    q_B1HF: Tensor, k_B1JF: Tensor, v_B1GV: Tensor, gate: Optional, s_BJFV: Tensor, z_BJF: Tensor,
    normalised: bool, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, heads, _ = q_B1HF.shape
    dtype = v_B1GV.dtype if normalised else torch.float32
    y = q_B1HF.new_empty(batch, 1, heads, v_B1GV.shape[-1], dtype=dtype)
    return y, q_B1HF.new_empty(batch, 1, heads, dtype=torch.float32), torch.empty_like(s_BJFV), torch.empty_like(z_BJF)


@operation("step", _empty)
def step(
    q_B1HF: Tensor, k_B1JF: Tensor, v_B1GV: Tensor, gate: Optional, s_BJFV: Tensor, z_BJF: Tensor,
    normalised: bool, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, 1, H, V], or the numerator, the denominator [B, 1, H], and the new sums; the old ones stay as they are."""
    found = _empty(q_B1HF, k_B1JF, v_B1GV, gate, s_BJFV, z_BJF, normalised, epsilon)
    _launch(q_B1HF, k_B1JF, v_B1GV, gate, s_BJFV, z_BJF, found[2], found[3], found[0], found[1], normalised, epsilon)
    return found


def step_(
    q_B1HF: Tensor, k_B1JF: Tensor, v_B1GV: Tensor, gate: Optional, s_BJFV: Tensor, z_BJF: Tensor, y_B1HV: Tensor,
    epsilon: float = 0.0,
) -> None:  # fmt: skip
    """The normalised step in place: s and z are updated, y is written. Nothing is allocated when B * J is at least
    PROGRAMS; below, a copy of z is. For loops that hold their own state, and for CUDA graphs.
    """
    rows = k_B1JF.shape[0] * k_B1JF.shape[2]
    old = z_BJF if rows >= PROGRAMS else z_BJF.clone()
    _launch(q_B1HF, k_B1JF, v_B1GV, gate, s_BJFV, old, s_BJFV, z_BJF, y_B1HV, y_B1HV, True, epsilon)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional, s: Tensor, z: Tensor, new_s: Tensor, new_z: Tensor, y: Tensor,
    den: Tensor, normalised: bool, epsilon: float,
) -> None:  # fmt: skip
    def bind() -> Bound:
        batch, _, heads, features = q.shape
        key_heads, values = k.shape[2], v.shape[-1]
        tiles = -(-values // TILE)
        shares = 1 if batch * key_heads >= PROGRAMS else tiles
        constants = {
            "J": key_heads, "P": heads // key_heads, "M": key_heads // v.shape[2], "features": features,
            "values": values, "F": power(features), "TILE": TILE, "TILES": tiles // shares,
            "GATE": "none" if gate is None else "head" if gate.ndim == 3 else "feature", "NORMALISED": normalised,
            "num_warps": 4,
        }  # fmt: skip
        strides = (q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2))
        return Bound(step_kernel, (batch * key_heads, shares), strides, constants, v.device)

    key = ("step", v.device, normalised, y.dtype, s.dtype, *forms(q, k, v, gate))
    plan_for(key, bind)((q, k, v, k if gate is None else gate, s, z, new_s, new_z, y, den), epsilon)
