"""The walk of triton.py in another order, where the states of both signs of a map do not fit the registers: running
states go through memory, one of a block of M tokens, and every chunk of outputs is a program of its own.

`block_states` walks the keys of a split and writes the state before each block, as it grew since the split's start.
`split_states` adds up the splits. `block_outputs` adds the two, and the block's own keys up to each query. Features are
made twice, from q and k in registers, and never go through memory. Decays are none or one per head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.gated_linear_attention.triton import (
    FORGOTTEN,
    add_keys,
    as_tile,
    as_vector,
    load_gates,
    map_features,
    ones_row,
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
def block_states(k, v, gate, mask, segments, key_weight, key_bias, states, norms, decays, sums, carry,
                 k_batch, k_token, k_head, v_batch, v_token, v_head, delay, skip, length, blocks_a_split, blocks,
                 H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                 width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                 K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
                 MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                 BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Before each block, [B * H, blocks]: states [2, values, features], norms [2, features] and the log of what is left
    of the state at the split's start. What a split adds, [B * H, N, 2, values + 1, features], and its log. Grid
    (B * H, N, 2): each sign of the map is walked by itself.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = (row % H).to(tl.int32)
    split = tl.program_id(1)
    sign = tl.program_id(2)
    k += b * k_batch + (h // (H // KH)).to(tl.int64) * k_head
    v += b * v_batch + (h // (H // VH)).to(tl.int64) * v_head
    gate += b * length * GH + h // (H // GH)
    mask += b * length
    segments += b * length
    weight = load_matrix(key_weight + h * width * features, features, 1, width, features, K, F).to(v.dtype.element_ty)
    bias = tl.zeros((F,), tl.float32)
    if BIAS:
        bias = load_vector(key_bias + h * features, features, F)
    if sign == 1:
        weight = -weight
        bias = -bias
    signs: tl.constexpr = 1 if MAP == "softmax" else 2  # that this sign's features depend on
    s = tl.zeros((V, F), tl.float32)
    z = as_tile(tl.zeros((F,), tl.float32), F)
    log_carry = tl.zeros((1,), tl.float32)
    first_chunk = split * blocks_a_split * (M // C)
    end_chunk = tl.minimum(first_chunk + blocks_a_split * (M // C), blocks * (M // C))
    before = document(segments, first_chunk * C - 1, length, PACKED)
    for chunk in range(first_chunk, end_chunk):
        first = chunk * C
        k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
        v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
        since, total, _half = load_gates(gate, first, GH, length, features, C, F, GATE)
        real = key_flags(mask, first, delay + skip, length, C, MASKED)
        own = documents(segments, first, length, C, PACKED)
        last = document(segments, first + C - 1, length, PACKED)
        if first % M == 0:
            place = row * blocks + first // M
            store_matrix(states + (place * 2 + sign) * values * features, s, features, 1, values, features, V, F)
            store_vector(norms + (place * 2 + sign) * features, as_vector(z, True), features, F)
            if sign == 0:
                tl.store(decays + place + tl.arange(0, 1), log_carry)
        kp, _kn, _u = map_features(k_tile, weight, bias, real, features, MAP, False, F, signs, PRECISION)
        s, _s, z, _z, log_carry = add_keys(
            s, s, z, z, log_carry, own, before, last, kp, kp, v_tile, since, total, C, PACKED, GATE, 1, True, PRECISION
        )
        before = last
    place = row * tl.num_programs(1) + split
    whole: tl.constexpr = (values + 1) * features
    store_sums(sums + (place * 2 + sign) * whole, s, s, z, z, 0, features, values, F, V, 1, True)
    if sign == 0:
        tl.store(carry + place + tl.arange(0, 1), log_carry)


@triton.jit
def split_states(sums, carry, start_s, start_z, starts, start_norms, end_s, end_z, splits,
                 features: tl.constexpr, values: tl.constexpr, F: tl.constexpr, STARTED: tl.constexpr, ENDED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The states before each split, [B * H, N]: starts [2, values, features] and start_norms [2, features]; and
    the state after the last. Grid (B * H, 2, tiles of ROWS of a state's values + 1 rows, the last its normaliser).
    """
    head = tl.program_id(0).to(tl.int64)
    sign = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    f = tl.arange(0, F)
    value = (row < values)[:, None] & (f < features)[None, :]
    norm = (row == values)[:, None] & (f < features)[None, :]
    place = row[:, None] * features + f[None, :]
    turned = (sign * features + f)[None, :] * values + row[:, None]
    normed = (sign * features + f)[None, :] + 0 * row[:, None]
    running = tl.zeros((ROWS, F), tl.float32)
    if STARTED:
        running += tl.load(start_s + head * 2 * features * values + turned, mask=value, other=0.0)
        running += tl.load(start_z + head * 2 * features + normed, mask=norm, other=0.0)
    block: tl.constexpr = (values + 1) * features
    for split in range(0, splits):
        at = (head * splits + split) * 2 + sign
        kept = running.to(starts.dtype.element_ty)
        tl.store(starts + at * values * features + place, kept, mask=value)
        tl.store(start_norms + at * features + f[None, :] + 0 * row[:, None], running, mask=norm)
        keep = tl.exp(tl.load(carry + head * splits + split))
        running = running * keep + tl.load(sums + at * block + place, mask=value | norm, other=0.0)
    if ENDED:
        tl.store(end_s + head * 2 * features * values + turned, running, mask=value)
        tl.store(end_z + head * 2 * features + normed, running, mask=norm)


