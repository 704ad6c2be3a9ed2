"""Causal, normalised linear attention: y_i = sum_j<=i (a_i . b_j) v_j / sum_j<=i (a_i . b_j), a, b >= 0.

Shape legend: B batch, T tokens, H query heads, G key/value heads, N = H / G, J key feature heads (H or G),
F features, V value width.
"""

from __future__ import annotations

from torch import Tensor

from linearize_kernels.linear_attention.chunk import LinearState, chunk_linear_attention
from linearize_kernels.linear_attention.step import step_linear_attention

__all__ = ["LinearState", "linear_attention"]


def linear_attention(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, LinearState]:
    """Normalised causal linear attention of non-negative features (arXiv 2006.16236), in linear time and memory.

    Args:
        q_BTHF: query features, H heads.
        k_BTJF: key features, one head per query head (J = H) or per value head (J = G). A row of zeros is a key that
            does not exist (padding).
        v_BTGV: values; query head h reads value head h // (H // G). They are never repeated in memory.
        state: running sums of the tokens before; None at the start.
        segments_BT: document number of each token, non-decreasing along T. Tokens of different documents do not see
            each other. Only without `state`.

    Returns:
        y [B, T, H, V] in the dtype of v, and the state after the last token. All sums run in fp32 (fp64 for fp64).
    """
    assert state is None or segments_BT is None, "packed rows start from no state"
    if q_BTHF.shape[1] == 1 and segments_BT is None and state is not None:
        return step_linear_attention(q_BTHF, k_BTJF, v_BTGV, state)
    return chunk_linear_attention(q_BTHF, k_BTJF, v_BTGV, state, segments_BT)
