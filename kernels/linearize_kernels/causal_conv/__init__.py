"""Depthwise causal convolution over time with a short kernel.

Shape legend: B batch, T tokens, X input heads, H output heads (H = X * R), C channels, S taps.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["causal_conv"]


def causal_conv(x_BMXC: Tensor, taps_HCS: Tensor, position_BT: Tensor) -> Tensor:
    """y_t = sum_s taps_s x_t-s, over the tokens of t's own document only.

    Args:
        x_BMXC: the last S - 1 tokens before the first (anything, where there were none) and the T tokens themselves:
            M = S - 1 + T.
        taps_HCS: filters; tap 0 belongs to the current token. With H > X, head h filters input head h // (H // X).
        position_BT: index of each token in its document; -1 for padding. A token at position p sees p tokens back.

    Returns:
        [B, T, H, C] in the promoted dtype of x and taps.
    """
    heads, _, taps = taps_HCS.shape
    length, groups = position_BT.shape[1], x_BMXC.shape[2]
    assert x_BMXC.shape[1] == taps - 1 + length, (x_BMXC.shape, taps, length)
    taps_XRCS = taps_HCS.unflatten(0, (groups, heads // groups))
    y_BTXRC = None
    for back in range(taps):
        x_BTXC = x_BMXC[:, taps - 1 - back : taps - 1 - back + length]
        x_BTXC = x_BTXC.masked_fill((position_BT < back)[:, :, None, None], 0)  # here, so that NaN reaches no gradient
        term = x_BTXC.unsqueeze(3) * taps_XRCS[..., back]
        y_BTXRC = term if y_BTXRC is None else y_BTXRC + term
    assert y_BTXRC is not None
    return y_BTXRC.flatten(2, 3)
