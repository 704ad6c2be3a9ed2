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
            t applies before t is written.
        state: running sums of the tokens before, of the first token's document; None at the start.
        segments_BT: document number of each token, non-decreasing along T. Tokens of different documents do not see
            each other; the state returned is the last document's.

    Returns:
        num [B, T, H, V], den [B, T, H], both fp32 (fp64 for fp64), and the state after the last token.
    """
    if _in_triton(q_BTHF, v_BTGV):
        if state is not None and _decodes(q_BTHF, k_BTJF, v_BTGV, log_gate, state):
            num_B1HV, den_B1H, end = _step(q_BTHF, k_BTJF, v_BTGV, log_gate, state, 0.0, normalised=False)
            return num_B1HV, den_B1H, end
        return _walk(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT, None, 0.0, normalised=False)
    if log_gate is not None and log_gate.ndim == 4:
        log_gate = log_gate.clamp_min(MIN_LOG_GATE)
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
) -> tuple[Tensor, LinearState]:
    """Normalised causal linear attention of non-negative features (arXiv 2006.16236), num / den of `linear_sums`.

    Args:
        other: another branch under the same denominator: y = (num + o d) / (den + d + epsilon).
        epsilon: added to the denominator.

    Returns:
        y [B, T, H, V] in the dtype of v, 0 where nothing is seen, and the state after the last token.
    """
    if _in_triton(q_BTHF, v_BTGV):
        decodes = state is not None and _decodes(q_BTHF, k_BTJF, v_BTGV, log_gate, state)
        if not decodes:
            rest = (log_gate, state, segments_BT, other, epsilon)
            y_BTHV, _, end = _walk(q_BTHF, k_BTJF, v_BTGV, *rest, normalised=True)
            return y_BTHV, end
        if state is not None and other is None:
            y_BTHV, _, end = _step(q_BTHF, k_BTJF, v_BTGV, log_gate, state, epsilon, normalised=True)
            return y_BTHV, end
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


def _decodes(q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, log_gate: Tensor | None, state: LinearState) -> bool:
    """One token after a state, and nothing to differentiate: the step has no backward."""
    given = (q_BTHF, k_BTJF, v_BTGV, log_gate, *state)
    return q_BTHF.shape[1] == 1 and not (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    )


def _step(
    q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, log_gate: Tensor | None, state: LinearState, epsilon: float, *,
    normalised: bool,
) -> tuple[Tensor, Tensor, LinearState]:  # fmt: skip
    """One token in Triton; features stay in fp32 where they come so: nothing is multiplied by matrix units."""
    from linearize_kernels.gated_linear_attention.triton_step import step

    y, den, s, z = step(
        unit(q_BTHF), unit(k_BTJF), unit(v_BTGV), contiguous(log_gate),
        state.s_BJFV.float().contiguous(), state.z_BJF.float().contiguous(), normalised, epsilon,
    )  # fmt: skip
    return y, den, LinearState(s, z)


def _walk(
    q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, log_gate: Tensor | None, state: LinearState | None,
    segments_BT: Tensor | None, other: Branch | None, epsilon: float, *, normalised: bool,
) -> tuple[Tensor, Tensor, LinearState]:  # fmt: skip
    """In Triton, where every query head has a state of its own; features come in the dtype of v."""
    from linearize_kernels.gated_linear_attention.launch import walk

    dtype = v_BTGV.dtype
    shared = q_BTHF.shape[2] // k_BTJF.shape[2]
    s, z = (None, None) if state is None else (x.float().repeat_interleave(shared, dim=1) for x in state)
    y, scale, end_s, end_z, _, _ = walk(
        unit(q_BTHF, dtype), unit(k_BTJF, dtype), unit(v_BTGV),
        None if log_gate is None else log_gate.contiguous(), None, contiguous(segments_BT), None, None, None, None,
        None if other is None else other.o_BTHV.to(dtype).contiguous(),
        None if other is None else other.den_BTH.float().contiguous(),
        contiguous(s), contiguous(z), "none", normalised, epsilon, 0, 0, True,
    )  # fmt: skip
    return y, scale, LinearState(end_s[:, ::shared], end_z[:, ::shared])


def unit(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """With neighbouring elements along the last dimension, as the kernels read them, and in `dtype` if given."""
    if dtype is not None and x.dtype != dtype:  # `to` takes a while to find that it has nothing to do
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
