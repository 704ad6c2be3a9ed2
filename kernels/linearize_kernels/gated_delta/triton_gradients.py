"""The gated delta rule in Triton, backwards. triton.py tells how, and has the legend."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.gated_delta.triton import (
    load_decays,
    load_values,
    pair_decays,
    read_decays,
    store_values,
    write_decays,
)
from linearize_kernels.tiles import load_column, load_matrix, load_rows, store_column, store_matrix, store_rows


@triton.jit
def gather_gradients(q, k, log_decay, segments, do, du, state_gradients,
                     q_batch, q_token, q_head, k_batch, k_token, k_head, length,
                     J: tl.constexpr, P: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr,
                     V: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A^T dO [B, J, T, V] and (r Q)^T dO [B, J, N, K, V], summed over the query heads of a state; grid (B * J, N,
    tiles of V).
    """
    head = tl.program_id(0).to(tl.int64)
    b = head // J
    j = head % J
    chunk = tl.program_id(1)
    first = chunk * C
    column = tl.program_id(2) * V
    q += b * q_batch + j * P * q_head
    k += b * k_batch + j * k_head
    do += (b * length * J + j) * P * values
    dtype = do.dtype.element_ty
    k_tile = load_rows(k, first, k_token, length, width, C, K)
    since, boundaries, _boundary, _total, _last = load_decays(
        log_decay + b * length * J + j, segments + b * length, first, J, length, C, PACKED
    )
    pair = pair_decays(since, boundaries, C, True, True)
    read = read_decays(since, boundaries)
    d_correction = tl.zeros((C, V), tl.float32)
    d_state = tl.zeros((K, V), tl.float32)
    for _p in range(0, P):
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        do_tile = load_values(do, column, first, J * P * values, length, values, C, V)
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * pair
        d_correction = tl.dot(score.to(dtype), do_tile, d_correction, input_precision=PRECISION)
        carried = (do_tile * read[:, None]).to(dtype)
        d_state = tl.dot(tl.trans(q_tile), carried, d_state, input_precision=PRECISION)
        q += q_head
        do += values
    store_values(du + head * length * values, d_correction, column, first, values, length, values, C, V)
    place = head * tl.num_programs(1) + chunk
    store_matrix(state_gradients + place * width * values + column, d_state, values, 1, width, values - column, K, V)


