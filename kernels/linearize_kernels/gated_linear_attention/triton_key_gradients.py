"""Linear attention backwards, from the end to the start: gradients of keys, values, decays and the state before.

triton.py tells how. Legend in ../tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.gated_linear_attention.triton_decays import (
    MIN_LOG_GATE,
    feature_decays,
    keep_pairs,
    load_gates,
    same_half,
)
from linearize_kernels.gated_linear_attention.triton_maps import map_features, map_gradient
from linearize_kernels.gated_linear_attention.triton_query_gradients import load_scale
from linearize_kernels.gated_linear_attention.triton_states import (
    add_queries,
    as_tile,
    collect,
    store_state,
    store_sums,
)
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
def add_up_splits_backwards(q, dy, gate, segments, query_weight, query_bias, scale, row_term, sums, carry,
                            q_batch, q_token, q_head, length, chunks_a_split,
                            H: tl.constexpr, GH: tl.constexpr,
                            width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                            K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                            MAP: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
                            SIGNS: tl.constexpr, TILED: tl.constexpr, NORMALISED: tl.constexpr,
                            PRECISION: tl.constexpr):  # fmt: skip
    """What each split adds to the gradient of the state before it; grid (B * H, N - 1): nobody asks for the first's."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    split = tl.program_id(1) + 1
    q += b * q_batch + h.to(tl.int64) * q_head
    gate_head = h // (H // GH)
    gate_width: tl.constexpr = features if GATE == "feature" else 1
    gate += b * length * (GH * gate_width) + gate_head * gate_width
    segments += b * length
    row = b * length * H + h
    dy += row * values
    scale += row
    row_term += row
    dtype = q.dtype.element_ty
    weight = q
    bias = tl.zeros((F,), tl.float32)
    if MAP != "none":
        weight = load_matrix(query_weight + h * width * features, features, 1, width, features, K, F).to(dtype)
        if BIAS:
            bias = load_vector(query_bias + h * features, features, F)
    rp = tl.zeros((V, F), tl.float32)
    rn = rp
    xp = tl.zeros((F,), tl.float32)
    if TILED:
        xp = as_tile(xp, F)
    xn = xp
    log_carry = tl.zeros((E,), tl.float32)
    first_chunk = split * chunks_a_split
    chunks = tl.minimum(chunks_a_split, tl.cdiv(length, C) - first_chunk)
    after = document(segments, (first_chunk + chunks) * C, length, PACKED)
    for index in range(0, chunks):
        first = (first_chunk + chunks - 1 - index) * C
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        dy_tile = load_rows(dy, first, H * values, length, values, C, V)
        since, total, _half = load_gates(gate, first, GH * gate_width, length, features, C, F, GATE)
        own = documents(segments, first, length, C, PACKED)
        begins = document(segments, first, length, PACKED)
        inside = first + tl.arange(0, C) < length
        inverse = load_scale(scale, first, H, length, C, NORMALISED)
        term = load_column(row_term, first, H, length, C)
        qp, qn, _u = map_features(q_tile, weight, bias, inside, features, MAP, True, F, SIGNS, PRECISION)
        rp, rn, xp, xn, log_carry = add_queries(
            rp, rn, xp, xn, log_carry, own, after, begins, qp, qn, dy_tile, inverse, term, since, total,
            C, PACKED, GATE, SIGNS, TILED, PRECISION,
        )  # fmt: skip
        after = begins
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split - 1
    block: tl.constexpr = SIGNS * (values + 1) * features
    store_sums(sums + place * block, rp, rn, xp, xn, 0, features, values, F, V, SIGNS, TILED)
    tl.store(carry + place * E + tl.arange(0, E), log_carry)


