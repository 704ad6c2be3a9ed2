"""The definition, token by token: what every faster form is compared with. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    log_decay_BTJ: Tensor,
    beta_BTJ: Tensor,
    state_BJKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `gated_delta_rule`, in the inputs' precision (use fp32 or fp64)."""
    batch, length, heads, width = k_BTJK.shape
    shared = q_BTHK.shape[2] // heads
    s_BJKV = state_BJKV if state_BJKV is not None else k_BTJK.new_zeros(batch, heads, width, v_BTJV.shape[-1])
    outputs = []
    for t in range(length):
        if segments_BT is not None and t > 0:
            same_B = segments_BT[:, t] == segments_BT[:, t - 1]
            s_BJKV = s_BJKV.masked_fill(~same_B[:, None, None, None], 0)
        s_BJKV = log_decay_BTJ[:, t, :, None, None].exp() * s_BJKV
        stored_BJV = torch.einsum("bjkv,bjk->bjv", s_BJKV, k_BTJK[:, t])
        u_BJV = beta_BTJ[:, t, :, None] * (v_BTJV[:, t] - stored_BJV)
        s_BJKV = s_BJKV + torch.einsum("bjk,bjv->bjkv", k_BTJK[:, t], u_BJV)
        s_BHKV = s_BJKV.repeat_interleave(shared, dim=1)
        outputs.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), s_BJKV