@triton.jit
def earlier_state(states, norms, starts, start_norms, place, start, keep, features: tl.constexpr, values: tl.constexpr,
                  F: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr):  # fmt: skip
    """The state before a block, [V, F] in the dtype of `states`, and its normaliser as `ones_row`. KEPT: nothing decays."""
    s = load_matrix(states + place * values * features, features, 1, values, features, V, F)
    at_start = load_matrix(starts + start * values * features, features, 1, values, features, V, F)
    z = load_vector(norms + place * features, features, F)
    z_at_start = load_vector(start_norms + start * features, features, F)
    if KEPT:
        s += at_start
        z += z_at_start
    else:
        s = (at_start.to(tl.float32) * keep + s.to(tl.float32)).to(s.dtype)
        z += z_at_start * keep
    return s, ones_row(z, F, s.dtype)


@triton.jit
def block_outputs(q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias, other, other_den,
                  states, norms, decays, starts, start_norms, y, scale, epsilon,
                  q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, delay, skip, length,
                  blocks_a_split, blocks, splits,
                  H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                  width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                  K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
                  RUN: tl.constexpr, AHEAD: tl.constexpr, MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                  BIAS: tl.constexpr, NORMALISED: tl.constexpr, OTHER: tl.constexpr, SCALED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """y and scale as `walk_forward` writes them, of one chunk; grid (chunks, B * H)."""
    row = tl.program_id(1).to(tl.int64)
    b = row // H
    h = (row % H).to(tl.int32)
    q += b * q_batch + h.to(tl.int64) * q_head
    k += b * k_batch + (h // (H // KH)).to(tl.int64) * k_head
    v += b * v_batch + (h // (H // VH)).to(tl.int64) * v_head
    gate += b * length * GH + h // (H // GH)
    mask += b * length
    segments += b * length
    line = b * length * H + h
    dtype = v.dtype.element_ty
    matrix = h * width * features
    q_weight = load_matrix(query_weight + matrix, features, 1, width, features, K, F).to(dtype)
    k_weight = load_matrix(key_weight + matrix, features, 1, width, features, K, F).to(dtype)
    q_bias = tl.zeros((F,), tl.float32)
    k_bias = q_bias
    if BIAS:
        q_bias = load_vector(query_bias + h * features, features, F)
        k_bias = load_vector(key_bias + h * features, features, F)
    if RUN == 1:
        chunk = tl.program_id(0)
        chunk_outputs(q, k, v, gate, mask, segments, q_weight, k_weight, q_bias, k_bias, other, other_den, states, norms, decays, starts, start_norms, y, scale, epsilon, row, line, chunk, q_token, k_token, v_token, delay, skip, length, blocks_a_split, blocks, splits, H, GH, width, features, values, K, F, V, C, M, AHEAD, MAP, GATE, MASKED, PACKED, NORMALISED, OTHER, SCALED, PRECISION)  # fmt: skip
    else:
        first_chunk = tl.program_id(0) * RUN
        for chunk in range(first_chunk, tl.minimum(first_chunk + RUN, tl.cdiv(length, C))):
            chunk_outputs(q, k, v, gate, mask, segments, q_weight, k_weight, q_bias, k_bias, other, other_den, states, norms, decays, starts, start_norms, y, scale, epsilon, row, line, chunk, q_token, k_token, v_token, delay, skip, length, blocks_a_split, blocks, splits, H, GH, width, features, values, K, F, V, C, M, AHEAD, MAP, GATE, MASKED, PACKED, NORMALISED, OTHER, SCALED, PRECISION)  # fmt: skip


@triton.jit
def chunk_outputs(q, k, v, gate, mask, segments, q_weight, k_weight, q_bias, k_bias, other, other_den, states, norms, decays, starts, start_norms, y, scale, epsilon, row, line, chunk, q_token, k_token, v_token, delay, skip, length, blocks_a_split, blocks, splits, H: tl.constexpr, GH: tl.constexpr, width: tl.constexpr, features: tl.constexpr, values: tl.constexpr, K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, M: tl.constexpr, AHEAD: tl.constexpr, MAP: tl.constexpr, GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, NORMALISED: tl.constexpr, OTHER: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    dtype = v.dtype.element_ty
    first = chunk * C
    block = first // M
    q_tile = load_rows(q, first, q_token, length, width, C, K)
    place = row * blocks + block
    start = row * splits + block // blocks_a_split
    keep = tl.exp(tl.load(decays + place))
    kept: tl.constexpr = GATE == "none" and not PACKED
    if AHEAD > 1 and C == M:
        k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
        v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
    if AHEAD > 2:
        sp, zp = earlier_state(
            states, norms, starts, start_norms, place * 2, start * 2, keep, features, values, F, V, kept
        )
    inside = first + tl.arange(0, C) < length
    qp, qn, _u = map_features(q_tile, q_weight, q_bias, inside, features, MAP, True, F, 2, PRECISION)
    own = documents(segments, first, length, C, PACKED)
    since, _total, _half = load_gates(gate, first, GH, length, features, C, F, GATE)
    since = tl.sum(since, 1)
    if GATE == "head" and C < M:
        since += tl.sum(tl.maximum(load_column(gate, block * M, GH, first, M), FORGOTTEN), 0)

    num = tl.zeros((C, V), tl.float32)
    den = tl.zeros((C, 16), tl.float32)  # its columns add up to the denominator
    past = 0.0
    if AHEAD > 3:
        sn, zn = earlier_state(
            states, norms, starts, start_norms, place * 2 + 1, start * 2 + 1, keep, features, values, F, V, kept
        )
    if C == M:
        if AHEAD <= 1:
            k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
            v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
        num, den, past = attend(
            num, den, qp, qn, own, since, k_tile, v_tile, gate, mask, segments, k_weight, k_bias, first, first, past,
            k_token, v_token, delay, skip, length, GH, width, features, values, K, F, V, C, MAP, GATE, MASKED, PACKED,
            PRECISION,
        )  # fmt: skip
    else:
        for keys in range(block * (M // C), chunk + 1):
            k_tile = load_rows(k, keys * C - delay, k_token, length, width, C, K)
            v_tile = load_rows(v, keys * C - delay, v_token, length, values, C, V)
            num, den, past = attend(
                num, den, qp, qn, own, since, k_tile, v_tile, gate, mask, segments, k_weight, k_bias, first, keys * C, past,
                k_token, v_token, delay, skip, length, GH, width, features, values, K, F, V, C, MAP, GATE, MASKED,
                PACKED, PRECISION,
            )  # fmt: skip
    if GATE != "none":
        read = tl.exp(since)[:, None]
        qp = (qp * read).to(dtype)
        qn = (qn * read).to(dtype)
    if PACKED:
        goes_on = (own == document(segments, block * M - 1, length, PACKED))[:, None]
        qp = tl.where(goes_on, qp, 0.0).to(dtype)
        qn = tl.where(goes_on, qn, 0.0).to(dtype)
    if AHEAD <= 2:
        sp, zp = earlier_state(
            states, norms, starts, start_norms, place * 2, start * 2, keep, features, values, F, V, kept
        )
    den = tl.dot(qp, tl.trans(zp), den, input_precision=PRECISION)
    num = tl.dot(qp, tl.trans(sp), num, input_precision=PRECISION)
    if AHEAD <= 3:
        sn, zn = earlier_state(
            states, norms, starts, start_norms, place * 2 + 1, start * 2 + 1, keep, features, values, F, V, kept
        )
    den = tl.dot(qn, tl.trans(zn), den, input_precision=PRECISION)
    num = tl.dot(qn, tl.trans(sn), num, input_precision=PRECISION)
    den = tl.sum(den, 1)
    if OTHER:
        beside = load_column(other_den + line, first, H, length, C)
        num += (
            load_rows(other + line * values, first, H * values, length, values, C, V).to(tl.float32) * beside[:, None]
        )
        den += beside
    if NORMALISED:
        den += epsilon
        den = 1.0 / tl.where(den == 0, 1.0, den)
        num *= den[:, None]
    store_rows(y + line * values, num, first, H * values, length, values, C, V)
    if SCALED:
        store_column(scale + line, den, first, H, length, C)


@triton.jit
def attend(num, den, qp, qn, own, since, k_tile, v_tile, gate, mask, segments, weight, bias, first, keys, past, k_token, v_token,
           delay, skip, length, GH: tl.constexpr, width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
           K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, GATE: tl.constexpr,
           MASKED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Numerator and denominator of the queries from token `first` on, with the keys from token `keys` on; `past`, the
    log decay from the block's start, is moved behind these keys.
    """
    real = key_flags(mask, keys, delay + skip, length, C, MASKED)
    kp, kn, _u = map_features(k_tile, weight, bias, real, features, MAP, False, F, 2, PRECISION)
    score = tl.dot(qp, tl.trans(kp), input_precision=PRECISION)
    score = tl.dot(qn, tl.trans(kn), score, input_precision=PRECISION)
    seen = (first + tl.arange(0, C))[:, None] >= (keys + tl.arange(0, C))[None, :]
    if PACKED:
        seen = seen & (own[:, None] == documents(segments, keys, length, C, PACKED)[None, :])
    if GATE == "head":
        key_since, total, _half = load_gates(gate, keys, GH, length, features, C, F, GATE)
        log = since[:, None] - (past + tl.sum(key_since, 1))[None, :]
        score = score * tl.exp(tl.minimum(log, 0.0))
        past += tl.sum(total, 0)
    rounded = (score * tl.where(seen, 1.0, 0.0)).to(v_tile.dtype)  # as the numerator reads it
    one = tl.where(tl.arange(0, 16)[None, :] == 0, 1.0, tl.zeros((C, 16), tl.float32)).to(v_tile.dtype)
    den = tl.dot(rounded, one, den, input_precision=PRECISION)
    num = tl.dot(rounded, v_tile, num, input_precision=PRECISION)
    return num, den, past
