"""Causal convolutions in torch: a sum of shifted inputs. Legend in __init__.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x_BMXC: Tensor, taps_HCS: Tensor, position_BT: Tensor | None) -> Tensor:
    """y_t = sum_s taps_s x_t-s, over the tokens of t's own document only.

    Args:
        x_BMXC: the last S - 1 tokens before the first (anything, where there were none) and the T tokens themselves:
            M = S - 1 + T.
        taps_HCS: filters; tap 0 belongs to the current token. With H > X, head h filters input head h // (H // X).
        position_BT: index of each token in its document; -1 for padding. A token at position p sees p tokens back.
            None: all of them.

    Returns:
        [B, T, H, C] in the promoted dtype of x and taps.
    """
    heads, _, taps = taps_HCS.shape
    length, groups = x_BMXC.shape[1] - (taps - 1), x_BMXC.shape[2]
    assert position_BT is None or position_BT.shape[1] == length, (x_BMXC.shape, taps, position_BT.shape)
    taps_XRCS = taps_HCS.unflatten(0, (groups, heads // groups))
    y_BTXRC = None
    for back in range(taps):
        x_BTXC = x_BMXC[:, taps - 1 - back : taps - 1 - back + length]
        if position_BT is not None:  # here, so that NaN reaches no gradient
            x_BTXC = x_BTXC.masked_fill((position_BT < back)[:, :, None, None], 0)
        term = x_BTXC.unsqueeze(3) * taps_XRCS[..., back]
        y_BTXRC = term if y_BTXRC is None else y_BTXRC + term
    assert y_BTXRC is not None
    return y_BTXRC.flatten(2, 3)


def chunk_causal_convs(
    xs: Sequence[Tensor], taps: Sequence[Tensor], position_BT: Tensor | None, tails: Sequence[Tensor] | None,
    padding_B: Tensor | None, shifts: Sequence[Tensor | None] | None, activation: str, dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """`causal_convs`, one input after the other."""
    found, ends = [], []
    for number, (x_BTXC, taps_HCS) in enumerate(zip(xs, taps, strict=True)):
        past, shift_HC = taps_HCS.shape[-1] - 1, None if shifts is None else shifts[number]
        x_BMXC = _join(None if tails is None else tails[number], x_BTXC, past, padding_B)
        y_BTHC = causal_conv(x_BMXC, taps_HCS, position_BT)
        y_BTHC = y_BTHC if shift_HC is None else y_BTHC + shift_HC
        y_BTHC = F.silu(y_BTHC) if activation == "silu" else y_BTHC
        found.append(y_BTHC if dtype is None else y_BTHC.to(dtype))
        ends.append(x_BMXC[:, x_BTXC.shape[1] :].clone())
    return found, ends


def _join(tail_BSXC: Tensor | None, x_BTXC: Tensor, past: int, padding_B: Tensor | None) -> Tensor:
    """A row's padding, then its tail (zeros if there is none), then its real tokens: [B, past + T, X, C]."""
    batch, length = x_BTXC.shape[:2]
    if tail_BSXC is None:
        tail_BSXC = x_BTXC.new_zeros(batch, past, *x_BTXC.shape[2:])
    joined = torch.cat([tail_BSXC.to(x_BTXC.dtype), x_BTXC], dim=1)
    if padding_B is None:
        return joined
    place, padding_B1 = torch.arange(past + length, device=x_BTXC.device), padding_B[:, None]
    in_tail = torch.where(place < padding_B1 + past, place - padding_B1, place)
    source = torch.where(place < padding_B1, place + past, in_tail)
    return joined.gather(1, source[:, :, None, None].expand(-1, -1, *x_BTXC.shape[2:]))
