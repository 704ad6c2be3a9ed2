"""Depthwise causal convolutions over time with a few taps.

Shape legend: B batch, T tokens, X input heads, H output heads (H = X * R), C channels, S taps. In Triton: C tokens of a
tile, W channels of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.causal_conv.chunk import causal_conv, chunk_causal_convs

__all__ = ["causal_conv", "causal_convs"]

MAX_TAPS = 4
"""More taps run in torch."""


def causal_convs(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position_BT: Tensor | None,
    tails: Sequence[Tensor] | None = None,
    padding_B: Tensor | None = None,
    *,
    shifts: Sequence[Tensor | None] | None = None,
    activation: Literal["none", "silu"] = "none",
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """y_t = activation(sum_s taps_s x_t-s + shift), over the tokens of t's own document only, of one to three inputs.

    Args:
        xs: tokens [B, T, X, C] of each input; heads and channels may differ.
        taps: filters [H, C, S] of each; tap 0 belongs to the current token. With H > X, head h filters input head
            h // (H // X).
        position_BT: index of each token in its document; -1 for padding. A token at position p sees p tokens back.
            None = 0, 1, 2, ..., without tails.
        tails: the last S - 1 tokens [B, S - 1, X, C] before the first, of each input, as returned; None at the start.
        padding_B: how many tokens at each row's left are padding: the tail stands after them. None = none anywhere.
        shifts: [H, C] of each, or None.
        dtype: of the outputs; None = the promoted dtype of x and taps.

    Returns:
        outputs [B, T, H, C], and the last S - 1 tokens in the dtype of x, zeros before the first.
    """
    assert position_BT is not None or tails is None
    if taps[0].shape[-1] <= MAX_TAPS and uses_triton("causal_conv", xs[0]):
        from linearize_kernels.causal_conv.launch import convolve_together

        return convolve_together(xs, taps, position_BT, tails, padding_B, shifts, activation == "silu", dtype)
    return chunk_causal_convs(xs, taps, position_BT, tails, padding_B, shifts, activation, dtype)
