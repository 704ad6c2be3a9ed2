"""Causal linear attention, with or without decay and normaliser.

    S_t = Lambda_t S_t-1 + b_t v_t^T,  z_t = Lambda_t z_t-1 + b_t,  num_t = a_t S_t,  den_t = a_t . z_t

Lambda_t = exp(log_gate_t): nothing (1), one number per head, or one per feature.

Shape legend: B batch, T tokens, H query heads, G key/value heads, J key feature heads (H = J * P, J = G * M),
F features, V value width.
"""

from __future__ import annotations

from torch import Tensor

from linearize_kernels.gated_linear_attention.chunk import LinearState, chunk_linear_sums
from linearize_kernels.gated_linear_attention.step import step_linear_sums

__all__ = ["MIN_LOG_GATE", "LinearState", "linear_attention", "linear_sums"]

MIN_LOG_GATE = -5.0
"""Decays per feature are cut here: a feature that keeps 0.7 % per token has forgotten. It bounds the exponents of the
chunkwise form (decays per head need no bound: they enter as differences)."""


def linear_sums(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    log_gate: Tensor | None = None,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearState]:
    """Numerator and denominator of causal linear attention, in linear time and memory.

    Args:
        q_BTHF: query features, H heads.
        k_BTJF: key features, one head per query head (J = H), per value head (J = G) or between. A row of zeros with
            no decay is a key that does not exist (padding).
        v_BTGV: values; query head h reads value head h // (H // G).
        log_gate: [B, T, J] log decay per head or [B, T, J, F] per feature, <= 0; None = no decay. The decay of token
            t applies before t is written.
        state: running sums of the tokens before, of the first token's document; None at the start.
        segments_BT: document number of each token, non-decreasing along T. Tokens of different documents do not see
            each other; the state returned is the last document's.

    Returns:
        num [B, T, H, V], den [B, T, H], both fp32 (fp64 for fp64), and the state after the last token.
    """
    if log_gate is not None and log_gate.ndim == 4:
        log_gate = log_gate.clamp_min(MIN_LOG_GATE)
    if q_BTHF.shape[1] == 1 and state is not None:
        return step_linear_sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state)
    return chunk_linear_sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT)


def linear_attention(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
    log_gate: Tensor | None = None,
) -> tuple[Tensor, LinearState]:
    """Normalised causal linear attention of non-negative features (arXiv 2006.16236): num / den of `linear_sums`.

    Returns:
        y [B, T, H, V] in the dtype of v, 0 where nothing is seen, and the state after the last token.
    """
    num_BTHV, den_BTH, state = linear_sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT)
    # not clamped: 1 / tiny would make the gradients of rows that see nothing infinite
    y_BTHV = num_BTHV / den_BTH.masked_fill(den_BTH == 0, 1).unsqueeze(-1)
    return y_BTHV.to(v_BTGV.dtype), state
