"""The chunkwise form in torch: exact, linear in T, no T x T tensor, no loop over chunks.

Shape legend, beside that of __init__.py: N chunks, C tokens per chunk, M = J / G key feature heads per value head,
P = H / J query heads per key feature head. Head h is ((g * M) + m) * P + p. E = 1 for a decay per head, F per feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens handled quadratically."""

FEATURE_CHUNK = 32
"""The same for decays per feature: half of it times MIN_LOG_GATE is an exponent that fp32 still holds."""


class LinearState(NamedTuple):
    """Running sums over the tokens read so far; fp32 (fp64 for fp64 inputs), independent of how many they were."""

    s_BJFV: Tensor  # sum of k v^T
    z_BJF: Tensor  # sum of k


class _Decay(NamedTuple):
    """Factors of one chunk, each <= 1 apart from `pair_q` and `pair_k`, whose products are."""

    pair_BNJ1CC: Tensor | None  # decay from key to query inside the chunk; None where it is in pair_q and pair_k
    pair_q_BNJ1CE: Tensor | None
    pair_k_BNJCE: Tensor | None
    read_BNJ1CE: Tensor  # from the chunk's start to the query
    write_BNJCE: Tensor  # from the key to the chunk's end
    total_BNJE: Tensor  # log decay over the whole chunk


def chunk_linear_sums(
    q_BTHF: Tensor,
    k_BTJF: Tensor,
    v_BTGV: Tensor,
    log_gate: Tensor | None = None,
    state: LinearState | None = None,
    segments_BT: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, LinearState]:
    """Same arguments and results as `linear_sums`; `chunk` is the number of tokens handled quadratically.

    Inside a chunk the masked C x C product is formed; what earlier chunks contribute is one running sum per chunk.
    """
    batch, length, heads, features = q_BTHF.shape
    key_heads, value_heads, width = k_BTJF.shape[2], v_BTGV.shape[2], v_BTGV.shape[3]
    shared, queries = key_heads // value_heads, heads // key_heads
    dtype = torch.promote_types(q_BTHF.dtype, torch.float32)
    chunk = min(chunk or (FEATURE_CHUNK if log_gate is not None and log_gate.ndim == 4 else CHUNK), length)
    pad = -length % chunk
    count = (length + pad) // chunk

    def split(x_BTXY: Tensor) -> Tensor:  # [B, T, X, Y] -> [B, N, X, C, Y], zeros after the end
        x_BTXY = F.pad(x_BTXY.to(dtype), (0, 0, 0, 0, 0, pad))
        return x_BTXY.unflatten(1, (count, chunk)).transpose(2, 3)

    q_BNJPCF = split(q_BTHF).unflatten(2, (key_heads, queries))
    k_BNJCF, v_BNGCV = split(k_BTJF), split(v_BTGV)
    decay = None if log_gate is None else _decay(split(log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1)))
    seen, carried, reads = _visibility(segments_BT, count, chunk, pad, q_BTHF.device)

    # What each chunk adds to the running sums; folding M into rows means values are never repeated.
    writes_BNJCF = k_BNJCF if carried is None else k_BNJCF * carried.writes_BNC[:, :, None, :, None]
    writes_BNJCF = writes_BNJCF if decay is None else writes_BNJCF * decay.write_BNJCE
    added_s = (writes_BNJCF.transpose(-1, -2).unflatten(2, (value_heads, shared)).flatten(3, 4) @ v_BNGCV).view(
        batch, count, key_heads, features, width
    )
    start_s, end_s = _carry(added_s, carried, decay, None if state is None else state.s_BJFV)
    start_z, end_z = _carry(writes_BNJCF.sum(3), carried, decay, None if state is None else state.z_BJF)

    score_BNJPCC = _scores(q_BNJPCF, k_BNJCF, decay).masked_fill(~seen, 0)
    rows_BNGRC = score_BNJPCC.unflatten(2, (value_heads, shared)).flatten(3, 5)
    inner_BNJPCV = (rows_BNGRC @ v_BNGCV).view(batch, count, key_heads, queries, chunk, width)
    outer_q = q_BNJPCF if reads is None else q_BNJPCF * reads[:, :, None, None, :, None]
    outer_q = outer_q if decay is None else outer_q * decay.read_BNJ1CE
    num = inner_BNJPCV + (outer_q.flatten(3, 4) @ start_s).view_as(inner_BNJPCV)
    den = score_BNJPCC.sum(-1) + (outer_q.flatten(3, 4) @ start_z.unsqueeze(-1)).view(score_BNJPCC.shape[:-1])
    num_BTHV = num.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    den_BTH = den.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    return num_BTHV, den_BTH, LinearState(end_s, end_z)


