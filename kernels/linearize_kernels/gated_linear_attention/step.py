"""One decoding step: update the running sums, read them once. Legend in __init__.py."""

from __future__ import annotations

from torch import Tensor

from linearize_kernels.gated_linear_attention.chunk import LinearState


def step_linear_sums(
    q_B1HF: Tensor, k_B1JF: Tensor, v_B1GV: Tensor, log_gate: Tensor | None, state: LinearState
) -> tuple[Tensor, Tensor, LinearState]:
    """The recurrent form: decay, S += k v^T, z += k, read q S and q z. As `linear_sums`."""
    batch, _, heads, features = q_B1HF.shape
    value_heads, width = v_B1GV.shape[2:]
    shared = k_B1JF.shape[2] // value_heads  # key heads per value head
    dtype = state.s_BJFV.dtype
    k_BGMF = k_B1JF.to(dtype).view(batch, value_heads, shared, features)
    v_BG1V = v_B1GV.to(dtype).view(batch, value_heads, 1, width)
    s_BJFV, z_BJF = state
    if log_gate is not None:
        keep_BJE = log_gate.to(dtype)[:, 0].exp()
        keep_BJE = keep_BJE if log_gate.ndim == 4 else keep_BJE.unsqueeze(-1)
        s_BJFV, z_BJF = s_BJFV * keep_BJE.unsqueeze(-1), z_BJF * keep_BJE
    outer = (k_BGMF.reshape(batch, value_heads, shared * features, 1) * v_BG1V).view_as(s_BJFV)
    s_BJFV, z_BJF = s_BJFV + outer, z_BJF + k_B1JF.to(dtype)[:, 0]
    q_BJPF = q_B1HF.to(dtype).view(batch, value_heads * shared, -1, features)
    num_B1HV = (q_BJPF @ s_BJFV).reshape(batch, 1, heads, width)
    den_B1H = (q_BJPF @ z_BJF.unsqueeze(-1)).reshape(batch, 1, heads)
    return num_B1HV, den_B1H, LinearState(s_BJFV, z_BJF)
