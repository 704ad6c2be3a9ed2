"""Causal linear attention in Triton, forward and backward: feature maps, decay and normaliser in one walk over q, k, v.

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

A Hedgehog map makes two tiles of features, p of u = x W + b and n of -u. States are kept as [V, F], so that values
enter products from memory. Legend in ../tiles.py; MAP "none" means that q and k are features.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_FEATURE = tl.constexpr(1e-12)
MAX_EXPONENT = tl.constexpr(60.0)
MIN_LOG_GATE = tl.constexpr(-5.0)
FORGOTTEN = tl.constexpr(-100.0)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def map_features(x, weight, bias, real, features, MAP: tl.constexpr, QUERY: tl.constexpr, F: tl.constexpr,
                 SIGNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tiles p and n of features, [C, F] in the dtype of x, and u in fp32.

    Features that are padding are 0, and so are the keys of tokens that are not `real`.
    """
    if MAP == "none":
        p = x
        if not QUERY:
            p = tl.where(real[:, None], x, 0.0).to(x.dtype)
        n = p
        u = x
    else:
        u, p, n = hedgehog_map(x, weight, bias, real, features, MAP, QUERY, F, SIGNS, PRECISION)
    return p, n, u


@triton.jit
def hedgehog_map(x, weight, bias, real, features, MAP: tl.constexpr, QUERY: tl.constexpr, F: tl.constexpr,
                 SIGNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """u = x W + b in fp32, and the features of u and, where SIGNS = 2, of -u."""
    u = tl.dot(x, weight, input_precision=PRECISION) + bias[None, :]
    p, n = signed_features(u, real, features, MAP, QUERY, F, SIGNS)
    return u, p.to(x.dtype), n.to(x.dtype)


@triton.jit
def signed_features(u, real, features, MAP: tl.constexpr, QUERY: tl.constexpr, F: tl.constexpr, SIGNS: tl.constexpr):
    """Features [C, F] of u and, where SIGNS = 2, of -u, in fp32; 0 in the padding, and for keys that are not `real`."""
    plus = u
    minus = -u
    inside = tl.full((1, F), True, tl.int1)
    if features != F:
        inside = (tl.arange(0, F) < features)[None, :]
        plus = tl.where(inside, plus, NOTHING)
        minus = tl.where(inside, minus, NOTHING)
    if MAP == "softmax":
        p = softmax(plus, 1, real, QUERY)
        n = p
        if SIGNS == 2:
            below = u
            if features != F:
                below = tl.where(inside, u, -NOTHING)
            n = softmax(below, -1, real, QUERY)
    elif MAP == "softmax_joint":
        top = 2 * tl.maximum(tl.max(plus, 1), tl.max(minus, 1))
        p = tl.exp(2 * plus - top[:, None])
        n = tl.exp(2 * minus - top[:, None])
        scale = (1.0 / (tl.sum(p, 1) + tl.sum(n, 1)))[:, None]
        p = tl.maximum(p * scale, MIN_FEATURE)
        n = tl.maximum(n * scale, MIN_FEATURE)
    elif QUERY:
        top = tl.maximum(tl.max(plus, 1), tl.max(minus, 1))
        p = tl.maximum(tl.exp(plus - top[:, None]), MIN_FEATURE)
        n = tl.maximum(tl.exp(minus - top[:, None]), MIN_FEATURE)
    else:
        p = tl.exp(tl.minimum(plus, MAX_EXPONENT))
        n = tl.exp(tl.minimum(minus, MAX_EXPONENT))
    if features != F:
        p = tl.where(inside, p, 0.0)
        n = tl.where(inside, n, 0.0)
    if not QUERY and MAP != "softmax":
        p = tl.where(real[:, None], p, 0.0)
        n = tl.where(real[:, None], n, 0.0)
    return p, n


@triton.jit
def softmax(u, SIGN: tl.constexpr, real, QUERY: tl.constexpr):
    """softmax(SIGN u), [C, F]; no feature is below the smallest, and those of keys that are not `real` are 0: two
    numbers of a row say so, which is cheaper than to look at each feature.
    """
    slope: tl.constexpr = SIGN * LOG2_E
    top = tl.max(u, 1) if SIGN == 1 else tl.min(u, 1)
    p = tl.exp2(u * slope - (top * slope)[:, None])
    scale = 1.0 / tl.sum(p, 1)
    if QUERY:
        p = tl.maximum(p * scale[:, None], MIN_FEATURE)
    else:
        least = tl.where(real, MIN_FEATURE, 0.0)
        p = tl.maximum(p * tl.where(real, scale, 0.0)[:, None], least[:, None])
    return p


@triton.jit
def map_gradient(u, p, n, dp, dn, MAP: tl.constexpr, QUERY: tl.constexpr, SIGNS: tl.constexpr):
    """du of `map_features`."""
    if MAP == "none":
        du = dp
    else:
        p = p.to(tl.float32)
        n = n.to(tl.float32)
        dp = dp * p
        dn = dn * n
        if MAP == "exp" and not QUERY:
            du = tl.where(u < MAX_EXPONENT, dp, 0.0) - tl.where(-u < MAX_EXPONENT, dn, 0.0)
        else:
            # the smallest feature, rounded, may lie a little above MIN_FEATURE
            dp = tl.where(p > 1.01 * MIN_FEATURE, dp, 0.0)
            dn = tl.where(n > 1.01 * MIN_FEATURE, dn, 0.0)
            if MAP == "softmax":
                du = dp - p * tl.sum(dp, 1)[:, None]
                if SIGNS == 2:
                    du -= dn - n * tl.sum(dn, 1)[:, None]
            elif MAP == "softmax_joint":
                total = (tl.sum(dp, 1) + tl.sum(dn, 1))[:, None]
                du = 2 * (dp - p * total - (dn - n * total))
            else:
                du = dp - dn
    return du


@triton.jit
def load_gates(gate, first, stride, length, features, C: tl.constexpr, F: tl.constexpr, GATE: tl.constexpr):
    """Log decay from the chunk's start up to each token, [C, 1] or [C, F], its total [1] or [F], and that of the
    first half. Tokens behind the end decay nothing.
    """
    if GATE == "feature":
        row = tl.arange(0, C)
        log_gate = tl.maximum(load_rows(gate, first, stride, length, features, C, F).to(tl.float32), MIN_LOG_GATE)
        half = tl.sum(tl.where((row < C // 2)[:, None], log_gate, 0.0), 0)
        since = tl.cumsum(log_gate, 0)
        total = tl.sum(log_gate, 0)
    else:
        half = tl.zeros((1,), tl.float32)
        since = tl.zeros((C, 1), tl.float32)
        total = half
        if GATE == "head":
            log_gate = tl.maximum(load_column(gate, first, stride, length, C), FORGOTTEN)
            since = tl.cumsum(log_gate, 0)[:, None]  # one dimension: Triton 3.6 cannot compile scans of a [C, 1] tile
            total = total + tl.sum(log_gate, 0)
    return since, total, half


@triton.jit
def keep_pairs(score, own, since, C: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr,
               KEYS_FIRST: tl.constexpr):  # fmt: skip
    """Scores of one chunk, [query, key] or, KEYS_FIRST, [key, query], times the decay per head; 0 for keys that come
    later or belong to another document.
    """
    row = tl.arange(0, C)
    if KEYS_FIRST:
        seen = row[:, None] <= row[None, :]
    else:
        seen = row[:, None] >= row[None, :]
    if PACKED:
        seen = seen & (own[:, None] == own[None, :])
    if GATE == "head":
        at = tl.sum(since, 1)
        if KEYS_FIRST:
            log = at[None, :] - at[:, None]
        else:
            log = at[:, None] - at[None, :]
        score = score * tl.exp(tl.minimum(log, 0.0))
    return tl.where(seen, score, 0.0)


@triton.jit
def feature_decays(since, total, half, C: tl.constexpr):
    """Factors of queries and keys whose product is the decay between them, per feature.

    Inside a half of the chunk, counted from the middle of its total, so that none leaves fp32: `near_query`,
    `near_key`. From the first half to the second, counted from where they meet: `far_query`, `far_key`, 0 elsewhere.
    """
    second = (tl.arange(0, C) >= C // 2)[:, None]
    middle = tl.where(second, half[None, :] + 0.5 * (total - half)[None, :], 0.5 * half[None, :])
    near_query = tl.exp(since - middle)
    near_key = tl.exp(middle - since)
    far_query = tl.where(second, tl.exp(tl.minimum(since - half[None, :], 0.0)), 0.0)
    far_key = tl.where(second, 0.0, tl.exp(tl.minimum(half[None, :] - since, 0.0)))
    return near_query, near_key, far_query, far_key


@triton.jit
def same_half(C: tl.constexpr):
    """Pairs of tokens that lie in one half of the chunk, [C, C]."""
    row = tl.arange(0, C)
    return (row[:, None] >= C // 2) == (row[None, :] >= C // 2)


@triton.jit
def collect(sums, carry, start_s, start_z, first, step, count, column, features: tl.constexpr, values: tl.constexpr,
            F: tl.constexpr, V: tl.constexpr, E: tl.constexpr, SIGNS: tl.constexpr,
            STARTED: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """The running state from `start` on through `count` splits: first, first + step, ...

    Args:
        sums: what each split adds, [N, SIGNS, values + 1, features]; the last row is the normaliser.
        carry: [N, E] log of what each split leaves of the state before it; E = 1 or `features` padded to F.
        start_s, start_z: the state before, [SIGNS * features, values] and [SIGNS * features].
    """
    block: tl.constexpr = (values + 1) * features
    tile: tl.constexpr = V if values > V else values
    sp = tl.zeros((V, F), tl.float32)
    zp = tl.zeros((F,), tl.float32)
    if STARTED:
        sp = load_matrix(start_s + column, 1, values, tile, features, V, F).to(tl.float32)
        zp = load_vector(start_z, features, F)
    sn = sp
    zn = zp
    if SIGNS == 2 and STARTED:
        sn = load_matrix(start_s + features * values + column, 1, values, tile, features, V, F).to(tl.float32)
        zn = load_vector(start_z + features, features, F)
    base = sums + first * (SIGNS * block)
    carry += first * E
    for _ in range(0, count):
        keep = tl.exp(tl.load(carry + tl.arange(0, E)).to(tl.float32))
        sp = sp * keep[None, :] + load_matrix(base + column * features, features, 1, tile, features, V, F)
        zp = zp * keep + load_vector(base + values * features, features, F)
        if SIGNS == 2:
            sn = sn * keep[None, :] + load_matrix(base + block + column * features, features, 1, tile, features, V, F)
            zn = zn * keep + load_vector(base + block + values * features, features, F)
        base += step * (SIGNS * block)
        carry += step * E
    if TILED:
        zp = as_tile(zp, F)
        zn = as_tile(zn, F)
    return sp, sn, zp, zn


@triton.jit
def store_sums(base, sp, sn, zp, zn, column, features: tl.constexpr, values: tl.constexpr, F: tl.constexpr,
               V: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """One split's entry of `sums`; the normaliser once, with the first tile of values."""
    block: tl.constexpr = (values + 1) * features
    tile: tl.constexpr = V if values > V else values
    store_matrix(base + column * features, sp, features, 1, tile, features, V, F)
    if SIGNS == 2:
        store_matrix(base + block + column * features, sn, features, 1, tile, features, V, F)
    if column == 0:
        store_vector(base + values * features, as_vector(zp, TILED), features, F)
        if SIGNS == 2:
            store_vector(base + block + values * features, as_vector(zn, TILED), features, F)


@triton.jit
def store_state(s, z, sp, sn, zp, zn, column, features: tl.constexpr, values: tl.constexpr, F: tl.constexpr,
                V: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """A head's state, [SIGNS * features, values] and [SIGNS * features]."""
    tile: tl.constexpr = V if values > V else values
    store_matrix(s + column, sp, 1, values, tile, features, V, F)
    if SIGNS == 2:
        store_matrix(s + features * values + column, sn, 1, values, tile, features, V, F)
    if column == 0:
        store_vector(z, as_vector(zp, TILED), features, F)
        if SIGNS == 2:
            store_vector(z + features, as_vector(zn, TILED), features, F)


@triton.jit
def ones_row(vector, C: tl.constexpr, dtype: tl.constexpr):
    """[16, C] whose first two rows add up to `vector`, the second being what the first lost when it was rounded."""
    row = tl.arange(0, 16)[:, None]
    high = vector.to(dtype)
    low = (vector - high.to(tl.float32)).to(dtype)
    return tl.where(row == 0, high[None, :], tl.where(row == 1, low[None, :], 0.0)).to(dtype)


@triton.jit
def grow(z, x, weights, C: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr):
    """z + sum_c weights_c x_c. A normaliser is a vector [F], or, TILED, the sum of the rows of a [16, F] tile, filled
    by products: as a vector it takes a register for each of its columns, which wide states cannot spare.
    """
    if TILED:
        z = tl.dot(ones_row(weights, C, x.dtype), x, z, input_precision=PRECISION)
    else:
        z = z + tl.sum(x.to(tl.float32) * weights[:, None], 0)
    return z


@triton.jit
def times(x, z, TILED: tl.constexpr, PRECISION: tl.constexpr):
    """x [C, F] times a normaliser: fp32 [C]."""
    if TILED:
        high = z.to(x.dtype)
        low = (z - high.to(tl.float32)).to(x.dtype)
        product = tl.dot(x, tl.trans(high), input_precision=PRECISION)
        result = tl.sum(tl.dot(x, tl.trans(low), product, input_precision=PRECISION), 1)
    else:
        result = tl.sum(x * z[None, :], 1)
    return result


@triton.jit
def as_tile(vector, F: tl.constexpr):
    """[16, F] with `vector` in its first row."""
    return tl.where(tl.arange(0, 16)[:, None] == 0, vector[None, :], 0.0)


@triton.jit
def as_vector(z, TILED: tl.constexpr):
    """A normaliser as [F]."""
    if TILED:
        z = tl.sum(z, 0)
    return z


@triton.jit
def add_keys(sp, sn, zp, zn, log_carry, own, before, last, kp, kn, v, since, total, C: tl.constexpr,
             PACKED: tl.constexpr, GATE: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """The running state after a chunk, and the log of what is left of the state at the split's start.

    `before` and `last` are the documents of the last token before the chunk and of its own last token.
    """
    keep = tl.exp(total)
    if GATE != "none":
        write = tl.exp(total[None, :] - since)
        kp = (kp * write).to(v.dtype)
        kn = (kn * write).to(v.dtype)
    if PACKED:
        goes_on = last == before
        keep = tl.where(goes_on, keep, 0.0)
        log_carry = tl.where(goes_on, log_carry, NOTHING)
        kp = tl.where((own == last)[:, None], kp, 0.0).to(v.dtype)
        kn = tl.where((own == last)[:, None], kn, 0.0).to(v.dtype)
    if GATE != "none" or PACKED:
        sp *= keep[None, :]
        zp *= keep
        if SIGNS == 2:
            sn *= keep[None, :]
            zn *= keep
    values = tl.trans(v)
    sp = tl.dot(values, kp, sp, input_precision=PRECISION)
    one = tl.full((C,), 1.0, tl.float32)
    zp = grow(zp, kp, one, C, TILED, PRECISION)
    if SIGNS == 2:
        sn = tl.dot(values, kn, sn, input_precision=PRECISION)
        zn = grow(zn, kn, one, C, TILED, PRECISION)
    return sp, sn, zp, zn, log_carry + total


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
def add_queries(rp, rn, xp, xn, log_carry, own, after, begins, qp, qn, dy, scale, row_term, since, total,
                C: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, SIGNS: tl.constexpr, TILED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of the state before a chunk from that of the state after it: `add_keys` the other way round.

    `begins` and `after` are the documents of the chunk's first token and of the first token after it.
    """
    keep = tl.exp(total)
    factor = scale[:, None]
    term = row_term
    if GATE == "head":
        read = tl.exp(since)
        factor = factor * read
        term = term * tl.sum(read, 1)
    if GATE == "feature":
        qp = (qp * tl.exp(since)).to(dy.dtype)
    if PACKED:
        goes_on = begins == after
        keep = tl.where(goes_on, keep, 0.0)
        log_carry = tl.where(goes_on, log_carry, NOTHING)
        factor = tl.where((own == begins)[:, None], factor, 0.0)
        term = tl.where(own == begins, term, 0.0)
    if GATE != "none" or PACKED:
        rp *= keep[None, :]
        xp *= keep
        if SIGNS == 2:
            rn *= keep[None, :]
            xn *= keep
    gradients = tl.trans(dy)
    rp = tl.dot(gradients, (qp * factor).to(dy.dtype), rp, input_precision=PRECISION)
    xp = grow(xp, qp, term, C, TILED, PRECISION)
    if SIGNS == 2:
        rn = tl.dot(gradients, (qn * factor).to(dy.dtype), rn, input_precision=PRECISION)
        xn = grow(xn, qn, term, C, TILED, PRECISION)
    return rp, rn, xp, xn, log_carry + total


@triton.jit
def load_scale(scale, first, stride, length, C: tl.constexpr, NORMALISED: tl.constexpr):
    """w: 1 / D, or 1 where numerator and denominator are apart."""
    if NORMALISED:
        w = load_column(scale, first, stride, length, C)
    else:
        w = tl.full((C,), 1.0, tl.float32)
    return w


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
