"""The gated delta rule in Triton, forward and backward, in the WY form (arXiv 2412.06464).

The sequence is cut into chunks of C tokens. With b_i the log decay since the chunk's start, d_ij = exp(b_i - b_j),
r_i = exp(b_i) what is left of the chunk's first state S, w_j = exp(b_C - b_j) what is left of a write at the end, and
beta_i the writing strength, the corrections u solve a unit lower triangular system:

    (I + L) U = Y,  L_ij = beta_i d_ij k_i . k_j for j < i,  Y_i = beta_i (v_i - r_i S^T k_i)
    S' = exp(b_C) S + (w K)^T U,   O = (r Q) S + A U,   A_ij = d_ij q_i . k_j for j <= i

`solve_chunks` inverts I + L of every chunk and stores X = (I + L)^-1, X beta V and W = X beta r K; `walk_states` takes
the state from chunk to chunk, U = X beta V - W S; `read_states` reads all chunks at once. Backwards, in
triton_gradients.py, with G = dS' the gradient of the state after a chunk,

    dU = A^T dO + (w K) G,   dS = exp(b_C) G + (r Q)^T dO - W^T dU

`gather_gradients` finds what does not depend on G, `walk_gradients` walks from the end, and `chunk_gradients` does the
rest for all chunks at once. It needs no gradient of the inverse: dY = X^T dU and dL = -dY U^T below the diagonal. The
log decay of token t gets the sum, over what reaches over it, of factor times the factor's gradient:

    sum_i>=t (q_i . dq_i - k_i . dk_i + 2 beta_i h_i) + sum_j w_j k_j . (G u_j) + exp(b_C) <S, G>

over the tokens of its chunk; h_i is what of dbeta_i comes through k_i.

A token where the state is dropped, for it begins a document or forgets everything, is not a decay but a boundary: only
tokens between the same two boundaries see each other. Sums of decays so stay short, and their differences exact.

Shape legend of ../tiles.py; P query heads share each of J states, and are taken one after the other. V is a tile of the
values where they are many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.tiles import load_column, load_matrix, load_rows, store_matrix, store_rows

FORGOTTEN = tl.constexpr(-50.0)
"""Log decay under which a token forgets everything: of what came before, e^-50 would be left."""


@triton.jit
def value_places(base, column, first, stride, length, values: tl.constexpr, C: tl.constexpr, V: tl.constexpr):
    """A tile's places [C, V] in a [length, values] matrix, from `first` and `column` on, and which of them exist."""
    row = first + tl.arange(0, C)
    at = column + tl.arange(0, V)
    inside = (row < length)[:, None] & (at >= 0)[None, :]
    if values % V != 0:
        inside = inside & (at < values)[None, :]
    return base + row.to(tl.int64)[:, None] * stride + at[None, :], inside


@triton.jit
def load_values(base, column, first, stride, length, values: tl.constexpr, C: tl.constexpr, V: tl.constexpr):
    """A tile of values; 0 outside."""
    place, inside = value_places(base, column, first, stride, length, values, C, V)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def store_values(base, tile, column, first, stride, length, values: tl.constexpr, C: tl.constexpr, V: tl.constexpr):
    place, inside = value_places(base, column, first, stride, length, values, C, V)
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_decays(log_decay, segments, first, stride, length, C: tl.constexpr, PACKED: tl.constexpr):
    """Of a chunk: log decay since its start [C], boundaries since then [C], whether a token is one [C], and the first
    two at its end. A boundary's own decay does not count.
    """
    log = load_column(log_decay, first, stride, length, C)
    boundary = log < FORGOTTEN
    if PACKED:
        token = tl.minimum(first + tl.arange(0, C), length - 1)
        boundary = boundary | (tl.load(segments + token) != tl.load(segments + tl.maximum(token - 1, 0)))
    log = tl.where(boundary, 0.0, log)
    count = boundary.to(tl.int32)
    return tl.cumsum(log, 0), tl.cumsum(count, 0), boundary, tl.sum(log, 0), tl.sum(count, 0)


