"""Gated delta rule (arXiv 2412.06464): a state that decays, and that corrects what it holds under a key.

    S <- exp(log_decay_t) S ;  u_t = beta_t (v_t - S^T k_t) ;  S <- S + k_t u_t^T ;  o_t = S^T q_t

Shape legend: B batch, T tokens, H query heads, J state heads (H = J * P: query head h reads state head h // P),
K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_delta.chunk import chunk_gated_delta_rule
from linearize_kernels.gated_delta.step import step_gated_delta_rule
from linearize_kernels.gated_linear_attention import contiguous, unit

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    log_decay_BTJ: Tensor,
    beta_BTJ: Tensor,
    state_BJKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal gated delta rule, in linear time and memory.

    Keys, values and gates come with J heads, one state each; the query heads of a group share it (J = key/value heads
    of a grouped-query model; J = H for the form without groups).

    Args:
        q_BTHK: queries. No scaling is applied.
        k_BTJK: keys. The rule is stable where beta |k|^2 <= 2, so callers give them length 1. A token with k = 0,
            beta = 0 and log_decay = 0 does not exist (padding).
        v_BTJV: values.
        log_decay_BTJ: log of the decay applied before the token is written, <= 0; -inf forgets everything.
        beta_BTJ: writing strength, 0 to 2.
        state_BJKV: what an earlier call returned; None at the start.
        segments_BT: document number of each token, non-decreasing along T. Tokens of different documents do not see
            each other. Only without `state_BJKV`.

    Returns:
        o [B, T, H, V] in the dtype of v, and the state [B, J, K, V] after the last token. All sums run in fp32 (fp64
        for fp64).
    """
    assert state_BJKV is None or segments_BT is None, "packed rows start from no state"
    assert k_BTJK.shape[:3] == v_BTJV.shape[:3] == log_decay_BTJ.shape == beta_BTJ.shape, "J heads each"
    assert q_BTHK.shape[2] % k_BTJK.shape[2] == 0, (q_BTHK.shape, k_BTJK.shape)
    if uses_triton("gated_delta_rule", v_BTJV, q_BTHK.shape[-1], v_BTJV.shape[-1]):
        return _in_triton(q_BTHK, k_BTJK, v_BTJV, log_decay_BTJ, beta_BTJ, state_BJKV, segments_BT)
    if q_BTHK.shape[1] == 1:
        if state_BJKV is None:
            batch, _, heads, width = k_BTJK.shape
            dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
            state_BJKV = k_BTJK.new_zeros(batch, heads, width, v_BTJV.shape[-1], dtype=dtype)
        return step_gated_delta_rule(q_BTHK, k_BTJK, v_BTJV, log_decay_BTJ, beta_BTJ, state_BJKV)
    return chunk_gated_delta_rule(q_BTHK, k_BTJK, v_BTJV, log_decay_BTJ, beta_BTJ, state_BJKV, segments_BT)


def _in_triton(
    q_BTHK: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, log_decay_BTJ: Tensor, beta_BTJ: Tensor,
    state_BJKV: Tensor | None, segments_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries and keys come in the dtype of v, except to the step, which multiplies nothing in matrix units."""
    from linearize_kernels.gated_delta.launch import delta
    from linearize_kernels.gated_delta.triton_step import step

    log_decay_BTJ, beta_BTJ = log_decay_BTJ.float().contiguous(), beta_BTJ.float().contiguous()
    state_BJKV = None if state_BJKV is None else state_BJKV.float().contiguous()
    given = (q_BTHK, k_BTJK, v_BTJV, log_decay_BTJ, beta_BTJ, state_BJKV)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if q_BTHK.shape[1] == 1 and state_BJKV is not None and not differentiated:
        o_B1HV, end_BJKV = step(unit(q_BTHK), unit(k_BTJK), unit(v_BTJV), log_decay_BTJ, beta_BTJ, state_BJKV)
        return o_B1HV, end_BJKV
    q_BTHK, k_BTJK = q_BTHK.to(v_BTJV.dtype), k_BTJK.to(v_BTJV.dtype)
    gates = (log_decay_BTJ, beta_BTJ, state_BJKV, contiguous(segments_BT))
    o_BTHV, end_BJKV, *_ = delta(unit(q_BTHK), unit(k_BTJK), unit(v_BTJV), *gates)
    return o_BTHV, end_BJKV
