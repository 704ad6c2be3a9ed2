"""Linear attention in Triton: the walk over a sequence, or one step. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.gated_linear_attention import Branch, LinearState, contiguous, merge, spread, unit
from linearize_kernels.gated_linear_attention.launch import walk
from linearize_kernels.gated_linear_attention.triton_step import step


def sums(
    q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, log_gate: Tensor | None, state: LinearState | None,
    segments_BT: Tensor | None,
) -> tuple[Tensor, Tensor, LinearState]:  # fmt: skip
    """As `linear_sums`."""
    if state is not None and _decodes(q_BTHF, k_BTJF, v_BTGV, log_gate, state):
        return _step(q_BTHF, k_BTJF, v_BTGV, log_gate, state, 0.0, normalised=False)
    return _walk(q_BTHF, k_BTJF, v_BTGV, log_gate, state, segments_BT, None, 0.0, normalised=False, last=False)


def attend(
    q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, log_gate: Tensor | None, state: LinearState | None,
    segments_BT: Tensor | None, other: Branch | None, epsilon: float, last: bool,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """As `gated_linear_attention`."""
    if state is not None and _decodes(q_BTHF, k_BTJF, v_BTGV, log_gate, state):
        if other is None:
            y_BTHV, _, end = _step(q_BTHF, k_BTJF, v_BTGV, log_gate, state, epsilon, normalised=True)
            return y_BTHV, end
        num_BTHV, den_BTH, end = _step(q_BTHF, k_BTJF, v_BTGV, log_gate, state, 0.0, normalised=False)
        return merge(num_BTHV, den_BTH, other, epsilon).to(v_BTGV.dtype), end
    rest = (log_gate, state, segments_BT, other, epsilon)
    y_BTHV, _, end = _walk(q_BTHF, k_BTJF, v_BTGV, *rest, normalised=True, last=last)
    return y_BTHV, end


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
    """One token; features stay in fp32 where they come so: nothing is multiplied by matrix units."""
    if log_gate is not None:
        log_gate = spread(log_gate, k_BTJF.shape[2])
    y, den, s, z = step(
        unit(q_BTHF), unit(k_BTJF), unit(v_BTGV), contiguous(log_gate),
        state.s_BJFV.float().contiguous(), state.z_BJF.float().contiguous(), normalised, epsilon,
    )  # fmt: skip
    return y, den, LinearState(s, z)


def _walk(
    q_BTHF: Tensor, k_BTJF: Tensor, v_BTGV: Tensor, log_gate: Tensor | None, state: LinearState | None,
    segments_BT: Tensor | None, other: Branch | None, epsilon: float, *, normalised: bool, last: bool,
) -> tuple[Tensor, Tensor, LinearState]:  # fmt: skip
    """Every query head has a state of its own; features come in the dtype of v. With `last`, no state comes back."""
    dtype = v_BTGV.dtype
    shared = q_BTHF.shape[2] // k_BTJF.shape[2]
    s, z = (None, None) if state is None else (x.float().repeat_interleave(shared, dim=1) for x in state)
    y, scale, end_s, end_z, _, _ = walk(
        unit(q_BTHF, dtype), unit(k_BTJF, dtype), unit(v_BTGV),
        contiguous(log_gate), None, contiguous(segments_BT), None, None, None, None,
        None if other is None else other.o_BTHV.to(dtype).contiguous(),
        None if other is None else other.den_BTH.float().contiguous(),
        contiguous(s), contiguous(z), "none", normalised, epsilon, 0, 0, not last,
    )  # fmt: skip
    if last:
        return y, scale, LinearState(end_s, end_z)
    return y, scale, LinearState(end_s[:, ::shared], end_z[:, ::shared])
