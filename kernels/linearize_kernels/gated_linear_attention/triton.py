"""Causal linear attention in Triton, forward and backward: feature maps, decay and normaliser in one walk over q, k, v.

Here is the forward walk. The backward walks are in triton_query_gradients.py and triton_key_gradients.py, and what all
of them share in triton_maps.py, triton_decays.py and triton_states.py.

Nothing of the size [T, features] goes through memory, unless the caller brings features. The sequence is cut into N
splits. `add_up_splits` sums what each split adds to the running state; `walk_forward` walks the chunks of a split with
the state in registers, after adding up what the splits before it left. Backwards there are two such walks:
`walk_query_gradients` with the same states, and `walk_key_gradients` from the end, with the states that
`add_up_splits_backwards` summed.

With a_t, b_t the features of query and key, e_ij the decay after j up to i, and the scores s_ij = e_ij a_i . b_j:

    y_i = (sum_j<=i s_ij v_j + o_i d_i) / D_i,  D_i = sum_j<=i s_ij + d_i     (o, d: another branch, may be missing)
    ds_ij = (dy_i . v_j - dy_i . y_i) / D_i = w_i dy_i . v_j + m_i
    da_i = sum_j ds_ij e_ij b_j,  db_j = sum_i ds_ij e_ij a_i,  dv_j = sum_i s_ij w_i dy_i

Where numerator and denominator are returned apart, w = 1 and m is the denominator's gradient. The gradient of the log
decay of token t is the sum over i >= t of a_i . da_i - b_i . db_i, feature by feature where the decays are.

Legend in ../tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.gated_linear_attention.triton_decays import feature_decays, keep_pairs, load_gates, same_half
from linearize_kernels.gated_linear_attention.triton_maps import map_features
from linearize_kernels.gated_linear_attention.triton_states import (
    add_keys,
    as_tile,
    collect,
    store_state,
    store_sums,
    times,
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
    store_rows,
)


@triton.jit
def add_up_splits(k, v, gate, mask, segments, key_weight, key_bias, sums, carry,
                  k_batch, k_token, k_head, v_batch, v_token, v_head, delay, skip, length,
                  chunks_a_split, H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                  width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                  K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                  MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                  BIAS: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What each split adds to the running state; grid (B * H, N - 1, value tiles): nobody asks for
    the last split's.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    split = tl.program_id(1)
    column = tl.program_id(2) * V
    tile: tl.constexpr = V if values > V else values
    k += b * k_batch + (h // (H // KH)).to(tl.int64) * k_head
    v += b * v_batch + (h // (H // VH)).to(tl.int64) * v_head + column
    gate_head = h // (H // GH)
    gate_width: tl.constexpr = features if GATE == "feature" else 1
    gate += b * length * (GH * gate_width) + gate_head * gate_width
    mask += b * length
    segments += b * length
    weight = k
    bias = tl.zeros((F,), tl.float32)
    if MAP != "none":
        weight = load_matrix(key_weight + h * width * features, features, 1, width, features, K, F).to(
            v.dtype.element_ty
        )
        if BIAS:
            bias = load_vector(key_bias + h * features, features, F)

    sp = tl.zeros((V, F), tl.float32)
    sn = sp
    zp = tl.zeros((F,), tl.float32)
    if TILED:
        zp = as_tile(zp, F)
    zn = zp
    log_carry = tl.zeros((E,), tl.float32)
    first_chunk = split * chunks_a_split
    before = document(segments, first_chunk * C - 1, length, PACKED)
    for chunk in range(first_chunk, first_chunk + chunks_a_split):
        first = chunk * C
        k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
        v_tile = load_rows(v, first - delay, v_token, length, tile, C, V)
        since, total, _half = load_gates(gate, first, GH * gate_width, length, features, C, F, GATE)
        real = key_flags(mask, first, delay + skip, length, C, MASKED)
        own = documents(segments, first, length, C, PACKED)
        last = document(segments, first + C - 1, length, PACKED)
        kp, kn, _u = map_features(k_tile, weight, bias, real, features, MAP, False, F, SIGNS, PRECISION)
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
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split
    block: tl.constexpr = SIGNS * (values + 1) * features
    store_sums(sums + place * block, sp, sn, zp, zn, column, features, values, F, V, SIGNS, TILED)
    tl.store(carry + place * E + tl.arange(0, E), log_carry)


@triton.jit
def walk_forward(q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias, other, other_den,
                 start_s, start_z, sums, carry, y, scale, end_s, end_z, epsilon,
                 q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, delay, skip, length,
                 chunks_a_split,
                 H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                 width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                 K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                 MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                 BIAS: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr, STARTED: tl.constexpr,
                 NORMALISED: tl.constexpr, OTHER: tl.constexpr, SCALED: tl.constexpr,
                 ENDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y [B, T, H, V] and scale = 1 / D [B, T, H] where NORMALISED, the numerator and D otherwise, and the state after
    the last token; grid (B * H, N, value tiles). Without the scale where not
    SCALED, and without the state where not ENDED.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    split = tl.program_id(1)
    column = tl.program_id(2) * V
    tile: tl.constexpr = V if values > V else values
    q += b * q_batch + h.to(tl.int64) * q_head
    k += b * k_batch + (h // (H // KH)).to(tl.int64) * k_head
    v += b * v_batch + (h // (H // VH)).to(tl.int64) * v_head + column
    gate_head = h // (H // GH)
    gate_width: tl.constexpr = features if GATE == "feature" else 1
    gate += b * length * (GH * gate_width) + gate_head * gate_width
    mask += b * length
    segments += b * length
    row = b * length * H + h
    y += row * values + column
    scale += row
    other += row * values + column
    other_den += row
    dtype = v.dtype.element_ty
    q_weight = q
    k_weight = k
    q_bias = tl.zeros((F,), tl.float32)
    k_bias = q_bias
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
        0, 1, split, column, features, values, F, V, E, SIGNS, STARTED, TILED,
    )  # fmt: skip
    first_chunk = split * chunks_a_split
    before = document(segments, first_chunk * C - 1, length, PACKED)
    log_carry = tl.zeros((E,), tl.float32)
    for chunk in range(first_chunk, tl.minimum(first_chunk + chunks_a_split, tl.cdiv(length, C))):
        first = chunk * C
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
        v_tile = load_rows(v, first - delay, v_token, length, tile, C, V)
        since, total, half = load_gates(gate, first, GH * gate_width, length, features, C, F, GATE)
        real = key_flags(mask, first, delay + skip, length, C, MASKED)
        own = documents(segments, first, length, C, PACKED)
        last = document(segments, first + C - 1, length, PACKED)
        inside = first + tl.arange(0, C) < length
        kp, kn, _u = map_features(k_tile, k_weight, k_bias, real, features, MAP, False, F, SIGNS, PRECISION)
        qp, qn, _u = map_features(q_tile, q_weight, q_bias, inside, features, MAP, True, F, SIGNS, PRECISION)

        if GATE == "feature":
            near_q, near_k, far_q, far_k = feature_decays(since, total, half, C)
            near = tl.dot((qp * near_q).to(dtype), tl.trans((kp * near_k).to(dtype)), input_precision=PRECISION)
            far = tl.dot((qp * far_q).to(dtype), tl.trans((kp * far_k).to(dtype)), input_precision=PRECISION)
            score = tl.where(same_half(C), near, far)
        else:
            score = tl.dot(qp, tl.trans(kp), input_precision=PRECISION)
            if SIGNS == 2:
                score = tl.dot(qn, tl.trans(kn), score, input_precision=PRECISION)
        score = keep_pairs(score, own, since, C, PACKED, GATE, False)
        if GATE != "none":
            read = tl.exp(since)
            qp = (qp * read).to(dtype)
            qn = (qn * read).to(dtype)
        if PACKED:
            qp = tl.where((own == before)[:, None], qp, 0.0).to(dtype)
            qn = tl.where((own == before)[:, None], qn, 0.0).to(dtype)
        rounded = score.to(dtype)  # as the numerator reads it: what rounding adds or takes, it does to both
        den = tl.sum(rounded.to(tl.float32), 1) + times(qp, zp, TILED, PRECISION)
        num = tl.dot(rounded, v_tile, input_precision=PRECISION)
        num = tl.dot(qp, tl.trans(sp.to(dtype)), num, input_precision=PRECISION)
        if SIGNS == 2:
            den += times(qn, zn, TILED, PRECISION)
            num = tl.dot(qn, tl.trans(sn.to(dtype)), num, input_precision=PRECISION)
        if OTHER:
            weight = load_column(other_den, first, H, length, C)
            num += load_rows(other, first, H * values, length, tile, C, V).to(tl.float32) * weight[:, None]
            den += weight
        if NORMALISED:
            den += epsilon
            den = 1.0 / tl.where(den == 0, 1.0, den)
            num *= den[:, None]
        store_rows(y, num, first, H * values, length, tile, C, V)
        if SCALED and column == 0:
            store_column(scale, den, first, H, length, C)
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
    if ENDED and split == others:
        store_state(
            end_s + head * state * values,
            end_z + head * state,
            sp,
            sn,
            zp,
            zn,
            column,
            features,
            values,
            F,
            V,
            SIGNS,
            TILED,
        )
