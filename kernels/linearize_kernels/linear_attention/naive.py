"""The definition, quadratic in T: what every faster form is compared with. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_linear_attention(q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    """y [B, T, H, V] by the full T x T weight matrix, in the inputs' precision (use fp32 or fp64)."""
    heads, length = q_BTHF.shape[2], q_BTHF.shape[1]
    k_BTHF = k_BTJF.repeat_interleave(heads // k_BTJF.shape[2], dim=2)
    v_BTHV = v_BTGV.repeat_interleave(heads // v_BTGV.shape[2], dim=2)
    score_BHTT = torch.einsum("bihf,bjhf->bhij", q_BTHF, k_BTHF)
    seen = torch.ones(length, length, dtype=torch.bool, device=q_BTHF.device).tril()
    if segments_BT is not None:
        seen = seen & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    score_BHTT = score_BHTT.masked_fill(~seen, 0)
    den_BHT1 = score_BHTT.sum(-1, keepdim=True).clamp_min(torch.finfo(score_BHTT.dtype).tiny)
    return torch.einsum("bhij,bjhv->bihv", score_BHTT / den_BHT1, v_BTHV)
