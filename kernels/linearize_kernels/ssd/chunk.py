"""The chunkwise form in torch: exact, linear in T, no T x T tensor. Legend in __init__.py.

Shape legend, beside that of __init__.py: N chunks, C tokens per chunk, P = H / G query heads per key/value head.

With b_i the log decay from the chunk's start up to and including token i, and S the state at the chunk's start,

    o_i = exp(b_i) S^T q_i + sum_j<=i exp(b_i - b_j) write_j (q_i . k_j) v_j
    S'  = exp(b_C) S + sum_j exp(b_C - b_j) write_j k_j v_j^T

Only S' walks from chunk to chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Decays(NamedTuple):
    """Decay factors of each chunk, all between 0 and 1; 0 between tokens of different documents."""

    pair_BNHCC: Tensor  # from token j to token i >= j
    read_BNHC: Tensor  # from the chunk's start to token i
    total_BNH: Tensor  # over the chunk


def chunk_ssd(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTH: Tensor,
    write_BTH: Tensor | None,
    state_BHKV: Tensor,
    segments_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `ssd`; `chunk` is the number of tokens handled quadratically."""
    length, heads, groups = q_BTHK.shape[1], q_BTHK.shape[2], k_BTGK.shape[2]
    dtype, chunk = state_BHKV.dtype, min(chunk, length)
    pad = -length % chunk

    def split(x_BTXY: Tensor) -> Tensor:  # [B, T, X, Y] -> [B, N, X, C, Y]; zeros after the end do not exist
        x_BTXY = F.pad(x_BTXY.to(dtype), (0, 0, 0, 0, 0, pad))
        return x_BTXY.unflatten(1, (-1, chunk)).transpose(2, 3)

    q_BNHCK, k_BNGCK, v_BNGCV = split(q_BTHK), split(k_BTGK), split(v_BTGV)
    decays = _decays(split(log_decay_BTH.unsqueeze(-1)).squeeze(-1), segments_BT, pad)
    pair_BNHCC = decays.pair_BNHCC
    if write_BTH is not None:
        pair_BNHCC = pair_BNHCC * split(write_BTH.unsqueeze(-1)).transpose(-1, -2)

    def fold(x_BNHCX: Tensor) -> Tensor:  # query heads of a group become rows: keys and values need no copies
        return x_BNHCX.unflatten(2, (groups, heads // groups)).flatten(3, 4)

    def unfold(x_BNGRX: Tensor) -> Tensor:
        return x_BNGRX.unflatten(3, (heads // groups, -1)).flatten(2, 3)

    # the last row of the pairs is the decay to the chunk's end
    to_end_BNGPC1 = pair_BNHCC[..., -1, :].unflatten(2, (groups, -1)).unsqueeze(-1)
    writes_BNGRC = (k_BNGCK.unsqueeze(3) * to_end_BNGPC1).transpose(-1, -2).flatten(3, 4)  # R = P * K rows
    starts_BNHKV, end_BHKV = _walk(state_BHKV, unfold(writes_BNGRC @ v_BNGCV), decays.total_BNH)

    score_BNHCC = unfold(fold(q_BNHCK) @ k_BNGCK.transpose(-1, -2)) * pair_BNHCC
    o_BNHCV = unfold(fold(score_BNHCC) @ v_BNGCV) + (q_BNHCK * decays.read_BNHC.unsqueeze(-1)) @ starts_BNHKV
    return o_BNHCV.transpose(2, 3).flatten(1, 2)[:, :length], end_BHKV


def _decays(log_decay_BNHC: Tensor, segments_BT: Tensor | None, pad: int) -> _Decays:
    """Decay factors. Each exponent is a sum of the decays in between, not a difference of long sums: after a strong
    decay a difference would carry its rounding error, and after -inf it would be NaN."""
    chunk = log_decay_BNHC.shape[-1]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=log_decay_BNHC.device).tril()
    later = log_decay_BNHC.unsqueeze(-1).expand(*log_decay_BNHC.shape, chunk).masked_fill(~causal.tril(-1), 0)
    pair_BNHCC = later.cumsum(-2).exp().masked_fill(~causal, 0)
    read_BNHC = log_decay_BNHC.cumsum(-1).exp()
    if segments_BT is None:
        return _Decays(pair_BNHCC, read_BNHC, read_BNHC[..., -1])
    if pad:
        segments_BT = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, pad)], dim=1)
    segment_BNC = segments_BT.unflatten(1, (-1, chunk))
    same_BN1CC = (segment_BNC[..., :, None] == segment_BNC[..., None, :]).unsqueeze(2)
    before_BN1 = torch.cat([segment_BNC[:, :1, :1], segment_BNC[:, :-1, -1:]], dim=1)
    read_BNHC = read_BNHC.masked_fill(~(segment_BNC == before_BN1).unsqueeze(2), 0)
    return _Decays(pair_BNHCC.masked_fill(~same_BN1CC, 0), read_BNHC, read_BNHC[..., -1])


def _walk(state_BHKV: Tensor, added_BNHKV: Tensor, total_BNH: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of each chunk, and the state at the end."""
    starts, total_BNH11 = [], total_BNH[..., None, None]
    for n in range(added_BNHKV.shape[1]):
        starts.append(state_BHKV)
        state_BHKV = total_BNH11[:, n] * state_BHKV + added_BNHKV[:, n]
    return torch.stack(starts, dim=1), state_BHKV