@triton.jit
def pair_decays(since, boundaries, C: tl.constexpr, SELF: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Decay from each token to each later one, or, SELF, to itself, [later, earlier] or, KEYS_FIRST, [earlier, later];
    0 elsewhere and over boundaries.
    """
    row = tl.arange(0, C)
    order = row[:, None] - row[None, :]
    log = since[:, None] - since[None, :]
    if KEYS_FIRST:
        order = -order
        log = -log
    seen = (order >= (0 if SELF else 1)) & (boundaries[:, None] == boundaries[None, :])
    return tl.where(seen, tl.exp(tl.minimum(log, 0.0)), 0.0)


@triton.jit
def read_decays(since, boundaries):
    """What is left of the chunk's first state at each token."""
    return tl.where(boundaries == 0, tl.exp(since), 0.0)


@triton.jit
def write_decays(since, boundaries, total, last):
    """What is left of each token's write at the chunk's end."""
    return tl.where(boundaries == last, tl.exp(total - since), 0.0)


@triton.jit
def invert(below, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + below)^-1 of a strictly lower triangular tile [C, C]: row by row in blocks of 16, which are then merged."""
    blocks: tl.constexpr = C // 16
    row = tl.arange(0, 16)
    block = tl.arange(0, blocks)
    same = block[:, None, None, None] == block[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(below, (blocks, 16, blocks, 16)), 0.0), 2)
    inverse = tl.where(row[None, :, None] == row[None, None, :], 1.0, 0.0) + tl.zeros((blocks, 16, 16), tl.float32)
    for index in range(1, 16):
        here = row[None, :, None] == index
        factors = tl.sum(tl.where(here, small, 0.0), 1)
        change = tl.sum(factors[:, :, None] * inverse, 1)
        inverse -= tl.where(here, change[:, None, :], 0.0)
    if C >= 32:
        inverse = merge_blocks(inverse, below, blocks // 2, 16, PRECISION)
    if C >= 64:
        inverse = merge_blocks(inverse, below, blocks // 4, 32, PRECISION)
    return tl.reshape(inverse, (C, C))


@triton.jit
def merge_blocks(inverse, below, N: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of N blocks along the diagonal from those of their halves [2 N, SIZE, SIZE]:

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]
    """
    side = tl.arange(0, 2)
    lower = side[None, :, None, None] == 1
    halves = tl.reshape(inverse, (N, 2, SIZE, SIZE))
    first = tl.sum(tl.where(lower, 0.0, halves), 1)
    second = tl.sum(tl.where(lower, halves, 0.0), 1)
    block = tl.arange(0, 2 * N)
    between = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
    between = tl.where(between[:, None, :, None], tl.reshape(below, (2 * N, SIZE, 2 * N, SIZE)), 0.0)
    between = tl.sum(tl.reshape(tl.sum(between, 2), (N, 2, SIZE, SIZE)), 1)
    corner = tl.dot(second, between, input_precision=PRECISION)
    corner = -tl.dot(corner, first, input_precision=PRECISION)
    same = side[None, :, None, None, None] == side[None, None, None, :, None]
    whole = tl.where(lower[:, :, :, None, :] & ~same, corner[:, None, :, None, :], 0.0)
    return tl.reshape(tl.where(same, halves[:, :, :, None, :], whole), (N, 2 * SIZE, 2 * SIZE))


@triton.jit
def solve_chunks(k, v, log_decay, beta, segments, inverse, u, erase,
                 k_batch, k_token, k_head, v_batch, v_token, v_head, length,
                 J: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                 C: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """X [B, J, N, C, C], X beta V [B, J, T, V] into `u`, and W [B, J, T, K] into `erase`; grid (B * J, N)."""
    head = tl.program_id(0).to(tl.int64)
    b = head // J
    j = head % J
    first = tl.program_id(1) * C
    k += b * k_batch + j * k_head
    v += b * v_batch + j * v_head
    gates = b * length * J + j
    dtype = v.dtype.element_ty
    k_tile = load_rows(k, first, k_token, length, width, C, K)
    strength = load_column(beta + gates, first, J, length, C)
    since, boundaries, _boundary, _total, _last = load_decays(
        log_decay + gates, segments + b * length, first, J, length, C, PACKED
    )
    below = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    below *= strength[:, None] * pair_decays(since, boundaries, C, False, False)
    found = invert(below, C, "tf32x3")
    place = head * tl.num_programs(1) + tl.program_id(1)
    store_matrix(inverse + place * C * C, found, C, 1, C, C, C, C)
    found *= strength[None, :]
    erased = (found * read_decays(since, boundaries)[None, :]).to(dtype)
    erased = tl.dot(erased, k_tile, input_precision=PRECISION)
    store_rows(erase + head * length * width, erased, first, width, length, width, C, K)
    found = found.to(dtype)
    u += head * length * values
    for column in range(0, values, V):
        v_tile = load_values(v, column, first, v_token, length, values, C, V)
        fresh = tl.dot(found, v_tile, input_precision=PRECISION)
        store_values(u, fresh, column, first, values, length, values, C, V)


@triton.jit
def walk_states(k, log_decay, segments, u, erase, start, states, end, k_batch, k_token, k_head, length,
                J: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr, PACKED: tl.constexpr, STARTED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The state before each chunk [B, J, N, K, V] and after the last token, and U in the place of X beta V; grid
    (B * J, tiles of V).
    """
    head = tl.program_id(0).to(tl.int64)
    b = head // J
    j = head % J
    column = tl.program_id(1) * V
    size: tl.constexpr = width * values
    k += b * k_batch + j * k_head
    log_decay += b * length * J + j
    segments += b * length
    u += head * length * values
    erase += head * length * width
    states += head * tl.cdiv(length, C) * size + column
    dtype = u.dtype.element_ty
    s = tl.zeros((K, V), tl.float32)
    if STARTED:
        s = load_matrix(start + head * size + column, values, 1, width, values - column, K, V)
    for chunk in range(0, tl.cdiv(length, C)):
        first = chunk * C
        k_tile = load_rows(k, first, k_token, length, width, C, K)
        w_tile = load_rows(erase, first, width, length, width, C, K)
        fresh = load_values(u, column, first, values, length, values, C, V).to(tl.float32)
        since, boundaries, _boundary, total, last = load_decays(log_decay, segments, first, J, length, C, PACKED)
        rounded = s.to(dtype)
        store_matrix(states, rounded, values, 1, width, values - column, K, V)
        correction = fresh - tl.dot(w_tile, rounded, input_precision=PRECISION)
        store_values(u, correction, column, first, values, length, values, C, V)
        correction *= write_decays(since, boundaries, total, last)[:, None]
        s *= tl.where(last == 0, tl.exp(total), 0.0)
        s = tl.dot(tl.trans(k_tile), correction.to(dtype), s, input_precision=PRECISION)
        states += size
    store_matrix(end + head * size + column, s, values, 1, width, values - column, K, V)


@triton.jit
def read_states(q, k, log_decay, segments, u, states, o, q_batch, q_token, q_head, k_batch, k_token, k_head, length,
                J: tl.constexpr, P: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr,
                V: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """o [B, T, H, V]; grid (B * J, N, tiles of V)."""
    head = tl.program_id(0).to(tl.int64)
    b = head // J
    j = head % J
    chunk = tl.program_id(1)
    first = chunk * C
    column = tl.program_id(2) * V
    q += b * q_batch + j * P * q_head
    k += b * k_batch + j * k_head
    o += (b * length * J + j) * P * values
    dtype = u.dtype.element_ty
    k_tile = load_rows(k, first, k_token, length, width, C, K)
    u_tile = load_values(u + head * length * values, column, first, values, length, values, C, V)
    place = head * tl.num_programs(1) + chunk
    s_tile = load_matrix(states + place * width * values + column, values, 1, width, values - column, K, V)
    since, boundaries, _boundary, _total, _last = load_decays(
        log_decay + b * length * J + j, segments + b * length, first, J, length, C, PACKED
    )
    pair = pair_decays(since, boundaries, C, True, False)
    read = read_decays(since, boundaries)
    for _p in range(0, P):
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * pair
        answer = tl.dot(q_tile, s_tile, input_precision=PRECISION) * read[:, None]
        answer = tl.dot(score.to(dtype), u_tile, answer, input_precision=PRECISION)
        store_values(o, answer, column, first, J * P * values, length, values, C, V)
        q += q_head
        o += values
