"""Decays in Triton, per head or per feature: of a chunk, and between its tokens. Legend in ../tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.tiles import load_column, load_rows

MIN_LOG_GATE = tl.constexpr(-5.0)
FORGOTTEN = tl.constexpr(-100.0)


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
