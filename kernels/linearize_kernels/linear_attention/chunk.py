"""The chunkwise form in torch: exact, linear in T, no T x T tensor, no loop over chunks.

Shape legend, beside that of __init__.py: N chunks, C tokens per chunk, M = J / G key feature heads per value head,
P = H / J query heads per key feature head. Head h is ((g * M) + m) * P + p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearState(NamedTuple):
    """Running sums over the tokens read so far; fp32 (fp64 for fp64 inputs), independent of how many they were."""

    s_BJFV: Tensor  # sum of k v^T
    z_BJF: Tensor  # sum of k


def chunk_linear_attention(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, LinearState]:
    """Same arguments and results as `linear_attention`; `chunk` is the number of tokens handled quadratically.

    Inside a chunk the masked C x C product is formed; what earlier chunks contribute is one running sum per chunk.
    """
    batch, length, heads, features = q_BTHF.shape
    key_heads, value_heads, width = k_BTJF.shape[2], v_BTGV.shape[2], v_BTGV.shape[3]
    shared, queries = key_heads // value_heads, heads // key_heads
    dtype = torch.promote_types(q_BTHF.dtype, torch.float32)
    chunk = min(chunk, length)
    pad = -length % chunk
    count = (length + pad) // chunk

    def split(x_BTXY: Tensor) -> Tensor:  # [B, T, X, Y] -> [B, N, X, C, Y], zeros after the end
        x_BTXY = F.pad(x_BTXY.to(dtype), (0, 0, 0, 0, 0, pad))
        return x_BTXY.unflatten(1, (count, chunk)).transpose(2, 3)

    q_BNJPCF = split(q_BTHF).unflatten(2, (key_heads, queries))
    k_BNJCF, v_BNGCV = split(k_BTJF), split(v_BTGV)
    seen, carried, reads = _visibility(segments_BT, count, chunk, pad, q_BTHF.device)

    # What each chunk adds to the running sums; folding M into rows means values are never repeated.
    writes_BNJCF = k_BNJCF if carried is None else k_BNJCF * carried.writes_BNC[:, :, None, :, None]
    added_s = (writes_BNJCF.transpose(-1, -2).unflatten(2, (value_heads, shared)).flatten(3, 4) @ v_BNGCV).view(
        batch, count, key_heads, features, width
    )
    added_z = writes_BNJCF.sum(3)
    ends_s, ends_z = _running_sum(added_s, carried), _running_sum(added_z, carried)
    if state is not None:
        ends_s, ends_z = ends_s + state.s_BJFV[:, None], ends_z + state.z_BJF[:, None]
    start_s = _before(ends_s, None if state is None else state.s_BJFV)
    start_z = _before(ends_z, None if state is None else state.z_BJF)

    score_BNJPCC = (q_BNJPCF @ k_BNJCF.unsqueeze(3).transpose(-1, -2)).masked_fill(~seen, 0)
    rows_BNGRC = score_BNJPCC.unflatten(2, (value_heads, shared)).flatten(3, 5)
    inner_BNJPCV = (rows_BNGRC @ v_BNGCV).view(batch, count, key_heads, queries, chunk, width)
    outer_q = q_BNJPCF if reads is None else q_BNJPCF * reads[:, :, None, None, :, None]
    num = inner_BNJPCV + (outer_q.flatten(3, 4) @ start_s).view_as(inner_BNJPCV)
    den = score_BNJPCC.sum(-1) + (outer_q.flatten(3, 4) @ start_z.unsqueeze(-1)).view(score_BNJPCC.shape[:-1])
    y_BNJPCV = num / den.clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
    y_BTHV = y_BNJPCV.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    # Copied, because a view would keep the sums of all chunks in memory for as long as the state lives.
    return y_BTHV.to(v_BTGV.dtype), LinearState(ends_s[:, -1].clone(), ends_z[:, -1].clone())


class _Carried(NamedTuple):
    writes_BNC: Tensor  # 1 where the token belongs to the last document of its chunk: only those reach later chunks
    same_BNN: Tensor  # [n, m] = 1 where chunk m <= n ends in the document that chunk n ends in


def _visibility(
    segments_BT: Tensor | None, count: int, chunk: int, pad: int, device: torch.device
) -> tuple[Tensor, _Carried | None, Tensor | None]:
    """Masks: which pairs in a chunk see each other, what is carried on, and which queries read what was carried."""
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    if segments_BT is None:
        return causal, None, None
    if pad:
        segments_BT = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, pad)], dim=1)
    segment_BNC = segments_BT.unflatten(1, (count, chunk))
    seen = causal & (segment_BNC[..., :, None] == segment_BNC[..., None, :])[:, :, None, None]
    last_BN = segment_BNC[..., -1]
    before_BN = torch.cat([segment_BNC[:, :1, 0], last_BN[:, :-1]], dim=1)
    same_BNN = (last_BN[:, :, None] == last_BN[:, None, :]).tril().float()
    carried = _Carried((segment_BNC == last_BN[..., None]).float(), same_BNN)
    return seen, carried, (segment_BNC == before_BN[..., None]).float()


def _running_sum(added: Tensor, carried: _Carried | None) -> Tensor:
    """Sum over chunks 0..n (dimension 1), of the same document only where rows are packed."""
    if carried is None:
        return added.cumsum(1)
    return torch.einsum("bnm,bm...->bn...", carried.same_BNN.to(added.dtype), added)


def _before(ends: Tensor, start: Tensor | None) -> Tensor:
    """Running sums at the start of each chunk, from those at the ends."""
    first = torch.zeros_like(ends[:, :1]) if start is None else start[:, None].to(ends.dtype)
    return torch.cat([first, ends[:, :-1]], dim=1)
