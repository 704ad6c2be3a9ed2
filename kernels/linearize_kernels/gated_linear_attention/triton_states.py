"""The running state in Triton: what of it goes through memory, and how a chunk changes it. Legend in ../tiles.py.

States sp and sn, of the features p and n, are kept as [V, F], so that values enter products from memory; zp and zn are
their normalisers. Backwards, rp, rn, xp and xn are the gradients of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.tiles import NOTHING, load_matrix, load_vector, store_matrix, store_vector


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
