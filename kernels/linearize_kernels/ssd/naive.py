"""The definition, token by token: what every faster form is compared with. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_ssd(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTH: Tensor,
    write_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `ssd`, in the inputs' precision (use fp32 or fp64)."""
    batch, length, heads, width = q_BTHK.shape
    shared = heads // k_BTGK.shape[2]
    k_BTHK, v_BTHV = k_BTGK.repeat_interleave(shared, dim=2), v_BTGV.repeat_interleave(shared, dim=2)
    write_BTH = torch.ones_like(log_decay_BTH) if write_BTH is None else write_BTH
    s_BHKV = state_BHKV if state_BHKV is not None else q_BTHK.new_zeros(batch, heads, width, v_BTGV.shape[-1])
    outputs = []
    for t in range(length):
        if segments_BT is not None and t > 0:
            same_B = segments_BT[:, t] == segments_BT[:, t - 1]
            s_BHKV = s_BHKV.masked_fill(~same_B[:, None, None, None], 0)
        s_BHKV = log_decay_BTH[:, t, :, None, None].exp() * s_BHKV
        s_BHKV = s_BHKV + torch.einsum("bh,bhk,bhv->bhkv", write_BTH[:, t], k_BTHK[:, t], v_BTHV[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), s_BHKV
