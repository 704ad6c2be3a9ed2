"""Exact softmax over a sliding window and sink tokens, and linear attention over the keys beyond, in one operation.

    y_i = (n sum_near e^(s_ij - m_i) v_j + f sum_far e_ij phi(q_i).phi(k_j) v_j) / (the same sums without v)

with s = q.k, m_i the largest of the near scores, e the decay, n and f a weight per head. Sink tokens are the first of
the document (arXiv 2309.17453); meta logits take weight among the near keys and give nothing (arXiv 2507.09025).

Shape legend: B batch, T tokens, M >= T rows of keys, the last T those of the tokens, H query heads, G key/value heads
(H = G * R), K key width, V value width, F features per sign, S sink tokens, W window, L meta logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_linear_attention import Branch, LinearState, contiguous, unit
from linearize_kernels.hedgehog_attention import FeatureMap, Map, hedgehog_attention
from linearize_kernels.windowed_linear_attention.chunk import LocalState, Sinks, WindowSums, window_sums
from linearize_kernels.windowed_linear_attention.step import FarStep, NearStep, Token, window_step

__all__ = [
    "Far",
    "FarStep",
    "LocalState",
    "Near",
    "NearStep",
    "Sinks",
    "Token",
    "WindowSums",
    "query_dtype",
    "window_attention",
    "window_step",
    "window_sums",
    "windowed_linear_attention",
]

SMALLEST = 1e-30
"""The linear branch's weight at least: below, the window's relative weight would leave fp32."""


class Near(NamedTuple):
    """What the window reads: queries rotated and scaled, keys rotated."""

    q_BTHK: Tensor
    k_BMGK: Tensor
    v_BMGV: Tensor
    sinks: Sinks | None = None
    meta_HL: Tensor | None = None


class Far(NamedTuple):
    """What the linear branch reads: of token t the key and value of row t, or of row t - W where `delayed`."""

    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTGV: Tensor
    query_map: Map
    key_map: Map
    feature_map: FeatureMap = "softmax"
    log_gate_BTH: Tensor | None = None
    state: LinearState | None = None
    mask_BT: Tensor | None = None  # False: this token brings no key
    delayed: bool = True


def windowed_linear_attention(
    near: Near,
    far: Far,
    window: int,
    position_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    separate: bool = False,
    last: bool = False,
) -> tuple[Tensor, LinearState]:
    """Both branches under one denominator or, `separate`, each under its own.

    Args:
        near, far: the branches. Where `far.delayed` and not `far.mask_BT`, keys that the window or the sinks keep are
            left out of the linear branch; with a mask, that is up to the mask.
        window: keys that are attended to exactly, the query's own included.
        position_BT: index of each token in its document, -1 for padding; None = 0, 1, 2, ...
        segments_BT: document number of each token, non-decreasing along T.
        weights: of the window and of the linear branch, [H] each; None = 1.
        last: nobody reads the state that comes back; it may be anything.

    Returns:
        y [B, T, H, V] in the dtype of v, and the linear branch's state after the last token. The weight of the linear
        branch has to be positive where the denominator is shared.
    """
    o_BTHV, den_BTH = window_attention(*near[:3], window, position_BT, near.sinks, near.meta_HL)
    near_H, far_H = weights
    other = None
    if not separate:
        den_BTH = den_BTH if near_H is None else den_BTH * near_H
        other = Branch(o_BTHV, den_BTH if far_H is None else den_BTH / far_H.clamp_min(SMALLEST))
    y_BTHV, state = hedgehog_attention(
        *far[:8],
        segments_BT,
        far.mask_BT,
        other=other,
        delay=window if far.delayed else 0,
        skip=near.sinks.k_BXSGK.shape[2] if far.delayed and near.sinks is not None else 0,
        last=last,
    )
    if not separate:
        return y_BTHV, state
    near_BTHV = o_BTHV if near_H is None else near_H.unsqueeze(-1) * o_BTHV
    far_BTHV = y_BTHV if far_H is None else far_H.unsqueeze(-1) * y_BTHV
    return (near_BTHV + far_BTHV).to(y_BTHV.dtype), state


def _in_triton(q_BTHK: Tensor, v_BMGV: Tensor) -> bool:
    return uses_triton("window_attention", v_BMGV, q_BTHK.shape[-1], v_BMGV.shape[-1])


def query_dtype(q_BTHK: Tensor, v_BMGV: Tensor) -> torch.dtype:
    """What `window_attention` reads queries and keys in: the values' dtype in Triton, fp32 at least in torch."""
    return v_BMGV.dtype if _in_triton(q_BTHK, v_BMGV) else torch.promote_types(q_BTHK.dtype, torch.float32)


def window_attention(
    q_BTHK: Tensor,
    k_BMGK: Tensor,
    v_BMGV: Tensor,
    window: int,
    position_BT: Tensor | None = None,
    sinks: Sinks | None = None,
    meta_HL: Tensor | None = None,
) -> Branch:
    """Softmax attention over the last `window` keys, the sinks before them and the meta logits.

    Args:
        q_BTHK: queries, already rotated and scaled.
        k_BMGK, v_BMGV: keys (rotated) and values. Those before the document: anything finite.
        window: at least 1.
        position_BT: index of each query in its document, -1 for padding: it sees so many keys back, never more.
            None = 0, 1, 2, ...
        sinks: seen by the queries whose window no longer reaches them; sink s is the document's token s.
        meta_HL: logits that take weight and have no value.

    Returns:
        Outputs in the dtype of v, 0 where nothing is seen, and the denominator, relative to the largest score.
    """
    if _in_triton(q_BTHK, v_BMGV):
        from linearize_kernels.windowed_linear_attention.launch import window_op

        dtype = v_BMGV.dtype
        if sinks is not None and sinks.k_BXSGK.shape[2] == 0:
            sinks = None
        sink_k, sink_v = (None, None) if sinks is None else (x.to(dtype).contiguous() for x in sinks)
        q_BTHK, k_BMGK, v_BMGV = unit(q_BTHK.to(dtype)), unit(k_BMGK.to(dtype)), unit(v_BMGV)
        places = (contiguous(position_BT), sink_k, sink_v, contiguous(meta_HL))
        o_BTHV, den_BTH, _, _ = window_op(q_BTHK, k_BMGK, v_BMGV, *places, window)
        return Branch(o_BTHV, den_BTH)
    if position_BT is None:
        batch, length = q_BTHK.shape[:2]
        position_BT = torch.arange(length, device=q_BTHK.device).expand(batch, -1)
    num_BTHV, den_BTH, top_BTH = window_sums(q_BTHK, k_BMGK, v_BMGV, position_BT, window, sinks)
    if meta_HL is not None:
        new_BTH = torch.maximum(top_BTH, meta_HL.detach().amax(-1))
        # where nothing is seen, top is 0 and den too
        kept_BTH = (top_BTH - new_BTH).exp()
        num_BTHV = num_BTHV * kept_BTH.unsqueeze(-1)
        den_BTH = den_BTH * kept_BTH + (meta_HL - new_BTH.unsqueeze(-1)).exp().sum(-1)
    o_BTHV = num_BTHV / den_BTH.masked_fill(den_BTH == 0, 1).unsqueeze(-1)
    return Branch(o_BTHV.to(v_BMGV.dtype), den_BTH)