@triton.jit
def walk_gradients(k, log_decay, segments, erase, du, state_gradients, end_gradient, start_gradient,
                   k_batch, k_token, k_head, length,
                   J: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   C: tl.constexpr, PACKED: tl.constexpr, STARTED: tl.constexpr, ENDED: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """From the end to the start: dU and G in the places of what `gather_gradients` found, and the first state's
    gradient; grid (B * J, tiles of V).
    """
    head = tl.program_id(0).to(tl.int64)
    b = head // J
    j = head % J
    column = tl.program_id(1) * V
    size: tl.constexpr = width * values
    chunks = tl.cdiv(length, C)
    k += b * k_batch + j * k_head
    log_decay += b * length * J + j
    segments += b * length
    erase += head * length * width
    du += head * length * values
    state_gradients += (head + 1) * chunks * size + column
    dtype = du.dtype.element_ty
    ds = tl.zeros((K, V), tl.float32)
    if ENDED:
        ds = load_matrix(end_gradient + head * size + column, values, 1, width, values - column, K, V)
    for index in range(0, chunks):
        first = (chunks - 1 - index) * C
        state_gradients -= size
        k_tile = load_rows(k, first, k_token, length, width, C, K)
        w_tile = load_rows(erase, first, width, length, width, C, K)
        d_correction = load_values(du, column, first, values, length, values, C, V).to(tl.float32)
        gathered = load_matrix(state_gradients, values, 1, width, values - column, K, V).to(tl.float32)
        since, boundaries, _boundary, total, last = load_decays(log_decay, segments, first, J, length, C, PACKED)
        rounded = ds.to(dtype)
        store_matrix(state_gradients, rounded, values, 1, width, values - column, K, V)
        write = write_decays(since, boundaries, total, last)
        d_correction += tl.dot(k_tile, rounded, input_precision=PRECISION) * write[:, None]
        store_values(du, d_correction, column, first, values, length, values, C, V)
        ds = ds * tl.where(last == 0, tl.exp(total), 0.0) + gathered
        ds -= tl.dot(tl.trans(w_tile), d_correction.to(dtype), input_precision=PRECISION)
    if STARTED:
        store_matrix(start_gradient + head * size + column, ds, values, 1, width, values - column, K, V)


@triton.jit
def chunk_gradients(q, k, v, log_decay, beta, segments, inverse, u, states, do, du, state_gradients,
                    q_gradient, k_gradient, v_gradient, log_decay_gradient, beta_gradient,
                    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, length,
                    J: tl.constexpr, P: tl.constexpr, width: tl.constexpr, values: tl.constexpr, K: tl.constexpr,
                    V: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq [B, T, H, K], dk [B, T, J, K], dv [B, T, J, V], and those of log decay and beta [B, T, J]; grid (B * J, N)."""
    head = tl.program_id(0).to(tl.int64)
    b = head // J
    j = head % J
    chunk = tl.program_id(1)
    first = chunk * C
    row = b * length * J + j
    q += b * q_batch + j * P * q_head
    k += b * k_batch + j * k_head
    v += b * v_batch + j * v_head
    do += row * P * values
    q_gradient += row * P * width
    v_gradient += row * values
    u += head * length * values
    du += head * length * values
    place = head * tl.num_programs(1) + chunk
    states += place * width * values
    state_gradients += place * width * values
    dtype = v.dtype.element_ty
    k_tile = load_rows(k, first, k_token, length, width, C, K)
    strength = load_column(beta + row, first, J, length, C)
    since, boundaries, boundary, total, last = load_decays(
        log_decay + row, segments + b * length, first, J, length, C, PACKED
    )

    # through U = X Y and through the state after the chunk
    x_tile = load_matrix(inverse + place * C * C, C, 1, C, C, C, C)
    d_below = tl.zeros((C, C), tl.float32)
    d_read = tl.zeros((C, K), tl.float32)
    d_key = tl.zeros((C, K), tl.float32)
    d_strength = tl.zeros((C,), tl.float32)
    worth = tl.zeros((), tl.float32)
    for column in range(0, values, V):
        u_tile = load_values(u, column, first, values, length, values, C, V)
        du_tile = load_values(du, column, first, values, length, values, C, V)
        v_tile = load_values(v, column, first, v_token, length, values, C, V)
        s_tile = load_matrix(states + column, values, 1, width, values - column, K, V)
        g_tile = load_matrix(state_gradients + column, values, 1, width, values - column, K, V)
        dy = tl.dot(tl.trans(x_tile), du_tile, input_precision=PRECISION)
        store_values(v_gradient, dy * strength[:, None], column, first, J * values, length, values, C, V)
        d_strength += tl.sum(dy * v_tile, 1)
        worth += tl.sum(tl.sum(s_tile.to(tl.float32) * g_tile, 0), 0)
        dy = dy.to(dtype)
        d_below = tl.dot(dy, tl.trans(u_tile), d_below, input_precision=PRECISION)
        d_read = tl.dot(dy, tl.trans(s_tile), d_read, input_precision=PRECISION)
        d_key = tl.dot(u_tile, tl.trans(g_tile), d_key, input_precision=PRECISION)
    d_key *= write_decays(since, boundaries, total, last)[:, None]
    written = tl.sum(tl.sum(d_key * k_tile, 1), 0)
    read = read_decays(since, boundaries)
    d_below *= pair_decays(since, boundaries, C, False, False)
    d_read = tl.dot(d_below.to(dtype), k_tile, d_read * read[:, None], input_precision=PRECISION)
    through_key = tl.sum(d_read * k_tile, 1)
    store_column(beta_gradient + row, d_strength - through_key, first, J, length, C)
    d_key -= d_read * strength[:, None]
    d_below *= strength[:, None]
    d_key -= tl.dot(tl.trans(d_below.to(dtype)), k_tile, input_precision=PRECISION)
    term = -2 * strength * through_key

    # through the outputs
    pair = pair_decays(since, boundaries, C, True, False)
    for _p in range(0, P):
        q_tile = load_rows(q, first, q_token, length, width, C, K)
        d_score = tl.zeros((C, C), tl.float32)
        d_query = tl.zeros((C, K), tl.float32)
        for column in range(0, values, V):
            do_tile = load_values(do, column, first, J * P * values, length, values, C, V)
            u_tile = load_values(u, column, first, values, length, values, C, V)
            s_tile = load_matrix(states + column, values, 1, width, values - column, K, V)
            d_score = tl.dot(do_tile, tl.trans(u_tile), d_score, input_precision=PRECISION)
            d_query = tl.dot(do_tile, tl.trans(s_tile), d_query, input_precision=PRECISION)
        d_query *= read[:, None]
        d_score = (d_score * pair).to(dtype)
        d_query = tl.dot(d_score, k_tile, d_query, input_precision=PRECISION)
        d_key = tl.dot(tl.trans(d_score), q_tile, d_key, input_precision=PRECISION)
        store_rows(q_gradient, d_query, first, J * P * width, length, width, C, K)
        term += tl.sum(d_query * q_tile, 1)
        q += q_head
        do += values
        q_gradient += width
    store_rows(k_gradient + row * width, d_key, first, J * width, length, width, C, K)

    term -= tl.sum(d_key * k_tile, 1)
    kept = tl.where(last == 0, tl.exp(total), 0.0) * worth
    d_decay = tl.cumsum(term, 0, reverse=True) + written + kept
    store_column(log_decay_gradient + row, tl.where(boundary, 0.0, d_decay), first, J, length, C)
