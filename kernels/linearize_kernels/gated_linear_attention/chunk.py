"""The chunkwise form in torch: exact, linear in T, no T x T tensor, no loop over chunks.

Shape legend, beside that of __init__.py: N chunks, C tokens per chunk, P = H / J query heads per key feature head
(head h is j * P + p), R = P * C query rows. E = 1 for a decay per head, F per feature; Y = what shares a decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens handled quadratically."""

FEATURE_CHUNK = 32
"""The same for decays per feature: half of it times MIN_LOG_GATE is an exponent that fp32 still holds (e^80, features
up to 6,000)."""

BLOCK = 32
"""Chunks whose sums are carried on by one matrix; more are carried on block by block."""


class LinearState(NamedTuple):
    """Running sums over the tokens read so far; fp32 (fp64 for fp64 inputs), independent of how many they were."""

    s_BJFV: Tensor  # sum of k v^T
    z_BJF: Tensor  # sum of k


class _Visibility(NamedTuple):
    """What documents do to the chunks; None = all are one document."""

    seen_B1NCC: Tensor  # pairs of one document, causal
    reads_B1NC1: Tensor  # the query belongs to the document that the chunk before ended in
    writes_B1NC1: Tensor  # the key belongs to the document that its own chunk ends in
    breaks_B11N: Tensor  # the chunk ends in another document than the one before


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
    length, key_heads, value_heads = q_BTHF.shape[1], k_BTJF.shape[2], v_BTGV.shape[2]
    dtype = torch.promote_types(q_BTHF.dtype, torch.float32)
    per_feature = log_gate is not None and log_gate.ndim == 4
    chunk = min(chunk or (FEATURE_CHUNK if per_feature else CHUNK), length)

    def split(x_BTXY: Tensor) -> Tensor:  # [B, J, N, X / J * C, Y], zeros after the end
        x_BNCJPY = _chunks(x_BTXY.to(dtype), chunk).unflatten(3, (key_heads, -1))
        return x_BNCJPY.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).contiguous()

    def join(x_BJNRY: Tensor) -> Tensor:  # [B, T, H, Y]
        x_BNCJPY = x_BJNRY.unflatten(3, (-1, chunk)).permute(0, 2, 4, 1, 3, 5)
        return x_BNCJPY.flatten(3, 4).flatten(1, 2)[:, :length]

    q_BJNRF, k_BJNCF = split(q_BTHF), split(k_BTJF)
    v_BJNCV = split(v_BTGV.repeat_interleave(key_heads // value_heads, dim=2) if key_heads > value_heads else v_BTGV)
    since_BJNCE = None  # log decay from the chunk's start on
    if log_gate is not None:
        since_BJNCE = split(log_gate if per_feature else log_gate.unsqueeze(-1)).cumsum(3)
    visibility = None if segments_BT is None else _visibility(segments_BT, chunk)

    score_BJNRC = _scores(q_BJNRF, k_BJNCF, since_BJNCE, None if visibility is None else visibility.seen_B1NCC)
    if since_BJNCE is None and visibility is None:
        total_BJEN = k_BJNCF.new_zeros(1, 1, 1, k_BJNCF.shape[2])
    else:
        since_BJNCE = k_BJNCF.new_zeros(1, 1, 1, 1, 1) if since_BJNCE is None else since_BJNCE
        read_BJNCE, write_BJNCE, total_BJEN = _decays(since_BJNCE, visibility)
        q_BJNRF, k_BJNCF = _times(q_BJNRF, read_BJNCE), k_BJNCF * write_BJNCE
    k_BJNFC = k_BJNCF.transpose(-1, -2)
    start_s, end_s = _running(k_BJNFC @ v_BJNCV, total_BJEN, None if state is None else state.s_BJFV)
    start_z, end_z = _running(k_BJNFC.sum(-1), total_BJEN, None if state is None else state.z_BJF)
    num_BJNRV = score_BJNRC @ v_BJNCV + q_BJNRF @ start_s
    den_BJNR1 = score_BJNRC.sum(-1, keepdim=True) + q_BJNRF @ start_z.unsqueeze(-1)
    return join(num_BJNRV), join(den_BJNR1).squeeze(-1), LinearState(end_s, end_z)


def _chunks(x_BTXY: Tensor, chunk: int) -> Tensor:
    """[B, N, C, X, Y], zeros after the end."""
    pad = -x_BTXY.shape[1] % chunk
    return (F.pad(x_BTXY, (0, 0, 0, 0, 0, pad)) if pad else x_BTXY).unflatten(1, (-1, chunk))


def _times(x_BJNRY: Tensor, factor_BJNCE: Tensor) -> Tensor:
    """Every query head's rows times the factors of their tokens."""
    return (x_BJNRY.unflatten(3, (-1, factor_BJNCE.shape[3])) * factor_BJNCE.unsqueeze(3)).flatten(3, 4)


def _visibility(segments_BT: Tensor, chunk: int) -> _Visibility:
    """Masks of packed rows. What comes in belongs to the first token's document."""
    pad = -segments_BT.shape[1] % chunk
    if pad:  # no clamped index: Inductor of torch 2.11 cannot compile it
        segments_BT = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, pad)], dim=1)
    segment_B1NC = segments_BT.unflatten(1, (-1, chunk)).unsqueeze(1)
    last_B1N1 = segment_B1NC[..., -1:]
    before_B1N1 = torch.cat([segment_B1NC[:, :, :1, :1], last_B1N1[:, :, :-1]], dim=2)
    causal_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=segments_BT.device).tril()
    return _Visibility(
        causal_CC & (segment_B1NC.unsqueeze(-1) == segment_B1NC.unsqueeze(-2)),
        (segment_B1NC == before_B1N1).unsqueeze(-1),
        (segment_B1NC == last_B1N1).unsqueeze(-1),
        (before_B1N1 != last_B1N1).transpose(-1, -2),
    )


