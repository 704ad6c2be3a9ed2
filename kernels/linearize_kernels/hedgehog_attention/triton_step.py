"""One decoding step of Hedgehog attention in one Triton launch: maps of q and k, one pass over the state.

    p, n = phi(k W_k + b_k),  S' = e S + [p ; n] v^T,  z' = e z + [p ; n],  y = (a S' + o d) / (a . z' + d)

with a = phi(q W_q + b_q); o and d are another branch, which may be missing. Every query head has a state of its own, as
it has a map of its own, and reads the key and value of its group where they are. Legend in __init__.py; a program holds
TILE values of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.gated_linear_attention.triton_maps import signed_features
from linearize_kernels.operations import operation, power

FORGOTTEN = tl.constexpr(-100.0)
PROGRAMS = 264
"""Heads, of all rows, below which a head's values are shared out in small tiles: each program maps q and k anew."""

Optional = Tensor | None


@triton.jit
def load_turned(x, cos, sin, channel, width: tl.constexpr, rotated: tl.constexpr, TURNED: tl.constexpr):
    """These channels of a head in fp32, rotated where TURNED; 0 beyond its width."""
    found = tl.load(x + channel, mask=channel < width, other=0.0).to(tl.float32)
    if TURNED:
        half: tl.constexpr = rotated // 2
        inside = channel < rotated
        partner = tl.where(channel < half, channel + half, channel - half)
        other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
        other = tl.where(channel < half, -other, other)
        c = tl.load(cos + channel, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sin + channel, mask=inside, other=0.0).to(tl.float32)
        found = found * c + other * s
    return found


