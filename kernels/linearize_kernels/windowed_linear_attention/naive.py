"""The definitions of the window's sums and of a decoding step; for tests. Legend in __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.gated_linear_attention import LinearState
from linearize_kernels.hedgehog_attention import hedgehog_features
from linearize_kernels.rotary import rotary
from linearize_kernels.windowed_linear_attention.chunk import LocalState, Sinks, WindowSums
from linearize_kernels.windowed_linear_attention.step import FarStep, NearStep, Token


def naive_window_sums(
    q_BTHK: Tensor, k_BMGK: Tensor, v_BMGV: Tensor, position_BT: Tensor, window: int, sinks: Sinks | None = None
) -> WindowSums:
    """The definition, one query and head at a time; for tests."""
    batch, length, heads, _ = q_BTHK.shape
    share = heads // k_BMGK.shape[2]
    past = k_BMGK.shape[1] - length
    num = q_BTHK.new_zeros(batch, length, heads, v_BMGV.shape[-1])
    den, top = q_BTHK.new_zeros(batch, length, heads), q_BTHK.new_zeros(batch, length, heads)
    for b in range(batch):
        for t in range(length):
            position = int(position_BT[b, t])
            back = range(min(window, position + 1))
            for h in range(heads):
                keys = [k_BMGK[b, past + t - r, h // share] for r in back]
                values = [v_BMGV[b, past + t - r, h // share] for r in back]
                if sinks is not None:
                    x = t if sinks.k_BXSGK.shape[1] > 1 else 0
                    old = [s for s in range(sinks.k_BXSGK.shape[2]) if position - s >= window]
                    keys += [sinks.k_BXSGK[b, x, s, h // share] for s in old]
                    values += [sinks.v_BXSGV[b, x, s, h // share] for s in old]
                if not keys:
                    continue
                score = torch.stack(keys) @ q_BTHK[b, t, h]
                top[b, t, h] = score.max()
                weight = (score - score.max()).exp()
                num[b, t, h], den[b, t, h] = weight @ torch.stack(values), weight.sum()
    return WindowSums(num, den, top)


def naive_window_step(
    token: Token,
    near: NearStep,
    far: FarStep | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    separate: bool = False,
) -> tuple[Tensor, Tensor, LocalState, LinearState | None]:
    """The definition, one row at a time; for tests. y, the window's denominator, and the states."""
    rows = [_row(token, near, far, weights, separate, slice(b, b + 1)) for b in range(token.q_B1HK.shape[0])]
    y, den, *state = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return y, den, LocalState(*state[:6]), None if far is None else LinearState(*state[6:])


def _row(
    token: Token,
    near: NearStep,
    far: FarStep | None,
    weights: tuple[Tensor | None, Tensor | None],
    separate: bool,
    b: slice,
) -> tuple[Tensor, ...]:
    q, k, v, cos, sin, mask = (x if x is None or x.shape[0] == 1 else x[b] for x in token)
    assert q is not None
    assert k is not None
    assert v is not None
    seen, tail_k, tail_v, sink_k, sink_v, far_k = (x[b] for x in near.state)
    real, position, window, sinks = mask is None or bool(mask), int(seen), tail_k.shape[1], sink_k.shape[1]
    turned = (q, k) if cos is None or sin is None else rotary(q, k, cos, sin)
    near_q, near_k = turned if near.rotated else (q, k)
    far_q, new_far = turned if far is not None and far.rotated else (q, k)
    leaves = tail_k[:, :1] if far_k.shape[1] == 0 else far_k[:, :1]
    leaves_v = tail_v[:, :1]
    sums = WindowSums(v.new_zeros(1, 1, q.shape[2], v.shape[-1]), q.new_zeros(q.shape[:3]), q.new_zeros(q.shape[:3]))
    old = Sinks(sink_k[:, None], sink_v[:, None])
    if real:
        tail_k, tail_v = torch.cat([tail_k, near_k], 1)[:, 1:], torch.cat([tail_v, v], 1)[:, 1:]
        far_k = torch.cat([far_k, new_far], 1)[:, 1:] if far_k.shape[1] else far_k
        sums = naive_window_sums(near_q * near.scale, tail_k, tail_v, seen[:, None], window, old)
        place = torch.arange(sinks, device=v.device) == position
        sink_k, sink_v = (torch.where(place[:, None, None], new, x) for new, x in ((near_k, sink_k), (v, sink_v)))
    num, den = sums.num_BTHV, sums.den_BTH
    if near.meta_HL is not None:
        top = torch.maximum(sums.max_BTH.where(den > 0, -torch.inf), near.meta_HL.amax(-1))
        kept = (sums.max_BTH - top).exp().where(den > 0, 0)
        num, den = num * kept.unsqueeze(-1), den * kept + (near.meta_HL - top.unsqueeze(-1)).exp().sum(-1)
    y, window_den = num / den.where(den > 0, 1).unsqueeze(-1), den
    state = (seen + int(real), tail_k, tail_v, sink_k, sink_v, far_k)
    if far is None:
        return y.to(v.dtype), window_den, *state
    brings, key, value = (position >= window + sinks, leaves, leaves_v) if far.left else (True, new_far, v)
    a = hedgehog_features(far_q, *far.query_map, far.feature_map, "query")
    c = hedgehog_features(key, *far.key_map, far.feature_map, "key") * (brings and real)
    value = value.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    s, z = (x[b] for x in far.state)
    if far.gate_B1H is not None and real:
        keep_BH1 = far.gate_B1H[b, 0].sigmoid().unsqueeze(-1)
        s, z = s * keep_BH1.unsqueeze(-1), z * keep_BH1
    s, z = s + c[:, 0].unsqueeze(-1) * value[:, 0].unsqueeze(-2), z + c[:, 0]
    num, den = (a[:, 0].unsqueeze(-2) @ s).transpose(1, 2), (a[:, 0] * z).sum(-1)[:, None]
    near_H, far_H = (den.new_ones(1) if weight is None else weight for weight in weights)
    if separate:
        y = near_H.unsqueeze(-1) * y + far_H.unsqueeze(-1) * num / den.where(den > 0, 1).unsqueeze(-1)
    else:
        beside = window_den * near_H / far_H
        total = den + beside
        y = (num + y * beside.unsqueeze(-1)) / total.where(total > 0, 1).unsqueeze(-1)
    return y.to(v.dtype), window_den, *state, s, z
