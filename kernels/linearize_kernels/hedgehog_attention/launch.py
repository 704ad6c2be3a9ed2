"""Hedgehog attention in Triton: the walk over a sequence, or one step; features alone. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.gated_linear_attention import Branch, LinearState, contiguous, unit
from linearize_kernels.gated_linear_attention.launch import walk
from linearize_kernels.hedgehog_attention.maps import FeatureMap, Map
from linearize_kernels.hedgehog_attention.triton_features import features_op
from linearize_kernels.hedgehog_attention.triton_step import hedgehog_step_op
from linearize_kernels.rotary import rotary


def attend(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, query_map: Map, key_map: Map, feature_map: FeatureMap,
    log_gate_BTH: Tensor | None, state: LinearState | None, segments_BT: Tensor | None, mask_BT: Tensor | None,
    other: Branch | None, delay: int, skip: int, last: bool, angles: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """As `hedgehog_attention`; one token after a state, which nobody differentiates, is a step: it has no backward."""
    if state is not None and q_BTHK.shape[1] == 1 and not (delay or skip):
        read = (q_BTHK, k_BTGK, v_BTGV, log_gate_BTH, *query_map, *key_map, *(other or ()), *state)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in read)):
            heads = (q_BTHK, k_BTGK, v_BTGV, log_gate_BTH, mask_BT)
            return _step(*heads, query_map, key_map, other, state, feature_map, angles)
    if angles is not None:
        q_BTHK, k_BTGK = rotary(q_BTHK, k_BTGK, *angles)
    return _walk(
        q_BTHK, k_BTGK, v_BTGV, query_map, key_map, feature_map, log_gate_BTH, state, segments_BT, mask_BT, other,
        delay, skip, last,
    )  # fmt: skip


def _step(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1GV: Tensor, log_gate_B1H: Tensor | None, mask_B1: Tensor | None,
    query_map: Map, key_map: Map, other: Branch | None, state: LinearState, feature_map: FeatureMap,
    angles: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """One token after a state, in one launch."""
    y, s, z = hedgehog_step_op(
        unit(q_B1HK), unit(k_B1GK), unit(v_B1GV), *((None, None) if angles is None else map(unit, angles)),
        log_gate_B1H, mask_B1,
        query_map.weight_HKF.contiguous(), key_map.weight_HKF.contiguous(),
        contiguous(query_map.bias_HF), contiguous(key_map.bias_HF),
        None if other is None else other.o_BTHV.contiguous(),
        None if other is None else other.den_BTH.float().contiguous(),
        state.s_BJFV.float().contiguous(), state.z_BJF.float().contiguous(), feature_map,
    )  # fmt: skip
    return y, LinearState(s, z)


def _walk(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, query_map: Map, key_map: Map, feature_map: FeatureMap,
    log_gate_BTH: Tensor | None, state: LinearState | None, segments_BT: Tensor | None, mask_BT: Tensor | None,
    other: Branch | None, delay: int, skip: int, last: bool,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    dtype = v_BTGV.dtype
    y, _, end_s, end_z, _, _ = walk(
        unit(q_BTHK, dtype), unit(k_BTGK, dtype), unit(v_BTGV),
        contiguous(log_gate_BTH), contiguous(mask_BT), contiguous(segments_BT),
        query_map.weight_HKF.contiguous(), key_map.weight_HKF.contiguous(),
        contiguous(query_map.bias_HF), contiguous(key_map.bias_HF),
        None if other is None else other.o_BTHV.to(dtype).contiguous(),
        None if other is None else other.den_BTH.float().contiguous(),
        None if state is None else state.s_BJFV.float().contiguous(),
        None if state is None else state.z_BJF.float().contiguous(),
        feature_map, True, 0.0, delay, skip, not last,
    )  # fmt: skip
    return y, LinearState(end_s, end_z)


def features(
    q_BTGK: Tensor, k_BTGK: Tensor, query_map: Map, key_map: Map, feature_map: FeatureMap, mask_BT: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `features_of_both`."""
    q_BTHF, k_BTHF = features_op(
        unit(q_BTGK), unit(k_BTGK), query_map.weight_HKF.contiguous(), key_map.weight_HKF.contiguous(),
        contiguous(query_map.bias_HF), contiguous(key_map.bias_HF), contiguous(mask_BT), feature_map, dtype,
    )  # fmt: skip
    return q_BTHF, k_BTHF