def _decay(gate_BNJCE: Tensor) -> _Decay:
    """Factors of the decays inside each chunk, from their logs."""
    sum_BNJCE = gate_BNJCE.cumsum(3)
    total_BNJE = sum_BNJCE[..., -1, :]
    read, write = sum_BNJCE.exp().unsqueeze(3), (total_BNJE.unsqueeze(3) - sum_BNJCE).exp()
    if gate_BNJCE.shape[-1] == 1:
        line = sum_BNJCE.squeeze(-1)
        pair = (line.unsqueeze(-1) - line.unsqueeze(-2)).clamp_max(0).exp()
        return _Decay(pair.unsqueeze(3), None, None, read, write, total_BNJE)
    middle = sum_BNJCE[:, :, :, sum_BNJCE.shape[3] // 2, None]
    pair_q, pair_k = (sum_BNJCE - middle).exp().unsqueeze(3), (middle - sum_BNJCE).exp()
    return _Decay(None, pair_q, pair_k, read, write, total_BNJE)


def _scores(q_BNJPCF: Tensor, k_BNJCF: Tensor, decay: _Decay | None) -> Tensor:
    """Decayed products [B, N, J, P, C, C]; entries above the diagonal may be anything, infinity too."""
    if decay is None:
        return q_BNJPCF @ k_BNJCF.unsqueeze(3).transpose(-1, -2)
    if decay.pair_BNJ1CC is not None:
        return q_BNJPCF @ k_BNJCF.unsqueeze(3).transpose(-1, -2) * decay.pair_BNJ1CC
    assert decay.pair_q_BNJ1CE is not None
    assert decay.pair_k_BNJCE is not None
    k_BNJ1CF = (k_BNJCF * decay.pair_k_BNJCE).unsqueeze(3)
    return (q_BNJPCF * decay.pair_q_BNJ1CE) @ k_BNJ1CF.transpose(-1, -2)


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


def _carry(
    added: Tensor, carried: _Carried | None, decay: _Decay | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Running sums [B, N, J, F, ...] at the start of each chunk, and at the end of the last one.

    The end is copied, because a view would keep the sums of all chunks in memory for as long as the state lives.
    """
    if decay is None or decay.total_BNJE.shape[-1] == 1:
        ends = _ends_by_matrix(added, carried, decay, state)
    else:
        ends = _ends_by_doubling(added, carried, decay, state)
    first = torch.zeros_like(ends[:, :1]) if state is None else state[:, None].to(ends.dtype)
    return torch.cat([first, ends[:, :-1]], dim=1), ends[:, -1].clone()


def _ends_by_matrix(
    added: Tensor, carried: _Carried | None, decay: _Decay | None, state: Tensor | None
) -> Tensor:
    """Sums over chunks 0..n, of the same document only where rows are packed, decayed by one number per head."""
    if decay is None:
        if carried is None:
            ends = added.cumsum(1)
        else:
            ends = torch.einsum("bnm,bm...->bn...", carried.same_BNN.to(added.dtype), added)
        return ends if state is None else ends + state[:, None]
    total_BJN = decay.total_BNJE.squeeze(-1).transpose(1, 2)
    # log decay from the end of chunk m to the end of chunk n, summed without cancellation: row n adds its own total
    count = total_BJN.shape[-1]
    later = torch.ones(count, count, dtype=torch.bool, device=added.device).tril(-1)
    spans_BJNN = total_BJN.unsqueeze(-1).expand(-1, -1, -1, count).masked_fill(~later, 0).cumsum(2)
    weight_BJNN = spans_BJNN.exp().tril()
    if carried is not None:
        weight_BJNN = weight_BJNN * carried.same_BNN.to(added.dtype).unsqueeze(1)
    ends = (weight_BJNN @ added.transpose(1, 2).flatten(3)).unflatten(3, added.shape[3:]).transpose(1, 2)
    if state is None:
        return ends
    since_BNJ = total_BJN.cumsum(-1).exp().transpose(1, 2)
    return ends + state[:, None] * since_BNJ.view(*since_BNJ.shape, *[1] * (added.ndim - 3))


def _ends_by_doubling(added: Tensor, carried: _Carried | None, decay: _Decay, state: Tensor | None) -> Tensor:
    """The same with a decay per feature: after round r each entry holds the sum over the last 2^r chunks."""
    keep = decay.total_BNJE.exp()
    if carried is not None:  # 0 where the chunk ends in another document than the one before
        same_BN = torch.diagonal(carried.same_BNN, offset=-1, dim1=1, dim2=2).to(keep.dtype)
        keep = keep * F.pad(same_BN, (1, 0), value=1.0)[:, :, None, None]
    ends = added
    if state is not None:
        first = added[:, :1] + state[:, None] * _fit(keep[:, :1], added)
        ends = torch.cat([first, added[:, 1:]], dim=1)
    step, count = 1, added.shape[1]
    while step < count:
        late = ends[:, step:] + ends[:, :-step] * _fit(keep[:, step:], ends)
        ends = torch.cat([ends[:, :step], late], dim=1)
        keep = torch.cat([keep[:, :step], keep[:, step:] * keep[:, :-step]], dim=1)
        step *= 2
    return ends


def _fit(factor_BNJF: Tensor, sums: Tensor) -> Tensor:
    """A factor per feature, shaped for sums with or without a value axis."""
    return factor_BNJF if sums.ndim == 4 else factor_BNJF.unsqueeze(-1)
