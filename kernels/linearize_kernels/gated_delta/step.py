"""One decoding step: decay the state, correct it under the key, read it once. Legend in __init__.py."""

from __future__ import annotations

from torch import Tensor


def step_gated_delta_rule(
    q_B1HK: Tensor, k_B1JK: Tensor, v_B1JV: Tensor, log_decay_B1J: Tensor, beta_B1J: Tensor, state_BJKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence itself. Same arguments and results as `gated_delta_rule`, for one token."""
    dtype = state_BJKV.dtype
    batch, _, heads, width = q_B1HK.shape
    k_BJ1K = k_B1JK.to(dtype).transpose(1, 2)
    v_BJ1V = v_B1JV.to(dtype).transpose(1, 2)
    decay_BJ11 = log_decay_B1J.to(dtype).exp().transpose(1, 2).unsqueeze(-1)
    beta_BJ11 = beta_B1J.to(dtype).transpose(1, 2).unsqueeze(-1)
    u_BJ1V = beta_BJ11 * (v_BJ1V - decay_BJ11 * (k_BJ1K @ state_BJKV))
    s_BJKV = decay_BJ11 * state_BJKV + k_BJ1K.transpose(-1, -2) * u_BJ1V
    q_BJPK = q_B1HK.to(dtype).view(batch, state_BJKV.shape[1], -1, width)
    return (q_BJPK @ s_BJKV).reshape(batch, 1, heads, -1).to(v_B1JV.dtype), s_BJKV
