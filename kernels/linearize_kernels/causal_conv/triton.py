"""Causal convolutions of several inputs in one launch, in Triton.

A program convolves a tile of C tokens and W channels of one input head, for each of the R output heads that read it.
Tokens before the first real one are read from the tail, where it lies. Legend in __init__.py.

SHAPES holds, for each input, its heads X, R, channels, and whether it has a shift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize_kernels.tiles import places


@triton.jit
def load_tokens(x, tail, first, x_token, tail_token, padding, length, column, width, S: tl.constexpr, C: tl.constexpr,
                STARTED: tl.constexpr):  # fmt: skip
    """Tile [C, W] of real tokens from `first` on; the tail stands before the first real one. 0 outside."""
    row = first + tl.arange(0, C)
    inside = (column < width)[None, :]
    real = ((row >= padding) & (row < length))[:, None] & inside
    tile = tl.load(x + row.to(tl.int64)[:, None] * x_token + column[None, :], mask=real, other=0.0)
    if STARTED:  # noqa: SIM102 (known when compiling; the next is not)
        if first < padding:
            place = row - padding + (S - 1)
            earlier = ((row < padding) & (place >= 0))[:, None] & inside
            at = tail + place.to(tl.int64)[:, None] * tail_token + column[None, :]
            tile = tl.where(earlier, tl.load(at, mask=earlier, other=0.0), tile)
    return tile


@triton.jit
def load_channels(base, column, width, stride: tl.constexpr):
    """[1, W] fp32 numbers, one per channel."""
    return tl.load(base + column * stride, mask=column < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def seen(tile, positions, back):
    """The tile in fp32, without the tokens that are `back` before their document's start."""
    return tl.where((positions >= back)[:, None], tile.to(tl.float32), 0.0)


