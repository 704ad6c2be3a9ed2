"""One decoding step of a window, its sinks and meta logits, and of the linear branch beside it, in one Triton launch.

The token's query and key are rotated as they are read, the window's softmax is summed up block by block, and the tails
are written one row further while they pass. The key that leaves the window, or the token's own, is mapped and enters
the linear branch, which is read as in ../hedgehog_attention/triton_step.py, under one denominator or its own. A program
has one query head and TILE of its values; of the query heads that share a key head, the first writes its tails.

Legend in __init__.py and ../tiles.py; C rows of a block, N sinks and M meta logits as padded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize_kernels.bound import Bound, forms, given, plan_for
from linearize_kernels.configs import launch
from linearize_kernels.hedgehog_attention.triton_step import (
    FORGOTTEN,
    load_turned,
    map_row,
    step_both_signs,
    tile_of,
)
from linearize_kernels.operations import operation, power
from linearize_kernels.tiles import NOTHING
from linearize_kernels.windowed_linear_attention.triton import LOG2_E, safe

SMALLEST = tl.constexpr(1e-30)

Optional = Tensor | None


@triton.jit
def attend(query, keys, values, seen, peak, total, sums):
    """Keys [C, K] and values [C, TILE] more, under a running maximum."""
    score = tl.where(seen, tl.sum(query[None, :] * keys, 1), NOTHING)
    new = tl.maximum(peak, tl.max(score, 0))
    weight = tl.exp2((score - safe(new)) * LOG2_E)
    kept = tl.exp2((peak - safe(new)) * LOG2_E)
    return new, total * kept + tl.sum(weight, 0), sums * kept + tl.sum(weight[:, None] * values, 0)


@triton.jit
def pass_on(old, new, row, moved, latest, channel, stride, window, width: tl.constexpr, read, written):
    """Rows of a tail as they are after this token, in fp32; the last is `latest` if the tail has `moved`."""
    source = row + moved
    at = channel[None, :]
    real = (channel < width)[None, :]
    tile = tl.load(old + source[:, None] * stride + at, mask=real & ((source < window) & read)[:, None], other=0.0)
    tile = tl.where((source == window)[:, None] & (moved > 0), latest[None, :], tile.to(tl.float32))
    tl.store(
        new + row[:, None] * stride + at, tile.to(new.dtype.element_ty), mask=real & (written & (row < window))[:, None]
    )
    return tile


@triton.jit
def keep_sinks(old, new, number, position, latest, channel, stride, sinks: tl.constexpr, width: tl.constexpr, written):
    """Sinks as they were, in fp32; the token itself is written where it is one."""
    at = number[:, None] * stride + channel[None, :]
    real = (number < sinks)[:, None] & (channel < width)[None, :]
    tile = tl.load(old + at, mask=real, other=0.0).to(tl.float32)
    after = tl.where((number == position)[:, None], latest[None, :], tile)
    tl.store(new + at, after.to(new.dtype.element_ty), mask=real & written)
    return tile


@triton.jit
def window_step(q, k, v, cos, sin, mask, seen, tail_k, tail_v, sink_k, sink_v, far_k, meta, query_weight, key_weight,
                query_bias, key_bias, gate, near_weight, far_weight, s, z, y, den, new_seen, new_tail_k, new_tail_v,
                new_sink_k, new_sink_v, new_far_k, new_s, new_z, scale,
                q_batch, q_head, k_batch, k_head, v_batch, v_head, cos_batch, sin_batch, mask_batch, gate_batch,
                gate_head, window,
                H: tl.constexpr, G: tl.constexpr, width: tl.constexpr, values: tl.constexpr, features: tl.constexpr,
                rotated: tl.constexpr, sinks: tl.constexpr, metas: tl.constexpr, K: tl.constexpr, F: tl.constexpr,
                TILE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr,
                MASKED: tl.constexpr, GATED: tl.constexpr, NEAR_WEIGHTED: tl.constexpr,
                FAR_WEIGHTED: tl.constexpr, QUERY_BIAS: tl.constexpr,
                KEY_BIAS: tl.constexpr, NEAR_TURNED: tl.constexpr, FAR_TURNED: tl.constexpr, LEFT: tl.constexpr,
                FAR_TAIL: tl.constexpr, SEPARATE: tl.constexpr):  # fmt: skip
    """Grid (B * H, tiles of V). Old and new state are different memory."""
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = row % H
    g = h // (H // G)
    share = tl.program_id(1)
    leads = h % (H // G) == 0
    channel = tl.arange(0, K)
    column = share * TILE + tl.arange(0, TILE)
    always = tl.full((), 1, tl.int1)
    real = always
    if MASKED:
        real = tl.load(mask + b * mask_batch) != 0
    before = tl.load(seen + b)
    moved = real.to(tl.int32)
    if (h == 0) & (share == 0):
        tl.store(new_seen + b, before + moved)
    position = tl.where(real, before, -1)  # padding sees nothing
    q += b * q_batch + h * q_head
    k += b * k_batch + g * k_head
    cos += b * cos_batch
    sin += b * sin_batch
    dtype = new_tail_k.dtype.element_ty
    query = load_turned(q, cos, sin, channel, width, rotated, NEAR_TURNED) * scale
    key = (
        load_turned(k, cos, sin, channel, width, rotated, NEAR_TURNED).to(dtype).to(tl.float32)
    )  # as later steps see it
    value = tl.load(v + b * v_batch + g * v_head + column, mask=column < values, other=0.0).to(tl.float32)

    peak = tl.full((), NOTHING, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    if metas > 0:
        number = tl.arange(0, M)
        logit = tl.load(meta + h * metas + number, mask=number < metas, other=NOTHING).to(tl.float32)
        peak = tl.max(logit, 0)
        total = tl.sum(tl.exp2((logit - peak) * LOG2_E), 0)
    sums = tl.zeros((TILE,), tl.float32)
    first_k = (b * window * G + g) * width
    first_v = (b * window * G + g) * values
    latest_far = key
    if FAR_TAIL:
        latest_far = load_turned(k, cos, sin, channel, width, rotated, FAR_TURNED)
    writes_far = leads & (share == tl.num_programs(1) - 1)
    for first in range(0, window, C):
        place = first + tl.arange(0, C)
        k_tile = pass_on(tail_k + first_k, new_tail_k + first_k, place, moved, key, channel, G * width, window, width,
                         always, leads & (share == 0))  # fmt: skip
        v_tile = pass_on(tail_v + first_v, new_tail_v + first_v, place, moved, value, column, G * values, window,
                         values, always, leads)  # fmt: skip
        if FAR_TAIL:
            pass_on(far_k + first_k, new_far_k + first_k, place, moved, latest_far, channel, G * width, window, width,
                    writes_far, writes_far)  # fmt: skip
        back = window - 1 - place
        peak, total, sums = attend(query, k_tile, v_tile, (back >= 0) & (back <= position), peak, total, sums)
    if sinks > 0:
        number = tl.arange(0, N)
        sink = b * sinks * G + g
        k_tile = keep_sinks(sink_k + sink * width, new_sink_k + sink * width, number, position, key, channel,
                            G * width, sinks, width, leads & (share == 0))  # fmt: skip
        v_tile = keep_sinks(sink_v + sink * values, new_sink_v + sink * values, number, position, value, column,
                            G * values, sinks, values, leads)  # fmt: skip
        visible = (number < sinks) & (position - number >= window)
        peak, total, sums = attend(query, k_tile, v_tile, visible, peak, total, sums)
    answer = sums / tl.where(total == 0, 1.0, total)
    if share == 0:
        tl.store(den + row, total)

    if MAP != "none":
        weights = h * width * features
        if LEFT:
            brings = position >= window + sinks
            if FAR_TAIL:
                left = far_k + first_k
            else:
                left = tail_k + first_k
            kp, kn = map_row(left, cos, sin, key_weight + weights, key_bias + h * features, brings, width, rotated,
                             features, K, F, MAP, False, KEY_BIAS, False)  # fmt: skip
            value = tl.load(tail_v + first_v + column, mask=column < values, other=0.0).to(tl.float32)
        else:
            kp, kn = map_row(k, cos, sin, key_weight + weights, key_bias + h * features, real, width, rotated,
                             features, K, F, MAP, False, KEY_BIAS, FAR_TURNED)  # fmt: skip
        qp, qn = map_row(q, cos, sin, query_weight + weights, query_bias + h * features, always, width, rotated,
                         features, K, F, MAP, True, QUERY_BIAS, FAR_TURNED)  # fmt: skip
        keep = 1.0
        if GATED:
            logit = tl.load(gate + b * gate_batch + h * gate_head).to(tl.float32)
            log = tl.minimum(logit, 0.0) - tl.log(1 + tl.exp(-tl.abs(logit)))  # of the sigmoid
            keep = tl.where(real, tl.exp(tl.maximum(log, FORGOTTEN)), 1.0)
        num, far_den = step_both_signs(
            qp, qn, kp, kn, keep, value, column, s, z, new_s, new_z, row, share, features, values, F
        )
        near = 1.0
        far = 1.0
        if NEAR_WEIGHTED:
            near = tl.load(near_weight + h).to(tl.float32)
        if FAR_WEIGHTED:
            far = tl.load(far_weight + h).to(tl.float32)
        if SEPARATE:
            answer = near * answer + far * num / tl.where(far_den == 0, 1.0, far_den)
        else:
            beside = total * (near / tl.maximum(far, SMALLEST))
            far_den += beside
            answer = (num + answer * beside) / tl.where(far_den == 0, 1.0, far_den)
    tl.store(y + row * values + column, answer.to(y.dtype.element_ty), mask=column < values)


def _empty(
    q: Tensor, k: Tensor, v: Tensor, cos: Optional, sin: Optional, mask: Optional, seen: Tensor, tail_k: Tensor,
    tail_v: Tensor, sink_k: Tensor, sink_v: Tensor, far_k: Tensor, meta: Optional, query_weight: Optional,
    key_weight: Optional, query_bias: Optional, key_bias: Optional, gate: Optional, near_weight: Optional,
    far_weight: Optional, s: Optional, z: Optional, feature_map: str, scale: float, near_turned: bool,
    far_turned: bool, left: bool, separate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(x: Optional, dtype: torch.dtype) -> Tensor:
        return torch.empty((0,) if x is None else x.shape, dtype=dtype, device=v.device)

    y = torch.empty((*q.shape[:3], v.shape[-1]), dtype=v.dtype, device=v.device)
    den = torch.empty(q.shape[:3], dtype=torch.float32, device=v.device)
    tails = [like(x, v.dtype) for x in (tail_k, tail_v, sink_k, sink_v, far_k)]
    return y, den, torch.empty_like(seen), *tails, like(s, torch.float32), like(z, torch.float32)  # type: ignore[return-value]


@operation("window_step", _empty)
def window_step_op(
    q: Tensor, k: Tensor, v: Tensor, cos: Optional, sin: Optional, mask: Optional, seen: Tensor, tail_k: Tensor,
    tail_v: Tensor, sink_k: Tensor, sink_v: Tensor, far_k: Tensor, meta: Optional, query_weight: Optional,
    key_weight: Optional, query_bias: Optional, key_bias: Optional, gate: Optional, near_weight: Optional,
    far_weight: Optional, s: Optional, z: Optional, feature_map: str, scale: float, near_turned: bool,
    far_turned: bool, left: bool, separate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, 1, H, V] in the dtype of v, the window's denominator [B, 1, H], and the new state: tokens seen, tails,
    sinks, the other branch's tail, and its sums (empty without such a branch). The old state stays as it is.

    q, k, v, cos and sin have unit stride in the last dimension; maps, meta, weights and state are contiguous.
    """
    found = _empty(
        q, k, v, cos, sin, mask, seen, tail_k, tail_v, sink_k, sink_v, far_k, meta, query_weight, key_weight,
        query_bias, key_bias, gate, near_weight, far_weight, s, z, feature_map, scale, near_turned, far_turned, left,
        separate,
    )  # fmt: skip

    def bind() -> Bound:
        batch, _, heads, width = q.shape
        values, rows = v.shape[-1], batch * heads
        features = 0 if query_weight is None else query_weight.shape[-1]
        tile, sinks, metas = tile_of(rows, values), sink_k.shape[1], 0 if meta is None else meta.shape[1]
        chosen = launch("window_step", v.dtype, max(power(width), power(values), power(max(1, features))), feature_map)
        constants: dict[str, Any] = {
            "H": heads, "G": k.shape[2], "width": width, "values": values, "features": features,
            "rotated": 0 if cos is None else cos.shape[-1], "sinks": sinks, "metas": metas, "K": power(width),
            "F": power(max(1, features)), "TILE": tile, "C": chosen.chunk,
            "N": triton.next_power_of_2(max(1, sinks)), "M": triton.next_power_of_2(max(1, metas)),
            "MAP": "none" if query_weight is None else feature_map, "MASKED": mask is not None,
            "GATED": gate is not None, "NEAR_WEIGHTED": near_weight is not None,
            "FAR_WEIGHTED": far_weight is not None, "QUERY_BIAS": query_bias is not None,
            "KEY_BIAS": key_bias is not None, "NEAR_TURNED": near_turned, "FAR_TURNED": far_turned, "LEFT": left,
            "FAR_TAIL": far_k.shape[1] > 0, "SEPARATE": separate, "num_warps": chosen.warps,
        }  # fmt: skip
        strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))]
        turns = [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in (cos, sin)]
        gates = (0, 0) if gate is None else (gate.stride(0), gate.stride(2))
        numbers = (*strides, *turns, 0 if mask is None else mask.stride(0), *gates, tail_k.shape[1])
        return Bound(window_step, (rows, -(-values // tile)), numbers, constants, v.device)

    maps = (query_weight, key_weight, query_bias, key_bias)
    flags = (feature_map, near_turned, far_turned, left, separate)
    tensors = (q, k, v, cos, sin, mask, tail_k, sink_k, far_k, meta, *maps, gate, near_weight, far_weight)
    state = (seen, tail_k, tail_v, sink_k, sink_v, far_k)
    missing = given(q, meta, *maps, gate, near_weight, far_weight, s, z)
    arguments = (q, k, v, *given(q, cos, sin, mask), *state, *missing, *found)
    plan_for(("window step", v.device, *flags, *forms(*tensors)), bind)(arguments, scale)
    return found
