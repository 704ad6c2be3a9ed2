"""The definition of the window's sums; for tests. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.windowed_linear_attention.chunk import Sinks, WindowSums


def naive_window_sums(
    q_BTHK: Tensor, k_BMGK: Tensor, v_BMGV: Tensor, position_BT: Tensor, window: int, sinks: Sinks | None = None
) -> WindowSums:
    """The definition, one query and head at a time; for tests."""
    batch, length, heads, _ = q_BTHK.shape
    share = heads // k_BMGK.shape[2]
    past = k_BMGK.shape[1] - length
    num = q_BTHK.new_zeros(batch, length, heads, v_BMGV.shape[-1])
    den, top = q_BTHK.new_zeros(batch, length, heads), q_BTHK.new_zeros(batch, length, heads)
    for b in range(batch):
        for t in range(length):
            position = int(position_BT[b, t])
            back = range(min(window, position + 1))
            for h in range(heads):
                keys = [k_BMGK[b, past + t - r, h // share] for r in back]
                values = [v_BMGV[b, past + t - r, h // share] for r in back]
                if sinks is not None:
                    x = t if sinks.k_BXSGK.shape[1] > 1 else 0
                    old = [s for s in range(sinks.k_BXSGK.shape[2]) if position - s >= window]
                    keys += [sinks.k_BXSGK[b, x, s, h // share] for s in old]
                    values += [sinks.v_BXSGV[b, x, s, h // share] for s in old]
                if not keys:
                    continue
                score = torch.stack(keys) @ q_BTHK[b, t, h]
                top[b, t, h] = score.max()
                weight = (score - score.max()).exp()
                num[b, t, h], den[b, t, h] = weight @ torch.stack(values), weight.sum()
    return WindowSums(num, den, top)