@triton.jit
def convolve_head(x, taps, shift, tail, y, end, x_token, positions, b, g, column, first, padding, length,
                  X: tl.constexpr, R: tl.constexpr, width: tl.constexpr, SHIFTED: tl.constexpr, S: tl.constexpr,
                  C: tl.constexpr, STARTED: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    row = first + tl.arange(0, C)
    inside = (row < length)[:, None] & (column < width)[None, :]
    tail += (b * (S - 1) * X + g) * width
    for r in range(R):
        h = g * R + r
        total = tl.zeros((C, column.shape[0]), tl.float32)
        for back in tl.static_range(S):
            tile = load_tokens(x, tail, first - back, x_token, X * width, padding, length, column, width, S, C, STARTED)
            total += seen(tile, positions, back) * load_channels(taps + h * width * S + back, column, width, S)
        if SHIFTED:
            total += load_channels(shift + h * width, column, width, 1)
        if SILU:
            total = total * tl.sigmoid(total)
        place = y + ((b * length + row)[:, None] * (X * R) + h) * width + column[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=inside)
    if first + C >= length:
        for number in tl.static_range(S - 1):
            token = length - (S - 1) + number
            tile = load_tokens(x, tail, token, x_token, X * width, padding, length, column, width, S, 1, STARTED)
            place = end + ((b * (S - 1) + number) * X + g) * width + column[None, :]
            tl.store(place, tile, mask=(column < width)[None, :])


@triton.jit
def convolve(x_1, x_2, x_3, taps_1, taps_2, taps_3, shift_1, shift_2, shift_3, tail_1, tail_2, tail_3, position,
             padding, y_1, y_2, y_3, end_1, end_2, end_3, batch_1, token_1, head_1, batch_2, token_2, head_2, batch_3,
             token_3, head_3, length, tiles, SHAPES: tl.constexpr, S: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
             COLUMNS: tl.constexpr, STARTED: tl.constexpr, POSITIONED: tl.constexpr, PADDED: tl.constexpr,
             SILU: tl.constexpr):  # fmt: skip
    """Outputs and new tails. Grid: B rows, `tiles` tiles of tokens, COLUMNS tiles of channels of all inputs' heads."""
    xs, taps, shifts = (x_1, x_2, x_3), (taps_1, taps_2, taps_3), (shift_1, shift_2, shift_3)
    tails, ys, ends = (tail_1, tail_2, tail_3), (y_1, y_2, y_3), (end_1, end_2, end_3)
    batches, tokens, heads = (batch_1, batch_2, batch_3), (token_1, token_2, token_3), (head_1, head_2, head_3)
    own = tl.program_id(0) % COLUMNS
    tile = tl.program_id(0) // COLUMNS
    b = (tile // tiles).to(tl.int64)
    first = tile % tiles * C
    before = 0
    if PADDED:
        before = tl.load(padding + b).to(tl.int32)
    positions = places(position + b * length, first, length, C, POSITIONED)
    start = 0
    for i in tl.static_range(len(SHAPES)):
        blocks = (SHAPES[i][2] + W - 1) // W
        if (own >= start) & (own < start + SHAPES[i][0] * blocks):
            g = ((own - start) // blocks).to(tl.int64)
            column = (own - start) % blocks * W + tl.arange(0, W)
            x = xs[i] + b * batches[i] + g * heads[i]
            convolve_head(x, taps[i], shifts[i], tails[i], ys[i], ends[i], tokens[i], positions, b, g, column, first,
                          before, length, SHAPES[i][0], SHAPES[i][1], SHAPES[i][2], SHAPES[i][3], S, C, STARTED,
                          SILU)  # fmt: skip
        start += SHAPES[i][0] * blocks


@triton.jit
def gradients_of_head(x, taps, shift, tail, dy, d_end, dx, d_tail, share, x_token, position, b, g, column, first,
                      padding, length, X: tl.constexpr, R: tl.constexpr, width: tl.constexpr, SHIFTED: tl.constexpr,
                      S: tl.constexpr, C: tl.constexpr, STARTED: tl.constexpr, POSITIONED: tl.constexpr,
                      ENDED: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Of the tokens from `first` on and of their share of the taps; tile n of `sources` lies n - (S - 1) ahead."""
    row = first + tl.arange(0, C)
    inside = (column < width)[None, :]
    tail += (b * (S - 1) * X + g) * width
    sources = ()
    for number in tl.static_range(2 * S - 1 if SILU else S):
        token = first + number - (S - 1)
        tile = load_tokens(x, tail, token, x_token, X * width, padding, length, column, width, S, C, STARTED)
        sources += (tile,)  # type: ignore[assignment]
    total = tl.zeros((C, column.shape[0]), tl.float32)
    for r in range(R):
        h = g * R + r
        for ahead in tl.static_range(S):
            positions = places(position, first + ahead, length, C, POSITIONED)
            later = row + ahead
            at = dy + ((b * length + later)[:, None] * (X * R) + h) * width + column[None, :]
            one = tl.load(at, mask=((later >= 0) & (later < length))[:, None] & inside, other=0.0).to(tl.float32)
            if SILU:
                y = tl.zeros((C, column.shape[0]), tl.float32)
                for back in tl.static_range(S):
                    tap = load_channels(taps + h * width * S + back, column, width, S)
                    y += seen(sources[S - 1 + ahead - back], positions, back) * tap
                if SHIFTED:
                    y += load_channels(shift + h * width, column, width, 1)
                gate = tl.sigmoid(y)
                one *= gate * (1.0 + y * (1.0 - gate))
            total += seen(one, positions, ahead) * load_channels(taps + h * width * S + ahead, column, width, S)
            if ahead == 0:
                for back in tl.static_range(S):
                    part = tl.sum(one * seen(sources[S - 1 - back], positions, back), 0)
                    tl.store(share + (h * width + column) * S + back, part, mask=column < width)
                if SHIFTED:
                    tl.store(share + X * R * width * S + h * width + column, tl.sum(one, 0), mask=column < width)
    if ENDED:
        place = row - length + (S - 1)
        kept = ((place >= 0) & (row < length))[:, None] & inside
        at = d_end + ((b * (S - 1) + place)[:, None] * X + g) * width + column[None, :]
        total += tl.load(at, mask=kept, other=0.0).to(tl.float32)
    at = dx + ((b * length + row)[:, None] * X + g) * width + column[None, :]
    found = tl.where((row >= padding)[:, None], total, 0.0).to(dx.dtype.element_ty)
    tl.store(at, found, mask=((row >= 0) & (row < length))[:, None] & inside)
    if STARTED:
        place = row - padding + (S - 1)
        at = d_tail + ((b * (S - 1) + place)[:, None] * X + g) * width + column[None, :]
        tl.store(at, total.to(d_tail.dtype.element_ty), mask=((place >= 0) & (row < padding))[:, None] & inside)


@triton.jit
def convolve_gradients(x_1, x_2, x_3, taps_1, taps_2, taps_3, shift_1, shift_2, shift_3, tail_1, tail_2, tail_3,
                       position, padding, dy_1, dy_2, dy_3, d_end_1, d_end_2, d_end_3, dx_1, dx_2, dx_3, d_tail_1,
                       d_tail_2, d_tail_3, shares, batch_1, token_1, head_1, batch_2, token_2, head_2, batch_3, token_3,
                       head_3, length, tiles, SHAPES: tl.constexpr, S: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
                       COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, STARTED: tl.constexpr, POSITIONED: tl.constexpr,
                       PADDED: tl.constexpr, ENDED: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Gradients of inputs and tails, and each tile's share of those of taps and shifts, [B * tiles, WEIGHTS].

    Grid as above; with tails, the tiles begin S - 1 tokens before the first.
    """
    xs, taps, shifts = (x_1, x_2, x_3), (taps_1, taps_2, taps_3), (shift_1, shift_2, shift_3)
    tails, dys, d_ends = (tail_1, tail_2, tail_3), (dy_1, dy_2, dy_3), (d_end_1, d_end_2, d_end_3)
    dxs, d_tails = (dx_1, dx_2, dx_3), (d_tail_1, d_tail_2, d_tail_3)
    batches, tokens, heads = (batch_1, batch_2, batch_3), (token_1, token_2, token_3), (head_1, head_2, head_3)
    own = tl.program_id(0) % COLUMNS
    tile = tl.program_id(0) // COLUMNS
    b = (tile // tiles).to(tl.int64)
    first = tile % tiles * C
    if STARTED:
        first -= S - 1
    before = 0
    if PADDED:
        before = tl.load(padding + b).to(tl.int32)
    share = shares + tile.to(tl.int64) * WEIGHTS
    start = 0
    weights = 0
    for i in tl.static_range(len(SHAPES)):
        blocks = (SHAPES[i][2] + W - 1) // W
        if (own >= start) & (own < start + SHAPES[i][0] * blocks):
            g = ((own - start) // blocks).to(tl.int64)
            column = (own - start) % blocks * W + tl.arange(0, W)
            x = xs[i] + b * batches[i] + g * heads[i]
            gradients_of_head(x, taps[i], shifts[i], tails[i], dys[i], d_ends[i], dxs[i], d_tails[i], share + weights,
                              tokens[i], position + b * length, b, g, column, first, before, length, SHAPES[i][0],
                              SHAPES[i][1], SHAPES[i][2], SHAPES[i][3], S, C, STARTED, POSITIONED, ENDED,
                              SILU)  # fmt: skip
        start += SHAPES[i][0] * blocks
        weights += SHAPES[i][0] * SHAPES[i][1] * SHAPES[i][2] * (S + SHAPES[i][3])
