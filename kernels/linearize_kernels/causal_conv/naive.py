"""Definition of causal convolutions, token by token. Legend in __init__.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_causal_conv(
    x_BTXC: Tensor, taps_HCS: Tensor, position_BT: Tensor, tail_BSXC: Tensor | None = None,
    padding_B: Tensor | None = None, shift_HC: Tensor | None = None, activation: str = "none",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B, T, H, C] and the last S - 1 tokens, of one input."""
    batch, length, groups, width = x_BTXC.shape
    heads, _, taps = taps_HCS.shape
    rows, ends = [], []
    for row in range(batch):
        padding = 0 if padding_B is None else int(padding_B[row])
        before_SXC = x_BTXC.new_zeros(taps - 1, groups, width) if tail_BSXC is None else tail_BSXC[row]
        tokens = [*before_SXC.unbind(0), *x_BTXC[row, padding:].unbind(0)]
        outputs = []
        for token in range(length):
            y_HC = torch.zeros(heads, width, dtype=torch.promote_types(x_BTXC.dtype, taps_HCS.dtype))
            y_HC = y_HC.to(x_BTXC.device) if shift_HC is None else y_HC.to(x_BTXC.device) + shift_HC
            for back in range(min(taps, int(position_BT[row, token]) + 1)):
                source_HC = tokens[token - padding + taps - 1 - back].repeat_interleave(heads // groups, dim=0)
                y_HC = y_HC + taps_HCS[..., back] * source_HC
            outputs.append(F.silu(y_HC) if activation == "silu" else y_HC)
        rows.append(torch.stack(outputs))
        last = tokens[len(tokens) - (taps - 1) :]
        ends.append(torch.stack(last) if last else before_SXC)
    return torch.stack(rows), torch.stack(ends)
