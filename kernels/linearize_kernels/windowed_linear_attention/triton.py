"""Softmax over a sliding window, sink tokens and meta logits in Triton, forward and backward.

With s_ij = q_i . k_j over the keys that query i sees, m_i the largest of them and of the meta logits, and the sums over
keys and meta logits (whose values are 0):

    w_ij = exp(s_ij - m_i),  den_i = sum_j w_ij,  o_i = sum_j w_ij v_j / den_i
    ds_ij = w_ij / den_i (do_i . v_j - do_i . o_i + dden_i den_i) - [j is the largest] dden_i den_i

A query's key is named by how far back it lies, i - j; sink s by FAR + s, a meta logit by META. Legend in ../tiles.py;
M rows of keys, of which the first `past` lie before token 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.tiles import NOTHING, load_column, load_rows, places, store_column, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1 << 30)
META = tl.constexpr((1 << 30) - 1)


@triton.jit
def safe(top):
    """Something finite to subtract where nothing is seen."""
    return tl.where(top == NOTHING, 0.0, top)


@triton.jit
def window_forward(q, k, v, position, sink_k, sink_v, meta, o, den, top, largest,
                   q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                   sink_batch, sink_token, window, past, length,
                   H: tl.constexpr, G: tl.constexpr, width: tl.constexpr, values: tl.constexpr,
                   K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SINKS: tl.constexpr, METAS: tl.constexpr,
                   POSITIONED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """o [B, T, H, V], den, top and largest [B, T, H]; grid (chunks, B * H)."""
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first = tl.program_id(0) * C
    q += b * q_batch + h.to(tl.int64) * q_head
    k += b * k_batch + g.to(tl.int64) * k_head
    v += b * v_batch + g.to(tl.int64) * v_head
    sink_k += b * sink_batch * width + g * width
    sink_v += b * sink_batch * values + g * values
    row = b * length * H + h
    dtype = v.dtype.element_ty
    q_tile = load_rows(q, first, q_token, length, width, C, K)
    place = places(position + b * length, first, length, C, POSITIONED)
    token = first + tl.arange(0, C)

    peak = tl.full((C,), NOTHING, tl.float32)
    for number in tl.static_range(METAS):
        peak = tl.maximum(peak, tl.load(meta + h * METAS + number).to(tl.float32))
    total = tl.zeros((C,), tl.float32)
    for number in tl.static_range(METAS):
        total += tl.exp2((tl.load(meta + h * METAS + number).to(tl.float32) - peak) * LOG2_E)
    best = tl.full((C,), META, tl.int32)
    sums = tl.zeros((C, V), tl.float32)
    back = tl.cdiv(window - 1, C)
    for number in range(0, back + 1):
        key = first - (back - number) * C
        k_tile = load_rows(k, key + past, k_token, past + length, width, C, K)
        v_tile = load_rows(v, key + past, v_token, past + length, values, C, V)
        distance = token[:, None] - (key + tl.arange(0, C))[None, :]
        seen = (distance >= 0) & (distance < window) & (distance <= place[:, None])
        score = tl.where(seen, tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), NOTHING)
        highest = tl.max(score, 1)
        where = tl.min(tl.where(score == highest[:, None], distance, FAR), 1)
        best = tl.where(highest > peak, where, best)
        new = tl.maximum(peak, highest)
        weight = tl.exp2((score - safe(new)[:, None]) * LOG2_E)
        keep = tl.exp2((peak - safe(new)) * LOG2_E)
        total = total * keep + tl.sum(weight, 1)
        sums = tl.dot(weight.to(dtype), v_tile, sums * keep[:, None], input_precision=PRECISION)
        peak = new
    for number in range(SINKS):
        k_sink = load_rows(sink_k + number * G * width, first, sink_token * width, length, width, C, K).to(tl.float32)
        v_sink = load_rows(sink_v + number * G * values, first, sink_token * values, length, values, C, V)
        score = tl.where(place - number >= window, tl.sum(q_tile.to(tl.float32) * k_sink, 1), NOTHING)
        best = tl.where(score > peak, FAR + number, best)
        new = tl.maximum(peak, score)
        weight = tl.exp2((score - safe(new)) * LOG2_E)
        keep = tl.exp2((peak - safe(new)) * LOG2_E)
        total = total * keep + weight
        sums = sums * keep[:, None] + weight[:, None] * v_sink.to(tl.float32)
        peak = new
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    store_rows(o + row * values, sums * inverse[:, None], first, H * values, length, values, C, V)
    store_column(den + row, total, first, H, length, C)
    store_column(top + row, safe(peak), first, H, length, C)
    store_column(largest + row, best, first, H, length, C)


@triton.jit
def row_terms(den, d_den, top, largest, first, stride, length, C: tl.constexpr):
    """1 / den, dden den, top and largest of a chunk's queries."""
    total = load_column(den, first, stride, length, C)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    pull = load_column(d_den, first, stride, length, C) * total
    peak = load_column(top, first, stride, length, C)
    row = first + tl.arange(0, C)
    inside = (row >= 0) & (row < length)
    best = tl.load(largest + row.to(tl.int64) * stride, mask=inside, other=-1)
    return inverse, pull, peak, best