@triton.jit
def map_row(x, cos, sin, weight, bias, real, width: tl.constexpr, rotated: tl.constexpr, features: tl.constexpr,
            K: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, QUERY: tl.constexpr, BIAS: tl.constexpr,
            TURNED: tl.constexpr):  # fmt: skip
    """Features [F] of one head and of its negative, in fp32. Rows of W are summed in one tile, and added up at the end:
    each sum over a tile waits for all warps.
    """
    ROWS: tl.constexpr = 16
    f = tl.arange(0, F)
    sums = tl.zeros((ROWS, F), tl.float32)
    for block in tl.static_range(K // ROWS):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < width)[:, None] & (f < features)[None, :]
        tile = tl.load(weight + row[:, None] * features + f[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += load_turned(x, cos, sin, row, width, rotated, TURNED)[:, None] * tile
    u = tl.sum(sums, 0)
    if BIAS:
        u += tl.load(bias + f, mask=f < features, other=0.0).to(tl.float32)
    brings = tl.full((1,), 1, tl.int1) & real
    p, n = signed_features(u[None, :], brings, features, MAP, QUERY, F, 2)
    return tl.reshape(p, (F,)), tl.reshape(n, (F,))


@triton.jit
def step_sign(query, key, keep, value, column, s, z, new_s, new_z, share, features: tl.constexpr,
              values: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """One sign's features: new state and normaliser, and what the query finds in them, [TILE] and a number."""
    f = tl.arange(0, F)
    norm = tl.load(z + f, mask=f < features, other=0.0) * keep + key
    if share == 0:
        tl.store(new_z + f, norm, mask=f < features)
    at = f[:, None] * values + column[None, :]
    inside = (f < features)[:, None] & (column < values)[None, :]
    state = tl.load(s + at, mask=inside, other=0.0) * keep + key[:, None] * value[None, :]
    tl.store(new_s + at, state, mask=inside)
    return tl.sum(query[:, None] * state, 0), tl.sum(query * norm, 0)


@triton.jit
def step_both_signs(qp, qn, kp, kn, keep, value, column, s, z, new_s, new_z, row, share, features: tl.constexpr,
                    values: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Numerator [TILE] and denominator of head `row`, after its new state was written."""
    s += row * 2 * features * values
    new_s += row * 2 * features * values
    z += row * 2 * features
    new_z += row * 2 * features
    num, den = step_sign(qp, kp, keep, value, column, s, z, new_s, new_z, share, features, values, F)
    past: tl.constexpr = features * values
    num_n, den_n = step_sign(
        qn, kn, keep, value, column, s + past, z + features, new_s + past, new_z + features, share, features, values, F
    )
    return num + num_n, den + den_n


@triton.jit
def hedgehog_step(q, k, v, cos, sin, gate, mask, query_weight, key_weight, query_bias, key_bias, other, other_den, s,
                  z, new_s, new_z, y, q_batch, q_head, k_batch, k_head, v_batch, v_head, cos_batch, sin_batch,
                  gate_batch, gate_head, mask_batch,
                  H: tl.constexpr, G: tl.constexpr, width: tl.constexpr, rotated: tl.constexpr,
                  features: tl.constexpr, values: tl.constexpr,
                  K: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, MAP: tl.constexpr, GATED: tl.constexpr,
                  MASKED: tl.constexpr, QUERY_BIAS: tl.constexpr, KEY_BIAS: tl.constexpr, TURNED: tl.constexpr,
                  OTHER: tl.constexpr):  # fmt: skip
    """Grid (B * H, tiles of V). Old and new state are different memory: programs of a head read the same normaliser."""
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = row % H
    g = h // (H // G)
    share = tl.program_id(1)
    column = share * TILE + tl.arange(0, TILE)
    always = tl.full((), 1, tl.int1)
    real = always
    if MASKED:
        real = tl.load(mask + b * mask_batch) != 0
    keep = 1.0
    if GATED:
        keep = tl.exp(tl.maximum(tl.load(gate + b * gate_batch + h * gate_head).to(tl.float32), FORGOTTEN))
    key = k + b * k_batch + g * k_head
    weights = h * width * features
    cos += b * cos_batch
    sin += b * sin_batch
    kp, kn = map_row(key, cos, sin, key_weight + weights, key_bias + h * features, real,
                     width, rotated, features, K, F, MAP, False, KEY_BIAS, TURNED)  # fmt: skip
    query = q + b * q_batch + h * q_head
    qp, qn = map_row(query, cos, sin, query_weight + weights, query_bias + h * features, always,
                     width, rotated, features, K, F, MAP, True, QUERY_BIAS, TURNED)  # fmt: skip
    value = tl.load(v + b * v_batch + g * v_head + column, mask=column < values, other=0.0).to(tl.float32)
    num, den = step_both_signs(qp, qn, kp, kn, keep, value, column, s, z, new_s, new_z, row, share, features, values, F)
    if OTHER:
        beside = tl.load(other_den + row)
        num += tl.load(other + row * values + column, mask=column < values, other=0.0).to(tl.float32) * beside
        den += beside
    answer = num / tl.where(den == 0, 1.0, den)
    tl.store(y + row * values + column, answer.to(y.dtype.element_ty), mask=column < values)


def tile_of(rows: int, values: int) -> int:
    """Values of a program: few where there are too few rows of heads to fill the device."""
    return min(power(values), 32 if rows < PROGRAMS else 64)


def warps_of(features: int, tile: int) -> int:
    """A state's tile takes 32 registers of a thread, or less."""
    return 4 if power(features) * tile <= 4096 else 8


def _empty(
    q: Tensor, k: Tensor, v: Tensor, cos: Optional, sin: Optional, gate: Optional, mask: Optional,
    query_weight: Tensor, key_weight: Tensor, query_bias: Optional, key_bias: Optional, other: Optional,
    other_den: Optional, s: Tensor, z: Tensor, feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty((*q.shape[:3], v.shape[-1]), dtype=v.dtype, device=v.device)
    return y, torch.empty_like(s), torch.empty_like(z)


@operation("hedgehog_step", _empty)
def hedgehog_step_op(
    q: Tensor, k: Tensor, v: Tensor, cos: Optional, sin: Optional, gate: Optional, mask: Optional,
    query_weight: Tensor, key_weight: Tensor, query_bias: Optional, key_bias: Optional, other: Optional,
    other_den: Optional, s: Tensor, z: Tensor, feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, 1, H, V] in the dtype of v, and new sums; the old ones stay as they are.

    q, k, v, cos and sin have unit stride in the last dimension; maps, other and states are contiguous; states and
    other_den are fp32.
    """
    found = _empty(
        q, k, v, cos, sin, gate, mask, query_weight, key_weight, query_bias, key_bias, other, other_den, s, z,
        feature_map,
    )  # fmt: skip

    def bind() -> Bound:
        batch, _, heads, width = q.shape
        features, values, rows = query_weight.shape[-1], v.shape[-1], batch * heads
        tile = tile_of(rows, values)
        constants: dict[str, Any] = {
            "H": heads, "G": k.shape[2], "width": width, "rotated": 0 if cos is None else cos.shape[-1],
            "features": features, "values": values, "K": power(width),
            "F": power(features), "TILE": tile, "MAP": feature_map, "GATED": gate is not None,
            "MASKED": mask is not None, "QUERY_BIAS": query_bias is not None, "KEY_BIAS": key_bias is not None,
            "TURNED": cos is not None, "OTHER": other is not None, "num_warps": warps_of(features, tile),
        }  # fmt: skip
        strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))]
        gates = (0, 0) if gate is None else (gate.stride(0), gate.stride(2))
        turns = [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in (cos, sin)]
        numbers = (*strides, *turns, *gates, 0 if mask is None else mask.stride(0))
        return Bound(hedgehog_step, (rows, -(-values // tile)), numbers, constants, v.device)

    maps = (query_weight, key_weight, query_bias, key_bias)
    key = ("hedgehog step", v.device, feature_map, *forms(q, k, v, cos, sin, gate, mask, *maps, other))
    missing = given(q, cos, sin, gate, mask, *maps, other, other_den)
    plan_for(key, bind)((q, k, v, *missing, s, z, *found[1:], found[0]))
    return found
