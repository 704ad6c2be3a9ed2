"""One decoding step: update the running sums, read them once. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.linear_attention.chunk import LinearState


def step_linear_attention(
    q_B1HF: Tensor, k_B1JF: Tensor, v_B1GV: Tensor, state: LinearState
) -> tuple[Tensor, LinearState]:
    """The recurrent form: S += k v^T, z += k, y = q S / q z. Same arguments and results as `linear_attention`."""
    batch, _, heads, features = q_B1HF.shape
    value_heads, width = v_B1GV.shape[2:]
    shared = k_B1JF.shape[2] // value_heads  # key heads per value head
    dtype = state.s_BJFV.dtype
    k_BGMF = k_B1JF.to(dtype).view(batch, value_heads, shared, features)
    v_BG1V = v_B1GV.to(dtype).view(batch, value_heads, 1, width)
    outer = (k_BGMF.reshape(batch, value_heads, shared * features, 1) * v_BG1V).view_as(state.s_BJFV)
    s_BJFV = state.s_BJFV + outer
    z_BJF = state.z_BJF + k_B1JF.to(dtype)[:, 0]
    q_BJPF = q_B1HF.to(dtype).view(batch, value_heads * shared, -1, features)
    num_BJPV = q_BJPF @ s_BJFV
    den_BJP1 = q_BJPF @ z_BJF.unsqueeze(-1)
    y_BJPV = num_BJPV / den_BJP1.clamp_min(torch.finfo(dtype).tiny)
    return y_BJPV.reshape(batch, 1, heads, width).to(v_B1GV.dtype), LinearState(s_BJFV, z_BJF)
