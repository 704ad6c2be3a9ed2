"""The definition, quadratic in T: what every faster form is compared with. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_linear_sums(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    log_gate: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """num [B, T, H, V] and den [B, T, H] by the full T x T weights, in the inputs' precision (use fp32 or fp64)."""
    heads, length = q_BTHF.shape[2], q_BTHF.shape[1]
    repeats = heads // k_BTJF.shape[2]
    k_BTHF = k_BTJF.repeat_interleave(repeats, dim=2)
    v_BTHV = v_BTGV.repeat_interleave(heads // v_BTGV.shape[2], dim=2)
    if log_gate is None:
        score_BHTT = torch.einsum("bihf,bjhf->bhij", q_BTHF, k_BTHF)
    else:
        gate_BTHE = (log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1)).repeat_interleave(repeats, dim=2)
        sum_BTHE = gate_BTHE.cumsum(1)
        decay = (sum_BTHE[:, :, None] - sum_BTHE[:, None]).clamp_max(0).exp()
        decay_BTTHF = decay.expand(*decay.shape[:-1], k_BTHF.shape[-1])
        score_BHTT = torch.einsum("bihf,bjhf,bijhf->bhij", q_BTHF, k_BTHF, decay_BTTHF)
    seen = torch.ones(length, length, dtype=torch.bool, device=q_BTHF.device).tril()
    if segments_BT is not None:
        seen = seen & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    score_BHTT = score_BHTT.masked_fill(~seen, 0)
    return torch.einsum("bhij,bjhv->bihv", score_BHTT, v_BTHV), score_BHTT.sum(-1).transpose(1, 2)


def naive_linear_attention(q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    """y = num / den, without decay."""
    num_BTHV, den_BTH = naive_linear_sums(q_BTHF, k_BTJF, v_BTGV, None, segments_BT)
    return num_BTHV / den_BTH.masked_fill(den_BTH == 0, 1).unsqueeze(-1)
