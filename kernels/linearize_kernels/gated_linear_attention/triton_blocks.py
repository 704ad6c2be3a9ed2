"""The forward walk of triton.py in another order, for softmax maps whose states of both signs do not fit the registers:
running states go through memory, one for each block of C tokens, and the outputs of every block are a program's.

`block_states` walks the keys of a split, for each sign by itself, and writes the state before each block as it grew
since the split's start. `split_states` adds up the splits. `block_outputs` reads the sum of the two, and adds the
block's own keys up to each query. Keys are mapped twice, and features never go through memory. Decays are none or one
per head. States are counted in int64: they may have more than 2^31 numbers.

Where a product has a right operand of 16 columns, it is a [16, C] tile transposed: as a [C, 16] tile, in a layout of
its own, Triton 3.6 reads it past the end of shared memory. Values of 16 columns would be such a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.gated_linear_attention.triton_decays import keep_pairs, load_gates
from linearize_kernels.gated_linear_attention.triton_maps import map_features
from linearize_kernels.gated_linear_attention.triton_states import add_keys, as_tile, as_vector, ones_row, store_sums
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
                 K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
                 GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                 BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Before each block of CHUNKS chunks, [B * H, blocks]: states [2, values, features], norms [2, features], and
    decays, the log of what is left of the state at the split's start. For each split, [B * H, N]: sums
    [2, values + 1, features], what it adds, and carry, the log of what it leaves. Grid (B * H, N, 2 signs).
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
    s = tl.zeros((V, F), tl.float32)
    z = as_tile(tl.zeros((F,), tl.float32), F)
    log_carry = tl.zeros((1,), tl.float32)
    first_block = split * blocks_a_split
    before = document(segments, first_block * CHUNKS * C - 1, length, PACKED)
    for block in range(first_block, tl.minimum(first_block + blocks_a_split, blocks)):
        place = row * blocks + block
        store_matrix(states + (place * 2 + sign) * values * features, s, features, 1, values, features, V, F)
        store_vector(norms + (place * 2 + sign) * features, as_vector(z, True), features, F)
        if sign == 0:
            tl.store(decays + place + tl.arange(0, 1), log_carry)
        for chunk in range(0, CHUNKS):
            first = (block * CHUNKS + chunk) * C
            k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
            v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
            since, total, _half = load_gates(gate, first, GH, length, features, C, F, GATE)
            real = key_flags(mask, first, delay + skip, length, C, MASKED)
            own = documents(segments, first, length, C, PACKED)
            last = document(segments, first + C - 1, length, PACKED)
            x, _x, _u = map_features(k_tile, weight, bias, real, features, "softmax", False, F, 1, PRECISION)
            s, _s, z, _z, log_carry = add_keys(
                s, s, z, z, log_carry, own, before, last, x, x, v_tile, since, total,
                C, PACKED, GATE, 1, True, PRECISION,
            )  # fmt: skip
            before = last
    place = row * tl.num_programs(1) + split
    whole: tl.constexpr = (values + 1) * features
    store_sums(sums + (place * 2 + sign) * whole, s, s, z, z, 0, features, values, F, V, 1, True)
    if sign == 0:
        tl.store(carry + place + tl.arange(0, 1), log_carry)


@triton.jit
def split_states(sums, carry, start_s, start_z, starts, start_norms, end_s, end_z, splits,
                 features: tl.constexpr, values: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr,
                 STARTED: tl.constexpr, ENDED: tl.constexpr):  # fmt: skip
    """The states before each split, [B * H, N]: starts [2, values, features] and start_norms [2, features]; and the
    state after the last. Grid (B * H, 2 signs, tiles of ROWS of a state's values + 1 rows, the last its normaliser).
    """
    head = tl.program_id(0).to(tl.int64)
    sign = tl.program_id(1)
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, F)[None, :]
    value = (row < values) & (column < features)
    norm = (row == values) & (column < features)
    end_value = end_s + head * 2 * features * values + (sign * features + column) * values + row
    end_norm = end_z + head * 2 * features + sign * features + column + 0 * row
    running = tl.zeros((ROWS, F), tl.float32)
    if STARTED:
        start_value = start_s + head * 2 * features * values + (sign * features + column) * values + row
        start_norm = start_z + head * 2 * features + sign * features + column + 0 * row
        running += tl.load(start_value, mask=value, other=0.0) + tl.load(start_norm, mask=norm, other=0.0)
    for split in range(0, splits):
        place = (head * splits + split) * 2 + sign
        kept = running.to(starts.dtype.element_ty)
        tl.store(starts + place * values * features + row * features + column, kept, mask=value)
        tl.store(start_norms + place * features + column + 0 * row, running, mask=norm)
        added = sums + place * (values + 1) * features + row * features + column
        running *= tl.exp(tl.load(carry + head * splits + split))
        running += tl.load(added, mask=value | norm, other=0.0)
    if ENDED:
        tl.store(end_value, running, mask=value)
        tl.store(end_norm, running, mask=norm)


@triton.jit
def read_state(num, den, x, states, norms, starts, start_norms, place, start, keep,
               features: tl.constexpr, values: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
               GATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """num [C, V] and den [C, 16], with what features x [C, F] find in the state before their block: `keep` of the
    state at number `start`, and what came since, at number `place`.
    """
    s = load_matrix(states + place * values * features, features, 1, values, features, V, F)
    at_start = load_matrix(starts + start * values * features, features, 1, values, features, V, F)
    z = load_vector(norms + place * features, features, F)
    z_at_start = load_vector(start_norms + start * features, features, F)
    if GATE == "none" and not PACKED:  # all is kept, and fp32 would only cost time: the sum is rounded once, too
        s += at_start
        z += z_at_start
    else:
        s = (at_start.to(tl.float32) * keep + s.to(tl.float32)).to(s.dtype)
        z += z_at_start * keep
    den = tl.dot(x, tl.trans(ones_row(z, F, s.dtype)), den, input_precision=PRECISION)
    num = tl.dot(x, tl.trans(s), num, input_precision=PRECISION)
    return num, den


@triton.jit
def block_outputs(q, k, v, gate, mask, segments, query_weight, key_weight, query_bias, key_bias, other, other_den,
                  states, norms, decays, starts, start_norms, y, scale, epsilon,
                  q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, delay, skip, length,
                  blocks_a_split, blocks, splits,
                  H: tl.constexpr, KH: tl.constexpr, VH: tl.constexpr, GH: tl.constexpr,
                  width: tl.constexpr, features: tl.constexpr, values: tl.constexpr,
                  K: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
                  GATE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
                  NORMALISED: tl.constexpr, OTHER: tl.constexpr, SCALED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """y and scale of one block, as `walk_forward` writes them; grid (blocks, H, B)."""
    block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = b * H + h
    first = block * C
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

    # the block's own keys
    q_tile = load_rows(q, first, q_token, length, width, C, K)
    inside = first + tl.arange(0, C) < length
    qp, qn, _u = map_features(q_tile, q_weight, q_bias, inside, features, "softmax", True, F, 2, PRECISION)
    k_tile = load_rows(k, first - delay, k_token, length, width, C, K)
    v_tile = load_rows(v, first - delay, v_token, length, values, C, V)
    real = key_flags(mask, first, delay + skip, length, C, MASKED)
    kp, kn, _u = map_features(k_tile, k_weight, k_bias, real, features, "softmax", False, F, 2, PRECISION)
    own = documents(segments, first, length, C, PACKED)
    since, _total, _half = load_gates(gate, first, GH, length, features, C, F, GATE)
    score = tl.dot(qp, tl.trans(kp), input_precision=PRECISION)
    score = tl.dot(qn, tl.trans(kn), score, input_precision=PRECISION)
    score = keep_pairs(score, own, since, C, PACKED, GATE, False).to(dtype)
    one = ones_row(tl.full((C,), 1.0, tl.float32), C, dtype)
    den = tl.dot(score, tl.trans(one), input_precision=PRECISION)  # its columns add up to the denominator
    num = tl.dot(score, v_tile, input_precision=PRECISION)

    # the state before it, of each sign
    if GATE != "none":
        read = tl.exp(since)
        qp = (qp * read).to(dtype)
        qn = (qn * read).to(dtype)
    if PACKED:
        goes_on = (own == document(segments, first - 1, length, PACKED))[:, None]
        qp = tl.where(goes_on, qp, 0.0).to(dtype)
        qn = tl.where(goes_on, qn, 0.0).to(dtype)
    place = row * blocks + block
    start = row * splits + block // blocks_a_split
    keep = tl.exp(tl.load(decays + place))
    num, den = read_state(
        num, den, qp, states, norms, starts, start_norms, place * 2, start * 2, keep,
        features, values, F, V, GATE, PACKED, PRECISION,
    )  # fmt: skip
    num, den = read_state(
        num, den, qn, states, norms, starts, start_norms, place * 2 + 1, start * 2 + 1, keep,
        features, values, F, V, GATE, PACKED, PRECISION,
    )  # fmt: skip
    den = tl.sum(den, 1)
    if OTHER:
        beside = load_column(other_den + line, first, H, length, C)
        other_tile = load_rows(other + line * values, first, H * values, length, values, C, V)
        num += other_tile.to(tl.float32) * beside[:, None]
        den += beside
    if NORMALISED:
        den += epsilon
        den = 1.0 / tl.where(den == 0, 1.0, den)
        num *= den[:, None]
    store_rows(y + line * values, num, first, H * values, length, values, C, V)
    if SCALED:
        store_column(scale + line, den, first, H, length, C)