@triton.jit
def walk_key_gradients(q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias,
                       start_s, start_z, end_s, end_z, end_s_gradient, end_z_gradient, sums, carry, back_sums,
                       back_carry, dy, scale, row_term, gate_term,
                       key_gradient, value_gradient, weight_gradient, bias_gradient, gate_gradient,
                       start_s_gradient, start_z_gradient,
                       q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, delay, skip,
                       length, chunks_a_split,
                       H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                       width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                       K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                       MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                       BIAS: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr, STARTED: tl.constexpr,
                       ENDED: tl.constexpr, NORMALISED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk [B, T, H, K], dv [B, T, H, V] and the log decay's gradient, per query head, each split's share of the map's
    gradients, and those of the state before the first token; from the end to the start; grid (B * H, N).
    """
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
    key_gradient += row * width
    value_gradient += row * values
    gate_term += row * gate_width
    gate_gradient += row * gate_width
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
    at_s = head * state * values
    at_z = head * state
    rp, rn, xp, xn = collect(
        back_sums + head * others * block, back_carry + head * others * E, end_s_gradient + at_s, end_z_gradient + at_z,
        others - 1, -1, others - split, 0, features, values, F, V, E, SIGNS, ENDED, TILED,
    )  # fmt: skip
    first_chunk = split * chunks_a_split
    chunks = tl.minimum(chunks_a_split, tl.cdiv(length, C) - first_chunk)
    after = document(segments, (first_chunk + chunks) * C, length, PACKED)

    # the gates' gradient behind the split: what the state there is worth
    gate_sum = tl.zeros((E,), tl.float32)
    if GATE != "none":
        if split < others:
            sp, sn, zp, zn = collect(
                sums + head * others * block, carry + head * others * E, start_s + at_s, start_z + at_z,
                0, 1, split + 1, 0, features, values, F, V, E, SIGNS, STARTED, TILED,
            )  # fmt: skip
        else:
            sp, sn, zp, zn = collect(
                sums, carry, end_s + at_s, end_z + at_z, 0, 1, 0, 0, features, values, F, V, E, SIGNS, ENDED, TILED
            )
        worth = tl.sum(sp * rp, 0) + zp * xp
        if SIGNS == 2:
            worth += tl.sum(sn * rn, 0) + zn * xn
        if PACKED:
            ends = document(segments, (first_chunk + chunks) * C - 1, length, PACKED)
            worth = tl.where(ends == after, worth, 0.0)
        if GATE == "feature":
            gate_sum += worth
        else:
            gate_sum += tl.sum(worth, 0)

    log_carry = tl.zeros((E,), tl.float32)
    for index in range(0, chunks):
        first = (first_chunk + chunks - 1 - index) * C
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
        v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
        dy_tile = load_rows(dy, first, H * values, length, values, C, V)
        inverse = load_scale(scale, first, H, length, C, NORMALISED)
        term = load_column(row_term, first, H, length, C)
        since, total, half = load_gates(gate, first, GH * gate_width, length, features, C, F, GATE)
        real = key_flags(mask, first, delay + skip, length, C, MASKED)
        own = documents(segments, first, length, C, PACKED)
        begins = document(segments, first, length, PACKED)
        inside = first + tl.arange(0, C) < length
        kp, kn, u = map_features(k_tile, k_weight, k_bias, real, features, MAP, False, F, SIGNS, PRECISION)
        qp, qn, _u = map_features(q_tile, q_weight, q_bias, inside, features, MAP, True, F, SIGNS, PRECISION)

        d_score = tl.dot(v_tile, tl.trans(dy_tile), input_precision=PRECISION) * inverse[None, :] + term[None, :]
        d_score = keep_pairs(d_score, own, since, C, PACKED, GATE, True)
        write = tl.full((C, 1), 1.0, tl.float32)
        if GATE != "none":
            write = tl.exp(total[None, :] - since)
        if PACKED:
            write = tl.where((own == after)[:, None], write, 0.0)
        behind = tl.dot(v_tile, rp.to(dtype), input_precision=PRECISION) + xp[None, :]
        dp = behind * write
        dn = dp
        if SIGNS == 2:
            dn = (tl.dot(v_tile, rn.to(dtype), input_precision=PRECISION) + xn[None, :]) * write
        if GATE == "feature":
            near_q, near_k, far_q, far_k = feature_decays(since, total, half, C)
            near = tl.dot((kp * near_k).to(dtype), tl.trans((qp * near_q).to(dtype)), input_precision=PRECISION)
            far = tl.dot((kp * far_k).to(dtype), tl.trans((qp * far_q).to(dtype)), input_precision=PRECISION)
            score = tl.where(same_half(C), near, far)
            own_term = (kp * write).to(dtype) * behind
            d_near = tl.where(same_half(C), d_score, 0.0).to(dtype)
            d_near = tl.dot(d_near, (qp * near_q).to(dtype), input_precision=PRECISION)
            own_term += (kp * near_k).to(dtype) * d_near
            dp += near_k * d_near
            d_far = tl.dot(d_score.to(dtype), (qp * far_q).to(dtype), input_precision=PRECISION)
            own_term += (kp * far_k).to(dtype) * d_far
            dp += far_k * d_far
        else:
            score = tl.dot(kp, tl.trans(qp), input_precision=PRECISION)
            dp = tl.dot(d_score.to(dtype), qp, dp, input_precision=PRECISION)
            if SIGNS == 2:
                score = tl.dot(kn, tl.trans(qn), score, input_precision=PRECISION)
                dn = tl.dot(d_score.to(dtype), qn, dn, input_precision=PRECISION)
        score = keep_pairs(score, own, since, C, PACKED, GATE, True)
        d_value = tl.dot((score * inverse[None, :]).to(dtype), dy_tile, input_precision=PRECISION)
        d_value = tl.dot((kp * write).to(dtype), tl.trans(rp.to(dtype)), d_value, input_precision=PRECISION)
        if SIGNS == 2:
            d_value = tl.dot((kn * write).to(dtype), tl.trans(rn.to(dtype)), d_value, input_precision=PRECISION)
        store_rows(value_gradient, d_value, first - delay, H * values, length, values, C, V)
        if GATE == "feature":
            change = load_rows(gate_term, first, H * gate_width, length, features, C, F) - own_term
            d_gate = tl.cumsum(change, 0, reverse=True) + gate_sum[None, :]
            raw = load_rows(gate, first, GH * gate_width, length, features, C, F)
            d_gate = tl.where(raw > MIN_LOG_GATE, d_gate, 0.0)
            store_rows(gate_gradient, d_gate, first, H * gate_width, length, features, C, F)
            gate_sum += tl.sum(change, 0)
        if GATE == "head":
            change = load_column(gate_term, first, H, length, C) - tl.sum(kp * dp, 1)
            if SIGNS == 2:
                change -= tl.sum(kn * dn, 1)
            store_column(gate_gradient, tl.cumsum(change, 0, reverse=True) + gate_sum, first, H, length, C)
            gate_sum += tl.sum(change, 0)
        du = map_gradient(u, kp, kn, dp, dn, MAP, False, SIGNS)
        if MAP == "none":
            store_rows(key_gradient, tl.where(real[:, None], du, 0.0), first - delay, H * width, length, width, C, K)
        else:
            du = tl.where(real[:, None], du, 0.0)
            d_key = tl.dot(du.to(dtype), tl.trans(k_weight), input_precision=PRECISION)
            store_rows(key_gradient, d_key, first - delay, H * width, length, width, C, K)
            d_weight += tl.dot(tl.trans(k_tile), du.to(dtype), input_precision=PRECISION)
            if BIAS:
                d_bias += tl.sum(du, 0)
        rp, rn, xp, xn, log_carry = add_queries(
            rp, rn, xp, xn, log_carry, own, after, begins, qp, qn, dy_tile, inverse, term, since, total,
            C, PACKED, GATE, SIGNS, TILED, PRECISION,
        )  # fmt: skip
        after = begins
    if MAP != "none":
        place = head * tl.num_programs(1) + split
        store_matrix(weight_gradient + place * width * features, d_weight, features, 1, width, features, K, F)
        if BIAS:
            store_vector(bias_gradient + place * features, d_bias, features, F)
    if STARTED and split == 0:
        store_state(
            start_s_gradient + at_s,
            start_z_gradient + at_z,
            rp,
            rn,
            xp,
            xn,
            0,
            features,
            values,
            F,
            V,
            SIGNS,
            TILED,
        )
