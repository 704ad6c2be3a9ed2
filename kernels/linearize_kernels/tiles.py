"""Pieces that the Triton kernels share.

Shape legend of the kernels: C tokens of a chunk, K head width, F features of one tile, V value width (powers of two,
at least the real sizes), N splits of the sequence that are walked in parallel. Addresses are int64 wherever a batch, a
head or a token is counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))
"""The log of 0."""


@triton.jit
def load_rows(base, first, stride, length, width, C: tl.constexpr, X: tl.constexpr):
    """Tile [C, X] of a [length, width] matrix from row `first` on; 0 outside."""
    row = first + tl.arange(0, C)
    column = tl.arange(0, X)
    inside = ((row >= 0) & (row < length))[:, None]
    if width != X:
        inside = inside & (column < width)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, first, stride, length, width, C: tl.constexpr, X: tl.constexpr):
    """Write a tile [C, X] into a [length, width] matrix from row `first` on, as far as it reaches."""
    row = first + tl.arange(0, C)
    column = tl.arange(0, X)
    inside = ((row >= 0) & (row < length))[:, None]
    if width != X:
        inside = inside & (column < width)[None, :]
    place = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_column(base, first, stride, length, C: tl.constexpr):
    """[C] fp32 numbers, one per token from `first` on; 0 outside."""
    row = first + tl.arange(0, C)
    inside = (row >= 0) & (row < length)
    return tl.load(base + row.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_column(base, column, first, stride, length, C: tl.constexpr):
    row = first + tl.arange(0, C)
    tl.store(base + row.to(tl.int64) * stride, column.to(base.dtype.element_ty), mask=(row >= 0) & (row < length))


@triton.jit
def load_matrix(base, row_stride, column_stride, rows, columns, R: tl.constexpr, X: tl.constexpr):
    """A [rows, columns] matrix, padded with 0."""
    row = tl.arange(0, R)
    column = tl.arange(0, X)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(base + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def store_matrix(base, tile, row_stride, column_stride, rows, columns, R: tl.constexpr, X: tl.constexpr):
    row = tl.arange(0, R)
    column = tl.arange(0, X)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = base + row[:, None] * row_stride + column[None, :] * column_stride
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(base, size, X: tl.constexpr):
    at = tl.arange(0, X)
    return tl.load(base + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def store_vector(base, vector, size, X: tl.constexpr):
    at = tl.arange(0, X)
    tl.store(base + at, vector, mask=at < size)


@triton.jit
def key_flags(mask, first, start, length, C: tl.constexpr, MASKED: tl.constexpr):
    """Which tokens from `first` on have a key, [C]; none before token `start` has."""
    token = first + tl.arange(0, C)
    real = (token >= start) & (token < length)
    if MASKED:
        real = real & (tl.load(mask + token, mask=real, other=0) != 0)
    return real


@triton.jit
def documents(segments, first, length, C: tl.constexpr, PACKED: tl.constexpr):
    """Document of each token from `first` on, [C]; the last token's behind the end."""
    if PACKED:
        own = tl.load(segments + tl.minimum(first + tl.arange(0, C), length - 1))
    else:
        own = tl.zeros((C,), tl.int64)
    return own


@triton.jit
def document(segments, token, length, PACKED: tl.constexpr):
    """Document of one token; the nearest token's outside."""
    if PACKED:
        own = tl.load(segments + tl.minimum(tl.maximum(token, 0), length - 1))
    else:
        own = tl.full((), 0, tl.int64)
    return own


@triton.jit
def places(position, first, length, C: tl.constexpr, POSITIONED: tl.constexpr):
    """Index of each token in its document, [C] int32; -1 where there is none."""
    token = first + tl.arange(0, C)
    inside = (token >= 0) & (token < length)
    if POSITIONED:
        place = tl.load(position + token, mask=inside, other=-1).to(tl.int32)
    else:
        place = tl.where(inside, token, -1)
    return place
