"""State space duality, the sequence map of Mamba-2 (arXiv 2405.21060): a state with one decay per head and token.

    S_t = exp(log_decay_t) S_t-1 + write_t k_t v_t^T ;  o_t = S_t^T q_t

Linear attention without a normaliser; in Mamba's words C = q, B = k, x = v, write = dt, log_decay = dt A.

Shape legend: B batch, T tokens, H query heads, one state each, G key/value heads (H = G * P: query head h reads key and
value head h // P), K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_linear_attention import LinearState, contiguous, linear_sums, unit
from linearize_kernels.ssd.chunk import chunk_ssd
from linearize_kernels.ssd.step import step_ssd

__all__ = ["ssd"]

FORGOTTEN = -30.0
"""Log decays are cut here in Triton, where they enter as differences of sums: e^-30 is below what fp32 resolves."""


def ssd(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTH: Tensor,
    write_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention, in linear time and memory. Keys and values are not repeated over query heads.

    Args:
        q_BTHK: queries (C). No scaling is applied.
        k_BTGK: keys (B). A token with k = 0 and log_decay = 0 does not exist (padding).
        v_BTGV: values (x).
        log_decay_BTH: log of the decay applied before the token is written, <= 0; -inf forgets everything.
        write_BTH: what the written k v^T is multiplied with (dt); None = 1.
        state_BHKV: what an earlier call returned; None at the start.
        segments_BT: document number of each token, non-decreasing along T. Tokens of different documents do not see
            each other. Only without `state_BHKV`.

    Returns:
        o [B, T, H, V] and the state [B, H, K, V] after the last token, both fp32 (fp64 for fp64). In Triton q and k are
        read in the dtype of v.
    """
    assert state_BHKV is None or segments_BT is None, "packed rows start from no state"
    assert k_BTGK.shape[:3] == v_BTGV.shape[:3], "G heads each"
    assert q_BTHK.shape[2] % k_BTGK.shape[2] == 0, (q_BTHK.shape, k_BTGK.shape)
    assert q_BTHK.shape[:3] == log_decay_BTH.shape, (q_BTHK.shape, log_decay_BTH.shape)
    if uses_triton("ssd", v_BTGV, q_BTHK.shape[-1], v_BTGV.shape[-1]):
        return _in_triton(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, write_BTH, state_BHKV, segments_BT)
    if state_BHKV is None:
        batch, _, heads, width = q_BTHK.shape
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        state_BHKV = q_BTHK.new_zeros(batch, heads, width, v_BTGV.shape[-1], dtype=dtype)
    if q_BTHK.shape[1] == 1:
        return step_ssd(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, write_BTH, state_BHKV)
    return chunk_ssd(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, write_BTH, state_BHKV, segments_BT)


def _in_triton(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, log_decay_BTH: Tensor, write_BTH: Tensor | None,
    state_BHKV: Tensor | None, segments_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear attention whose denominator nobody asks for; the writing strengths go into the keys."""
    from linearize_kernels.gated_linear_attention.launch import walk

    shared = q_BTHK.shape[2] // k_BTGK.shape[2]
    if write_BTH is not None:
        k_BTGK = k_BTGK.repeat_interleave(shared, dim=2) * write_BTH.unsqueeze(-1)
    log_decay_BTH = log_decay_BTH.clamp_min(FORGOTTEN)
    z_BHK = None if state_BHKV is None else state_BHKV.new_zeros(state_BHKV.shape[:3])
    if state_BHKV is not None and z_BHK is not None and q_BTHK.shape[1] == 1:
        if write_BTH is None:
            k_BTGK = k_BTGK.repeat_interleave(shared, dim=2)
        state = LinearState(state_BHKV, z_BHK)
        num_B1HV, _, end = linear_sums(q_BTHK, k_BTGK, v_BTGV, log_decay_BTH, state)
        return num_B1HV, end.s_BJFV
    dtype = v_BTGV.dtype
    num_BTHV, _, end_s, _, _, _ = walk(
        unit(q_BTHK.to(dtype)), unit(k_BTGK.to(dtype)), unit(v_BTGV), log_decay_BTH.contiguous(), None,
        contiguous(segments_BT), None, None, None, None, None, None, contiguous(state_BHKV), z_BHK,
        "none", False, 0.0, 0, 0, True,
    )  # fmt: skip
    return num_BTHV, end_s
