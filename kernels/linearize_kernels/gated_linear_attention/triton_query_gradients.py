"""Linear attention backwards, from the start to the end: gradients of the queries. triton.py tells how.

Also w and m of its formulas, which both backward walks read. Legend in ../tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.gated_linear_attention.triton_decays import feature_decays, keep_pairs, load_gates, same_half
from linearize_kernels.gated_linear_attention.triton_maps import map_features, map_gradient
from linearize_kernels.gated_linear_attention.triton_states import add_keys, collect
from linearize_kernels.tiles import (
    document,
    documents,
    key_flags,
    load_column,
    load_matrix,
    load_rows,
    load_vector,
    store_column,
    store_matrix,
    store_rows,
    store_vector,
)


@triton.jit
def output_gradients(dy, y, scale, other, other_den, row_term, other_gradient, other_den_gradient, rows,
                     values: tl.constexpr, V: tl.constexpr, C: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    """m_i = -dy_i . y_i / D_i of every row of [B * T * H, V], and the gradients of the other branch."""
    first = tl.program_id(0).to(tl.int64) * C
    dy_tile = load_rows(dy, first, values, rows, values, C, V).to(tl.float32)
    y_tile = load_rows(y, first, values, rows, values, C, V).to(tl.float32)
    inverse = load_column(scale, first, 1, rows, C)
    term = -tl.sum(dy_tile * y_tile, 1) * inverse
    store_column(row_term, term, first, 1, rows, C)
    if OTHER:
        other_tile = load_rows(other, first, values, rows, values, C, V).to(tl.float32)
        weight = load_column(other_den, first, 1, rows, C) * inverse
        store_rows(other_gradient, dy_tile * weight[:, None], first, values, rows, values, C, V)
        store_column(other_den_gradient, tl.sum(dy_tile * other_tile, 1) * inverse + term, first, 1, rows, C)


@triton.jit
def load_scale(scale, first, stride, length, C: tl.constexpr, NORMALISED: tl.constexpr):
    """w: 1 / D, or 1 where numerator and denominator are apart."""
    if NORMALISED:
        w = load_column(scale, first, stride, length, C)
    else:
        w = tl.full((C,), 1.0, tl.float32)
    return w


@triton.jit
def walk_query_gradients(q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias,
                         start_s, start_z, sums, carry, dy, scale, row_term,
                         query_gradient, weight_gradient, bias_gradient, gate_term,
                         q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, delay,
                         skip, length, chunks_a_split,
                         H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                         width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                         K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                         MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                         BIAS: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr, STARTED: tl.constexpr,
                         NORMALISED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq [B, T, H, K], each split's share of the map's gradients, a_t . da_t where there are gates; grid (B * H, N)."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    split = tl.program_id(1)
    q += b * q_batch + h.to(tl.int64) * q_head
    k += b * k_batch + (h // (H // KH)).to(tl.int64) * k_head
    v += b * v_batch + (h // (H // VH)).to(tl.int64) * v_head
    gate_head = h // (H // GH)
    gate_width: tl.constexpr = features if GATE == "feature" else 1
    gate += b * length * (GH * gate_width) + gate_head * gate_width
    mask += b * length
    segments += b * length
    row = b * length * H + h
    dy += row * values
    scale += row
    row_term += row
    query_gradient += row * width
    gate_term += row * gate_width
    dtype = v.dtype.element_ty
    q_weight = q
    k_weight = k
    q_bias = tl.zeros((F,), tl.float32)
    k_bias = q_bias
    d_weight = tl.zeros((K, F), tl.float32)
    d_bias = tl.zeros((F,), tl.float32)
    if MAP != "none":
        matrix = h * width * features
        q_weight = load_matrix(query_weight + matrix, features, 1, width, features, K, F).to(dtype)
        k_weight = load_matrix(key_weight + matrix, features, 1, width, features, K, F).to(dtype)
        if BIAS:
            q_bias = load_vector(query_bias + h * features, features, F)
            k_bias = load_vector(key_bias + h * features, features, F)

    head = tl.program_id(0).to(tl.int64)
    state: tl.constexpr = SIGNS * features
    block: tl.constexpr = SIGNS * (values + 1) * features
    others = tl.num_programs(1) - 1
    sp, sn, zp, zn = collect(
        sums + head * others * block, carry + head * others * E,
        start_s + head * state * values, start_z + head * state,
        0, 1, split, 0, features, values, F, V, E, SIGNS, STARTED, TILED,
    )  # fmt: skip
    first_chunk = split * chunks_a_split
    before = document(segments, first_chunk * C - 1, length, PACKED)
    log_carry = tl.zeros((E,), tl.float32)
    for chunk in range(first_chunk, tl.minimum(first_chunk + chunks_a_split, tl.cdiv(length, C))):
        first = chunk * C
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
        v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
        dy_tile = load_rows(dy, first, H * values, length, values, C, V)
        inverse = load_scale(scale, first, H, length, C, NORMALISED)
        term = load_column(row_term, first, H, length, C)
        since, total, half = load_gates(gate, first, GH * gate_width, length, features, C, F, GATE)
        real = key_flags(mask, first, delay + skip, length, C, MASKED)
        own = documents(segments, first, length, C, PACKED)
        last = document(segments, first + C - 1, length, PACKED)
        inside = first + tl.arange(0, C) < length
        kp, kn, _u = map_features(k_tile, k_weight, k_bias, real, features, MAP, False, F, SIGNS, PRECISION)
        qp, qn, u = map_features(q_tile, q_weight, q_bias, inside, features, MAP, True, F, SIGNS, PRECISION)

        d_score = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION) * inverse[:, None] + term[:, None]
        d_score = keep_pairs(d_score, own, since, C, PACKED, GATE, False)
        dp = tl.dot(dy_tile, sp.to(dtype), input_precision=PRECISION) * inverse[:, None] + term[:, None] * zp[None, :]
        dn = dp
        if SIGNS == 2:
            dn = tl.dot(dy_tile, sn.to(dtype), input_precision=PRECISION) * inverse[:, None]
            dn += term[:, None] * zn[None, :]
        if PACKED:
            dp = tl.where((own == before)[:, None], dp, 0.0)
            dn = tl.where((own == before)[:, None], dn, 0.0)
        if GATE == "feature":
            # the gate's gradient is a sum of differences: both sides read features as the scores were made of them
            near_q, near_k, far_q, far_k = feature_decays(since, total, half, C)
            read = tl.exp(since)
            own_term = (qp * read).to(dtype) * dp
            dp *= read
            near = tl.where(same_half(C), d_score, 0.0).to(dtype)
            near = tl.dot(near, (kp * near_k).to(dtype), input_precision=PRECISION)
            own_term += (qp * near_q).to(dtype) * near
            dp += near_q * near
            far = tl.dot(d_score.to(dtype), (kp * far_k).to(dtype), input_precision=PRECISION)
            own_term += (qp * far_q).to(dtype) * far
            dp += far_q * far
            store_rows(gate_term, own_term, first, H * gate_width, length, features, C, F)
        else:
            if GATE == "head":
                dp *= tl.exp(since)
                dn *= tl.exp(since)
            dp = tl.dot(d_score.to(dtype), kp, dp, input_precision=PRECISION)
            if SIGNS == 2:
                dn = tl.dot(d_score.to(dtype), kn, dn, input_precision=PRECISION)
        if GATE == "head":
            own_term = tl.sum(qp * dp, 1)
            if SIGNS == 2:
                own_term += tl.sum(qn * dn, 1)
            store_column(gate_term, own_term, first, H, length, C)
        du = map_gradient(u, qp, qn, dp, dn, MAP, True, SIGNS)
        if MAP == "none":
            store_rows(query_gradient, du, first, H * width, length, width, C, K)
        else:
            d_query = tl.dot(du.to(dtype), tl.trans(q_weight), input_precision=PRECISION)
            store_rows(query_gradient, d_query, first, H * width, length, width, C, K)
            d_weight += tl.dot(tl.trans(q_tile), du.to(dtype), input_precision=PRECISION)
            if BIAS:
                d_bias += tl.sum(du, 0)
        sp, sn, zp, zn, log_carry = add_keys(
            sp,
            sn,
            zp,
            zn,
            log_carry,
            own,
            before,
            last,
            kp,
            kn,
            v_tile,
            since,
            total,
            C,
            PACKED,
            GATE,
            SIGNS,
            TILED,
            PRECISION,
        )
        before = last
    if MAP != "none":
        place = head * tl.num_programs(1) + split
        store_matrix(weight_gradient + place * width * features, d_weight, features, 1, width, features, K, F)
        if BIAS:
            store_vector(bias_gradient + place * features, d_bias, features, F)
