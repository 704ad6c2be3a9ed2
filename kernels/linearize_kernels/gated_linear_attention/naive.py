"""The definition, quadratic in T: what every faster form is compared with. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.gated_linear_attention.chunk import LinearState


def naive_linear_sums(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    log_gate: Tensor | None = None,
    segments_BT: Tensor | None = None,
    state: LinearState | None = None,
) -> tuple[Tensor, Tensor, LinearState]:
    """num [B, T, H, V], den [B, T, H] and the end state by the full T x T weights, in the inputs' precision."""
    heads, length, key_heads = q_BTHF.shape[2], q_BTHF.shape[1], k_BTJF.shape[2]
    repeats = heads // key_heads
    k_BTHF = k_BTJF.repeat_interleave(repeats, dim=2)
    v_BTHV = v_BTGV.repeat_interleave(heads // v_BTGV.shape[2], dim=2)
    gate_BTHE = q_BTHF.new_zeros(*q_BTHF.shape[:3], 1)
    if log_gate is not None:
        gate_BTHE = (log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1)).repeat_interleave(repeats, dim=2)
    sum_BTHE = gate_BTHE.cumsum(1)
    decay_BTTHE = (sum_BTHE[:, :, None] - sum_BTHE[:, None]).clamp_max(0).exp().to(q_BTHF.dtype)
    if gate_BTHE.shape[-1] == 1:
        score_BHTT = torch.einsum("bihf,bjhf->bhij", q_BTHF, k_BTHF) * decay_BTTHE[..., 0].movedim(3, 1)
    else:
        score_BHTT = torch.einsum("bihf,bjhf,bijhf->bhij", q_BTHF, k_BTHF, decay_BTTHE)
    seen = torch.ones(length, length, dtype=torch.bool, device=q_BTHF.device).tril()
    ends_BT = torch.ones_like(q_BTHF[:, :, 0, 0], dtype=torch.bool)
    starts_BT = ends_BT
    if segments_BT is not None:
        seen = seen & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
        starts_BT, ends_BT = segments_BT == segments_BT[:, :1], segments_BT == segments_BT[:, -1:]
    score_BHTT = score_BHTT.masked_fill(~seen, 0)
    num_BTHV = torch.einsum("bhij,bjhv->bihv", score_BHTT, v_BTHV)
    den_BTH = score_BHTT.sum(-1).transpose(1, 2)
    written_BTHF = k_BTHF * decay_BTTHE[:, -1] * ends_BT[:, :, None, None]
    end_s, end_z = torch.einsum("bjhf,bjhv->bhfv", written_BTHF, v_BTHV), written_BTHF.sum(1)
    if state is not None:
        s_BHFV, z_BHF = (x.to(q_BTHF.dtype).repeat_interleave(repeats, dim=1) for x in state)
        kept_BTHE = sum_BTHE.exp().to(q_BTHF.dtype) * starts_BT[:, :, None, None]
        read_BTHF = q_BTHF * kept_BTHE
        num_BTHV = num_BTHV + torch.einsum("bihf,bhfv->bihv", read_BTHF, s_BHFV)
        den_BTH = den_BTH + torch.einsum("bihf,bhf->bih", read_BTHF, z_BHF)
        end_s, end_z = end_s + kept_BTHE[:, -1].unsqueeze(-1) * s_BHFV, end_z + kept_BTHE[:, -1] * z_BHF
    return num_BTHV, den_BTH, LinearState(end_s[:, ::repeats], end_z[:, ::repeats])


def naive_linear_attention(q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    """y = num / den, without decay."""
    num_BTHV, den_BTH, _ = naive_linear_sums(q_BTHF, k_BTJF, v_BTGV, None, segments_BT)
    return num_BTHV / den_BTH.masked_fill(den_BTH == 0, 1).unsqueeze(-1)
