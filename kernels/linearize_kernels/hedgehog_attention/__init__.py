"""Hedgehog attention (arXiv 2402.04347): learned feature maps and normalised linear attention in one operation.

    y_t = sum_j<=t phi_q(q_t).phi_k(k_j) v_j / sum_j<=t phi_q(q_t).phi_k(k_j),  phi(x) = [f(xW + b) ; f(-(xW + b))]

with an optional decay per head and another branch under the same denominator. On a GPU no features go through memory,
and running states only where those of both signs do not fit a program: one of every 128 tokens.

Shape legend: B batch, T tokens, H query heads with a map each, G key/value heads (H = G * N), K head width, F features
per sign, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_linear_attention import Branch, LinearState, gated_linear_attention
from linearize_kernels.hedgehog_attention.maps import FeatureMap, Map, hedgehog_features, map_heads
from linearize_kernels.rotary import rotary

__all__ = ["FeatureMap", "Map", "features_of_both", "hedgehog_attention", "hedgehog_features", "map_heads"]


def hedgehog_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    query_map: Map,
    key_map: Map,
    feature_map: FeatureMap = "softmax",
    log_gate_BTH: Tensor | None = None,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    *,
    other: Branch | None = None,
    delay: int = 0,
    skip: int = 0,
    last: bool = False,
    angles: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, LinearState]:
    """Causal, in linear time; memory of the size of the inputs.

    Args:
        q_BTHK, k_BTGK, v_BTGV: heads; query head h reads key and value head h // (H // G).
        query_map, key_map: weights [H, K, F] and biases [H, F] or None of the maps.
        feature_map: which f, see `hedgehog_features`.
        log_gate_BTH: log decay per head, <= 0, applied before the token is written.
        state: sums [B, H, 2F, V] and [B, H, 2F] of the tokens before; None at the start.
        segments_BT: document number of each token, non-decreasing along T; documents do not see each other.
        mask_BT: False = this token has no key.
        other: another branch under the same denominator, see `gated_linear_attention`.
        delay: token t brings the key and value of row t - delay; the first `delay` tokens bring none.
        skip: rows at the start that never come.
        last: nobody reads the state that comes back; it may be anything.
        angles: cosines and sines [B or 1, T, R] that queries and keys are rotated by first, see `rotary`.

    Returns:
        y [B, T, H, V] in the dtype of v, 0 where nothing is seen, and the state after the last token.
    """
    widths = (q_BTHK.shape[-1], 2 * query_map.weight_HKF.shape[-1], v_BTGV.shape[-1])
    if uses_triton("hedgehog_attention", v_BTGV, *widths):
        from linearize_kernels.hedgehog_attention.launch import attend

        return attend(
            q_BTHK, k_BTGK, v_BTGV, query_map, key_map, feature_map, log_gate_BTH, state, segments_BT, mask_BT, other,
            delay, skip, last, angles,
        )  # fmt: skip
    if angles is not None:
        q_BTHK, k_BTGK = rotary(q_BTHK, k_BTGK, *angles)
    if delay or skip:
        length = k_BTGK.shape[1]
        k_BTGK, v_BTGV = (F.pad(x, (0, 0, 0, 0, delay, 0))[:, :length] for x in (k_BTGK, v_BTGV))
        comes_T = torch.arange(length, device=k_BTGK.device) >= delay + skip
        mask_BT = comes_T.expand(k_BTGK.shape[0], -1) if mask_BT is None else mask_BT & comes_T
    q_BTHF, k_BTHF = features_of_both(q_BTHK, k_BTGK, query_map, key_map, feature_map, mask_BT, torch.float32)
    return gated_linear_attention(q_BTHF, k_BTHF, v_BTGV, log_gate_BTH, state, segments_BT, other=other)


def features_of_both(
    q_BTGK: Tensor, k_BTGK: Tensor, query_map: Map, key_map: Map, feature_map: FeatureMap, mask_BT: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`hedgehog_features` of queries and of keys; 0 for keys that are masked.

    Rounded to `dtype` in Triton, in one launch, where nobody differentiates them.
    """
    widths = (q_BTGK.shape[-1], 2 * query_map.weight_HKF.shape[-1])
    given = (q_BTGK, k_BTGK, *query_map, *key_map)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if not differentiated and uses_triton("hedgehog_features", q_BTGK, *widths):
        from linearize_kernels.hedgehog_attention.launch import features

        return features(q_BTGK, k_BTGK, query_map, key_map, feature_map, mask_BT, dtype)
    k_BTHF = hedgehog_features(k_BTGK, *key_map, feature_map, "key")
    if mask_BT is not None:
        k_BTHF = k_BTHF * mask_BT[:, :, None, None]
    return hedgehog_features(q_BTGK, *query_map, feature_map, "query"), k_BTHF