def _decays(since_BJNCE: Tensor, visibility: _Visibility | None) -> tuple[Tensor, Tensor, Tensor]:
    """Factors from the chunk's start to its queries, from its keys to its end, and the log of that over the chunk."""
    end_BJN1E = since_BJNCE[:, :, :, -1:]
    read, write = since_BJNCE.exp(), (end_BJN1E - since_BJNCE).exp()
    total_BJEN = end_BJN1E.squeeze(3).transpose(-1, -2)
    if visibility is None:
        return read, write, total_BJEN
    total_BJEN = torch.where(visibility.breaks_B11N, float("-inf"), total_BJEN)
    return read * visibility.reads_B1NC1, write * visibility.writes_B1NC1, total_BJEN


def _scores(q_BJNRF: Tensor, k_BJNCF: Tensor, since_BJNCE: Tensor | None, seen: Tensor | None) -> Tensor:
    """Decayed products inside the chunks [B, J, N, R, C], 0 where nothing is seen."""
    chunk = k_BJNCF.shape[3]
    if seen is None:
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q_BJNRF.device).tril()
    if since_BJNCE is not None and since_BJNCE.shape[-1] == 1:
        pair_BJNCC = (since_BJNCE - since_BJNCE.transpose(-1, -2)).masked_fill(~seen, float("-inf")).exp()
        return _times(q_BJNRF @ k_BJNCF.transpose(-1, -2), pair_BJNCC)
    if since_BJNCE is not None:  # counted from the middle: neither factor leaves the range of fp32
        middle_BJNCF = since_BJNCE - since_BJNCE[:, :, :, chunk // 2, None]
        q_BJNRF, k_BJNCF = _times(q_BJNRF, middle_BJNCF.exp()), k_BJNCF * (-middle_BJNCF).exp()
    score_BJNRC = q_BJNRF @ k_BJNCF.transpose(-1, -2)  # where the key comes later: anything, infinity too
    return score_BJNRC.unflatten(3, (-1, chunk)).masked_fill(~seen.unsqueeze(-3), 0).flatten(3, 4)


def _running(added_BJNX: Tensor, total_BJEN: Tensor, state_BJX: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums at the start of each chunk, [B, J, N, F] or [B, J, N, F, V], and after the last one.

    Args:
        added_BJNX: what each chunk adds.
        total_BJEN: log decay over each chunk, -inf = nothing goes on.
        state_BJX: the sums before; None = 0.
    """
    added_BJENY = added_BJNX.flatten(3).unflatten(3, (total_BJEN.shape[2], -1)).transpose(2, 3)
    state_BJEY = None
    if state_BJX is not None:
        state_BJEY = state_BJX.to(added_BJNX.dtype).flatten(2).unflatten(2, (total_BJEN.shape[2], -1))
    starts_BJENY, end_BJEY = _scan(added_BJENY, total_BJEN, state_BJEY)
    start_BJNX = starts_BJENY.transpose(2, 3).reshape(added_BJNX.shape)
    return start_BJNX, end_BJEY.reshape(added_BJNX[:, :, 0].shape)


def _scan(added_BJENY: Tensor, total_BJEN: Tensor, state_BJEY: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_running`, by one matrix over chunks: its logs are sums of the gates, never differences of such sums.

    More than BLOCK chunks are scanned in blocks, each from nothing; then the blocks are scanned.
    """
    count, shared = added_BJENY.shape[3], total_BJEN.shape[2]
    if count > BLOCK:
        pad = -count % BLOCK
        added_BJENY = F.pad(added_BJENY, (0, 0, 0, pad)).unflatten(3, (-1, BLOCK)).flatten(2, 3)
        total_BJEN = F.pad(total_BJEN, (0, pad)).unflatten(3, (-1, BLOCK)).flatten(2, 3)
        inner, ends = _scan(added_BJENY, total_BJEN, None)
        ends, totals = ends.unflatten(2, (shared, -1)), total_BJEN.sum(-1).unflatten(2, (shared, -1))
        outer, end = _scan(ends, totals, state_BJEY)
        starts = inner + outer.flatten(2, 3).unsqueeze(3) * _before(total_BJEN).exp().unsqueeze(-1)
        return starts.unflatten(2, (shared, -1)).flatten(3, 4)[:, :, :, :count], end
    ones_NN = torch.ones(count, count, dtype=torch.bool, device=added_BJENY.device)
    # row n, column m: the logs of chunks m + 1 .. n - 1
    rows_BJENN = F.pad(total_BJEN[..., :-1], (1, 0)).unsqueeze(-1).expand(*total_BJEN.shape, count)
    log_BJENN = rows_BJENN.masked_fill(~ones_NN.tril(-2), 0).cumsum(-2)
    starts = log_BJENN.exp().masked_fill(~ones_NN.tril(-1), 0) @ added_BJENY
    if state_BJEY is not None:
        starts = starts + state_BJEY.unsqueeze(3) * _before(total_BJEN).exp().unsqueeze(-1)
    return starts, starts[:, :, :, -1] * total_BJEN[..., -1:].exp() + added_BJENY[:, :, :, -1]


def _before(total_BJEN: Tensor) -> Tensor:
    """Log decay from the first chunk's start to each chunk's start."""
    return F.pad(total_BJEN[..., :-1], (1, 0)).cumsum(-1)
