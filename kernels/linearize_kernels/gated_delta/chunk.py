"""The chunkwise form in torch: exact, linear in T, no T x T tensor. Legend in __init__.py.

Shape legend, beside that of __init__.py: N chunks, C tokens per chunk, P = H / J query heads per state head.

With b_i the log decay from the chunk's start up to and including token i, and S the state at the chunk's start,

    u_i = beta_i (v_i - exp(b_i) S^T k_i - sum_j<i exp(b_i - b_j) (k_i . k_j) u_j)

is a unit lower triangular system (I + L) U = diag(beta) (V - (exp(b) K) S), solved once for both parts of its right
side (the WY form of arXiv 2412.06464): U = fresh - erase S. Only that last line and the state's step

    S' = exp(b_C) S + (exp(b_C - b) K)^T U

walk from chunk to chunk; reading the states, O = (exp(b) Q) S + tril(Q K^T exp(b_i - b_j)) U, is parallel again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Decays(NamedTuple):
    """Decay factors of each chunk, all between 0 and 1; 0 between tokens of different documents."""

    pair_BNJCC: Tensor  # from key j to query i >= j
    read_BNJC: Tensor  # from the chunk's start to token i
    write_BNJC: Tensor  # from token j to the chunk's end
    total_BNJ: Tensor  # over the chunk


def chunk_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    log_decay_BTJ: Tensor,
    beta_BTJ: Tensor,
    state_BJKV: Tensor | None = None,
    segments_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `gated_delta_rule`; `chunk` is the number of tokens handled quadratically."""
    batch, length, heads, width = q_BTHK.shape
    state_heads, value_width = v_BTJV.shape[2:]
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    chunk = min(chunk, length)
    pad = -length % chunk
    count = (length + pad) // chunk

    def split(x_BTXY: Tensor) -> Tensor:  # [B, T, X, Y] -> [B, N, X, C, Y]; zeros after the end do not exist
        x_BTXY = F.pad(x_BTXY.to(dtype), (0, 0, 0, 0, 0, pad))
        return x_BTXY.unflatten(1, (count, chunk)).transpose(2, 3)

    q_BNHCK, k_BNJCK, v_BNJCV = split(q_BTHK), split(k_BTJK), split(v_BTJV)
    beta_BNJC1, log_decay_BNJC1 = split(beta_BTJ.unsqueeze(-1)), split(log_decay_BTJ.unsqueeze(-1))
    decays = _decays(log_decay_BNJC1.squeeze(-1), segments_BT, pad)

    below_BNJCC = (beta_BNJC1 * (k_BNJCK @ k_BNJCK.transpose(-1, -2)) * decays.pair_BNJCC).tril(-1)
    right_side = beta_BNJC1 * torch.cat([v_BNJCV, k_BNJCK * decays.read_BNJC.unsqueeze(-1)], dim=-1)
    solved = torch.linalg.solve_triangular(below_BNJCC, right_side, upper=False, unitriangular=True)
    fresh_BNJCV, erase_BNJCK = solved.split([value_width, width], dim=-1)
    writes_BNJKC = (k_BNJCK * decays.write_BNJC.unsqueeze(-1)).transpose(-1, -2)

    if state_BJKV is None:
        state_BJKV = q_BTHK.new_zeros(batch, state_heads, width, value_width, dtype=dtype)
    start_BNJKV, u_BNJCV, end_BJKV = _walk(state_BJKV.to(dtype), fresh_BNJCV, erase_BNJCK, writes_BNJKC, decays)

    q_BNJPCK = q_BNHCK.unflatten(2, (state_heads, heads // state_heads))
    score_BNJPCC = (q_BNJPCK @ k_BNJCK.unsqueeze(3).transpose(-1, -2)) * decays.pair_BNJCC.unsqueeze(3)
    carried_BNJPCK = q_BNJPCK * decays.read_BNJC[:, :, :, None, :, None]
    o_BNJRV = score_BNJPCC.flatten(3, 4) @ u_BNJCV + carried_BNJPCK.flatten(3, 4) @ start_BNJKV  # R = P * C rows
    o_BNHCV = o_BNJRV.unflatten(3, (heads // state_heads, chunk)).flatten(2, 3)
    return o_BNHCV.transpose(2, 3).flatten(1, 2)[:, :length].to(v_BTJV.dtype), end_BJKV


def _decays(log_decay_BNJC: Tensor, segments_BT: Tensor | None, pad: int) -> _Decays:
    """Decay factors. Each exponent is a sum of the decays in between, not a difference of long sums: after a strong
    decay a difference would carry its rounding error, and after -inf it would be NaN."""
    chunk = log_decay_BNJC.shape[-1]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=log_decay_BNJC.device).tril()
    later = log_decay_BNJC.unsqueeze(-1).expand(*log_decay_BNJC.shape, chunk).masked_fill(~causal.tril(-1), 0)
    span_BNJCC = later.cumsum(-2)
    sum_BNJC = log_decay_BNJC.cumsum(-1)
    pair_BNJCC, read_BNJC = span_BNJCC.exp().masked_fill(~causal, 0), sum_BNJC.exp()
    write_BNJC, total_BNJ = pair_BNJCC[..., -1, :], read_BNJC[..., -1]
    if segments_BT is None:
        return _Decays(pair_BNJCC, read_BNJC, write_BNJC, total_BNJ)
    if pad:
        segments_BT = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, pad)], dim=1)
    segment_BNC = segments_BT.unflatten(1, (-1, chunk))
    same_BN1CC = (segment_BNC[..., :, None] == segment_BNC[..., None, :]).unsqueeze(2)
    before_BN1 = torch.cat([segment_BNC[:, :1, :1], segment_BNC[:, :-1, -1:]], dim=1)
    reads_BN1C = (segment_BNC == before_BN1).unsqueeze(2)
    return _Decays(
        pair_BNJCC.masked_fill(~same_BN1CC, 0),
        read_BNJC.masked_fill(~reads_BN1C, 0),
        write_BNJC.masked_fill(~same_BN1CC[..., -1, :], 0),
        total_BNJ.masked_fill(~reads_BN1C[..., -1], 0),
    )


def _walk(
    state_BJKV: Tensor, fresh_BNJCV: Tensor, erase_BNJCK: Tensor, writes_BNJKC: Tensor, decays: _Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """States at the start of each chunk, the corrections u, and the state at the end: two products per chunk."""
    starts, corrections = [], []
    total_BNJ11 = decays.total_BNJ[..., None, None]
    for n in range(fresh_BNJCV.shape[1]):
        starts.append(state_BJKV)
        u_BJCV = fresh_BNJCV[:, n] - erase_BNJCK[:, n] @ state_BJKV
        corrections.append(u_BJCV)
        state_BJKV = total_BNJ11[:, n] * state_BJKV + writes_BNJKC[:, n] @ u_BJCV
    return torch.stack(starts, dim=1), torch.stack(corrections, dim=1), state_BJKV