@triton.jit
def window_query_gradients(q, k, v, position, sink_k, sink_v, o, den, top, largest, do, d_den, term,
                           query_gradient, sink_k_gradient, sink_v_gradient,
                           q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                           sink_batch, sink_token, window, past, length,
                           H: tl.constexpr, G: tl.constexpr, width: tl.constexpr, values: tl.constexpr,
                           K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SINKS: tl.constexpr,
                           EACH: tl.constexpr, POSITIONED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq [B, T, H, K], term = dden den - do . o [B, T, H], and the sinks' gradients per query head: of each query
    [B, T, S, H, .] where EACH, of each chunk [B, N, S, H, .] otherwise; grid (N, B * H).
    """
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    first = tl.program_id(0) * C
    q += b * q_batch + h.to(tl.int64) * q_head
    k += b * k_batch + g.to(tl.int64) * k_head
    v += b * v_batch + g.to(tl.int64) * v_head
    sink_k += b * sink_batch * width + g * width
    sink_v += b * sink_batch * values + g * values
    row = b * length * H + h
    dtype = v.dtype.element_ty
    q_tile = load_rows(q, first, q_token, length, width, C, K)
    do_tile = load_rows(do + row * values, first, H * values, length, values, C, V)
    o_tile = load_rows(o + row * values, first, H * values, length, values, C, V)
    place = places(position + b * length, first, length, C, POSITIONED)
    token = first + tl.arange(0, C)
    inverse, pull, peak, best = row_terms(den + row, d_den + row, top + row, largest + row, first, H, length, C)
    shift = pull - tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    store_column(term + row, shift, first, H, length, C)

    dq = tl.zeros((C, K), tl.float32)
    back = tl.cdiv(window - 1, C)
    for number in range(0, back + 1):
        key = first - (back - number) * C
        k_tile = load_rows(k, key + past, k_token, past + length, width, C, K)
        v_tile = load_rows(v, key + past, v_token, past + length, values, C, V)
        distance = token[:, None] - (key + tl.arange(0, C))[None, :]
        seen = (distance >= 0) & (distance < window) & (distance <= place[:, None])
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weight = tl.where(seen, tl.exp2((score - peak[:, None]) * LOG2_E), 0.0) * inverse[:, None]
        d_score = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        d_score = weight * (d_score + shift[:, None]) - tl.where(distance == best[:, None], pull[:, None], 0.0)
        dq = tl.dot(d_score.to(dtype), k_tile, dq, input_precision=PRECISION)
    for number in range(SINKS):
        k_sink = load_rows(sink_k + number * G * width, first, sink_token * width, length, width, C, K).to(tl.float32)
        v_sink = load_rows(sink_v + number * G * values, first, sink_token * values, length, values, C, V)
        score = tl.sum(q_tile.to(tl.float32) * k_sink, 1)
        weight = tl.where(place - number >= window, tl.exp2((score - peak) * LOG2_E), 0.0) * inverse
        d_score = weight * (tl.sum(do_tile.to(tl.float32) * v_sink.to(tl.float32), 1) + shift)
        d_score -= tl.where(best == FAR + number, pull, 0.0)
        dq += d_score[:, None] * k_sink
        dk = d_score[:, None] * q_tile.to(tl.float32)
        dv = weight[:, None] * do_tile.to(tl.float32)
        entry = number * H + h
        if EACH:
            at = b * length * SINKS * H + entry
            store_rows(sink_k_gradient + at * width, dk, first, SINKS * H * width, length, width, C, K)
            store_rows(sink_v_gradient + at * values, dv, first, SINKS * H * values, length, values, C, V)
        else:
            at = (b * tl.num_programs(0) + tl.program_id(0)) * SINKS * H + entry
            column = tl.arange(0, K)
            tl.store(sink_k_gradient + at * width + column, tl.sum(dk, 0), mask=column < width)
            column = tl.arange(0, V)
            tl.store(sink_v_gradient + at * values + column, tl.sum(dv, 0), mask=column < values)
    store_rows(query_gradient + row * width, dq, first, H * width, length, width, C, K)


@triton.jit
def window_key_gradients(q, k, v, position, den, top, largest, do, d_den, term, key_gradient, value_gradient,
                         q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                         window, past, length,
                         H: tl.constexpr, G: tl.constexpr, width: tl.constexpr, values: tl.constexpr,
                         K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, POSITIONED: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """dk [B, M, G, K] and dv [B, M, G, V], summed over the query heads of a group; grid (chunks of M, B * G)."""
    b = (tl.program_id(1) // G).to(tl.int64)
    g = tl.program_id(1) % G
    key = tl.program_id(0) * C - past
    k += b * k_batch + g.to(tl.int64) * k_head
    v += b * v_batch + g.to(tl.int64) * v_head
    dtype = v.dtype.element_ty
    k_tile = load_rows(k, key + past, k_token, past + length, width, C, K)
    v_tile = load_rows(v, key + past, v_token, past + length, values, C, V)
    dk = tl.zeros((C, K), tl.float32)
    dv = tl.zeros((C, V), tl.float32)
    ahead = tl.cdiv(window - 1, C) + 1
    for number in range(0, (H // G) * ahead):
        h = g * (H // G) + number // ahead
        first = key + (number % ahead) * C
        row = b * length * H + h
        q_tile = load_rows(q + b * q_batch + h.to(tl.int64) * q_head, first, q_token, length, width, C, K)
        do_tile = load_rows(do + row * values, first, H * values, length, values, C, V)
        inverse, pull, peak, best = row_terms(den + row, d_den + row, top + row, largest + row, first, H, length, C)
        shift = load_column(term + row, first, H, length, C)
        place = places(position + b * length, first, length, C, POSITIONED)
        distance = (first + tl.arange(0, C))[None, :] - (key + tl.arange(0, C))[:, None]
        seen = (distance >= 0) & (distance < window) & (distance <= place[None, :])
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weight = tl.where(seen, tl.exp2((score - peak[None, :]) * LOG2_E), 0.0) * inverse[None, :]
        dv = tl.dot(weight.to(dtype), do_tile, dv, input_precision=PRECISION)
        d_score = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        d_score = weight * (d_score + shift[None, :]) - tl.where(distance == best[None, :], pull[None, :], 0.0)
        dk = tl.dot(d_score.to(dtype), q_tile, dk, input_precision=PRECISION)
    entry = b * (past + length) * G + g
    store_rows(key_gradient + entry * width, dk, key + past, G * width, past + length, width, C, K)
    store_rows(value_gradient + entry * values, dv, key + past, G * values, past + length, values, C, V)
