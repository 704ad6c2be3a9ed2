"""Rotation of a tile of tokens of one query or key head, in Triton. Legend in __init__.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_heads(q, k, cos, sin, q_out, k_out, scale, q_batch, q_token, q_head, k_batch, k_token, k_head,
                 cos_batch, cos_token, sin_batch, sin_token, length, tiles, H: tl.constexpr, G: tl.constexpr,
                 width: tl.constexpr, rotated: tl.constexpr, P: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
                 BACK: tl.constexpr):  # fmt: skip
    """Program (tile of a row's tokens, head); key heads follow the query heads. BACK turns the other way."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * C
    head = tl.program_id(1)
    x, out, count = q + b * q_batch + head * q_head, q_out, H
    token, factor = q_token, scale
    if head >= H:
        head = head - H
        x, out, count = k + b * k_batch + head * k_head, k_out, G
        token, factor = k_token, scale * 0 + 1
    row = first + tl.arange(0, C)
    row_64 = row.to(tl.int64)[:, None]
    half: tl.constexpr = rotated // 2
    channel = tl.arange(0, P)
    inside = (row < length)[:, None] & (channel < half)[None, :]
    at = x + row_64 * token + channel[None, :]
    low, high = tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    turn = row_64 * cos_token + channel[None, :] + b * cos_batch
    lean = row_64 * sin_token + channel[None, :] + b * sin_batch
    cos_low, cos_high = tl.load(cos + turn, mask=inside, other=0.0), tl.load(cos + turn + half, mask=inside, other=0.0)
    sin_low, sin_high = tl.load(sin + lean, mask=inside, other=0.0), tl.load(sin + lean + half, mask=inside, other=0.0)
    cos_low, cos_high = cos_low.to(tl.float32), cos_high.to(tl.float32)
    sin_low, sin_high = sin_low.to(tl.float32), sin_high.to(tl.float32)
    if BACK:  # the transposed rotation
        sin_low, sin_high = -sin_high, -sin_low
    place = out + ((b * length + row_64) * count + head) * width + channel[None, :]
    tl.store(place, ((low * cos_low - high * sin_low) * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(place + half, ((high * cos_high + low * sin_high) * factor).to(out.dtype.element_ty), mask=inside)
    if rotated < width:
        rest = tl.arange(0, K)
        kept = (row < length)[:, None] & ((rest >= rotated) & (rest < width))[None, :]
        same = tl.load(x + row_64 * token + rest[None, :], mask=kept, other=0.0).to(tl.float32) * factor
        place = out + ((b * length + row_64) * count + head) * width + rest[None, :]
        tl.store(place, same.to(out.dtype.element_ty), mask=kept)
