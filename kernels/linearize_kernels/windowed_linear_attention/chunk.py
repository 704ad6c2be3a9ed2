"""Windows in torch: chunks of queries against the keys they may see. Legend in __init__.py; N chunks, C tokens of a
chunk, U = W - 1 + C keys that a chunk's queries may see, R = H / G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


class Sinks(NamedTuple):
    """The first S tokens of the document: one set for all queries (X = 1) or one per query (X = T, packed rows)."""

    k_BXSGK: Tensor
    v_BXSGV: Tensor


class LocalState(NamedTuple):
    """What decoding needs: W keys and values as the window reads them, and the sinks."""

    seen_B: Tensor  # int64: real tokens so far
    k_BWGK: Tensor
    v_BWGV: Tensor
    sink_k_BSGK: Tensor
    sink_v_BSGV: Tensor
    far_k_BWGK: Tensor  # the window's keys as the other branch wants them; of size 0 where they are the same


class WindowSums(NamedTuple):
    """Of exp(score - max) over what a query sees; softmax attention is num / den."""

    num_BTHV: Tensor
    den_BTH: Tensor  # 0 where nothing is seen (padding)
    max_BTH: Tensor  # 0 where nothing is seen


def window_sums(
    q_BTHK: Tensor, k_BMGK: Tensor, v_BMGV: Tensor, position_BT: Tensor, window: int, sinks: Sinks | None = None
) -> WindowSums:
    """Sums over the last `window` keys (the query's own included) and over the sinks before them, in fp32.

    Args:
        q_BTHK: queries, already rotated and scaled.
        k_BMGK, v_BMGV: keys (rotated) and values, M >= T. Those before the document: anything finite.
        position_BT: index of each query in its document, -1 for padding: it sees so many keys back, never more.
        window: at least 1.
        sinks: seen by the queries whose window no longer reaches them; sink s is the document's token s.

    Memory is linear in T: chunks of queries against the chunk's own keys and window - 1 before.
    """
    length, heads = q_BTHK.shape[1:3]
    groups = k_BMGK.shape[2]
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    spare = k_BMGK.shape[1] - (window - 1 + length)  # rows that no query sees, or, below 0, rows that do not exist
    chunk = min(CHUNK, length)
    pad = -length % chunk
    count = (length + pad) // chunk
    span = window - 1 + chunk

    def spans(x_BMGX: Tensor) -> Tensor:  # [B, N, G, X, U]
        return F.pad(x_BMGX.to(dtype), (0, 0, 0, 0, -spare, pad)).unfold(1, span, chunk)

    q_BTGRK = q_BTHK.to(dtype).unflatten(2, (groups, heads // groups))
    q_BNGLK = F.pad(q_BTGRK, (0, 0, 0, 0, 0, 0, 0, pad)).unflatten(1, (count, chunk)).permute(0, 1, 3, 4, 2, 5)
    position_BNC = F.pad(position_BT, (0, pad), value=-1).unflatten(1, (count, chunk))
    row_C = torch.arange(chunk, device=q_BTHK.device)
    back_CU = (window - 1) + row_C[:, None] - torch.arange(span, device=q_BTHK.device)
    seen = ((back_CU >= 0) & (back_CU < window)) & (back_CU <= position_BNC[..., None])
    score = (q_BNGLK.flatten(3, 4) @ spans(k_BMGK)).unflatten(3, (heads // groups, chunk))
    score = score.masked_fill(~seen[:, :, None, None], float("-inf"))
    max_BNGRC = score.amax(-1)
    score_S = None
    if sinks is not None:
        score_S = _sink_scores(q_BTGRK, sinks.k_BXSGK.to(dtype), position_BT, window)
        padded = F.pad(score_S, (0, 0, 0, 0, 0, 0, 0, pad), value=float("-inf"))
        max_BNGRC = torch.maximum(max_BNGRC, padded.amax(-1).unflatten(1, (count, chunk)).permute(0, 1, 3, 4, 2))
    max_BNGRC = max_BNGRC.masked_fill(max_BNGRC == float("-inf"), 0)
    weight = (score - max_BNGRC.unsqueeze(-1)).exp()
    num = (weight.flatten(3, 4) @ spans(v_BMGV).transpose(-1, -2)).unflatten(3, (heads // groups, chunk))

    def rows(x_BNGRCX: Tensor) -> Tensor:  # [B, N, G, R, C, ...] -> [B, T, G, R, ...]
        return x_BNGRCX.movedim(4, 2).flatten(1, 2)[:, :length]

    num_BTGRV, den_BTGR, max_BTGR = rows(num), rows(weight.sum(-1)), rows(max_BNGRC)
    if sinks is not None and score_S is not None:
        weight_BTGRS = (score_S - max_BTGR.unsqueeze(-1)).exp()
        num_BTGRV = num_BTGRV + _with_sinks("btgrs,bxsgv->btgrv", weight_BTGRS, sinks.v_BXSGV.to(dtype))
        den_BTGR = den_BTGR + weight_BTGRS.sum(-1)
    return WindowSums(num_BTGRV.flatten(2, 3), den_BTGR.flatten(2, 3), max_BTGR.flatten(2, 3))


def _sink_scores(q_BTGRK: Tensor, k_BXSGK: Tensor, position_BT: Tensor, window: int) -> Tensor:
    """Scores [B, T, G, R, S]; -inf where the window still covers the sink, or the document has not come to it."""
    index_S = torch.arange(k_BXSGK.shape[2], device=q_BTGRK.device)
    seen_BTS = position_BT.unsqueeze(-1) - index_S >= window
    score = _with_sinks("btgrk,bxsgk->btgrs", q_BTGRK, k_BXSGK)
    return score.masked_fill(~seen_BTS[:, :, None, None], float("-inf"))


def _with_sinks(equation: str, left_BTGRX: Tensor, sinks_BXSGY: Tensor) -> Tensor:
    """One product for all queries where they share the sinks, one for each otherwise."""
    if sinks_BXSGY.shape[1] == 1:
        return torch.einsum(equation.replace("x", ""), left_BTGRX, sinks_BXSGY[:, 0])
    return torch.einsum(equation.replace("x", "t"), left_BTGRX, sinks_BXSGY)
