"""Causal linear attention, with or without decay and normaliser.

    S_t = Lambda_t S_t-1 + b_t v_t^T,  z_t = Lambda_t z_t-1 + b_t,  num_t = a_t S_t,  den_t = a_t . z_t

Lambda_t = exp(log_gate_t): nothing (1), one number per head, or one per feature.

Shape legend: B batch, T tokens, H query heads, G key/value heads, J key feature heads (H = J * P, J = G * M),
F features, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_linear_attention.chunk import LinearState, chunk_linear_sums
from linearize_kernels.gated_linear_attention.step import step_linear_sums

__all__ = ["MIN_LOG_GATE", "Branch", "LinearState", "gated_linear_attention", "linear_sums", "merge"]

MIN_LOG_GATE = -5.0
"""Decays per feature are cut here: a feature that keeps 0.7 % per token has forgotten. It bounds the exponents of the
chunkwise form (decays per head need no bound: they enter as differences)."""


class Branch(NamedTuple):
    """Another branch that shares the denominator: its own normalised outputs, and what its denominator weighs."""

    o_BTHV: Tensor
    den_BTH: Tensor


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
            t applies before t is written. Fewer heads than J stand for as many neighbours each.
        state: running sums of the tokens before, of the first token's document; None at the start.
        segments_BT: document number of each token, non-decreasing along T. Tokens of different documents do not see
            each other; the state returned is the last document's.

    Returns:
        num [B, T, H, V], den [B, T, H], both fp32 (fp64 for fp64), and the state after the last token.
    """
    if _in_triton(q_BTHF, v_BTGV):
        from linearize_kernels.gated_linear_attention.in_triton import sums

        return sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT)
    if log_gate is not None:
        log_gate = spread(log_gate, k_BTJF.shape[2])
        log_gate = log_gate if log_gate.ndim == 3 else log_gate.clamp_min(MIN_LOG_GATE)
    if q_BTHF.shape[1] == 1 and state is not None:
        return step_linear_sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state)
    return chunk_linear_sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT)


def gated_linear_attention(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    log_gate: Tensor | None = None,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
    *,
    other: Branch | None = None,
    epsilon: float = 0.0,
    last: bool = False,
) -> tuple[Tensor, LinearState]:
    """Normalised causal linear attention of non-negative features (arXiv 2006.16236), num / den of `linear_sums`.

    Args:
        other: another branch under the same denominator: y = (num + o d) / (den + d + epsilon).
        epsilon: added to the denominator.
        last: nobody reads the state that comes back; it may be anything.

    Returns:
        y [B, T, H, V] in the dtype of v, 0 where nothing is seen, and the state after the last token.
    """
    if _in_triton(q_BTHF, v_BTGV):
        from linearize_kernels.gated_linear_attention.in_triton import attend

        return attend(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT, other, epsilon, last)
    sums = linear_sums(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT)
    return merge(sums[0], sums[1], other, epsilon).to(v_BTGV.dtype), sums[2]


def merge(num_BTHV: Tensor, den_BTH: Tensor, other: Branch | None = None, epsilon: float = 0.0) -> Tensor:
    """num / den with another branch; 0 where nothing is seen."""
    if other is not None:
        num_BTHV = num_BTHV + other.o_BTHV * other.den_BTH.unsqueeze(-1)
        den_BTH = den_BTH + other.den_BTH
    if epsilon:
        den_BTH = den_BTH + epsilon
    # not clamped: 1 / tiny would make the gradients of rows that see nothing infinite
    return num_BTHV / den_BTH.masked_fill(den_BTH == 0, 1).unsqueeze(-1)


def _in_triton(q_BTHF: Tensor, v_BTGV: Tensor) -> bool:
    return uses_triton("gated_linear_attention", v_BTGV, q_BTHF.shape[-1], v_BTGV.shape[-1])


def spread(log_gate: Tensor, heads: int) -> Tensor:
    """One decay per key feature head."""
    shared = heads // log_gate.shape[2]
    return log_gate if shared == 1 else log_gate.repeat_interleave(shared, dim=2)


def unit(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """With neighbouring elements along the last dimension, as the kernels read them, and in `dtype` if given."""
    if dtype is not None and x.dtype != dtype:  # `to` takes a while to find that it has nothing to do
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
