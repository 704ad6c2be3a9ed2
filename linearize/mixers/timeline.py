"""Where each token stands in its document, and what of the past a mixer with a short memory keeps.

Windows, convolutions and sinks need exact neighbours. Positions count real tokens of the document, so padding, packed
rows and chunked prefill are one case: a token at position p sees at most p tokens back. Legend in base.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.mixers.base import HeadInputs, Rope
from linearize_kernels import Sinks

PutBack = Callable[[Tensor], Tensor]
"""Puts outputs [B, T, ...] back to where their tokens stood."""


@dataclass(frozen=True)
class Timeline:
    """The current tokens' places.

    Attributes:
        position_BT: index of each token in its document, continued from the state; -1 for padding. None = 0, 1, 2, ...
        padding_B: how many of the current tokens are padding, all at the left; None = none anywhere.
        seen_B: real tokens of the row's last document, the current ones included; part of the state, and anything where
            no tokens follow.
        packed: rows hold several documents.
    """

    position_BT: Tensor | None
    padding_B: Tensor | None
    seen_B: Tensor
    packed: bool = False

    def join(self, tail_BNX: Tensor | None, x_BTX: Tensor, count: int) -> Tensor:
        """The `count` tokens before the current ones, then these: [B, count + T, ...]. No tail = zeros.

        Rows with padding have it first, then the tail, then the real tokens: neighbours stay neighbours.
        """
        batch, length = x_BTX.shape[:2]
        if tail_BNX is None:
            tail_BNX = x_BTX.new_zeros(batch, count, *x_BTX.shape[2:])
        joined = torch.cat([tail_BNX.to(x_BTX.dtype), x_BTX], dim=1)
        if self.padding_B is None:
            return joined
        place = torch.arange(count + length, device=x_BTX.device)
        padding = self.padding_B[:, None]
        source = torch.where(
            place < padding, place + count, torch.where(place < padding + count, place - padding, place)
        )
        return take(joined, source)


def begin(heads: HeadInputs, seen_B: Tensor | None) -> tuple[HeadInputs, Timeline, PutBack]:
    """Padding moved to the left, the timeline, and a function that puts outputs [B, T, ...] back where they belong.

    Args:
        seen_B: what the timeline before left in the state; None at the start of a sequence.
    """
    batch, length = heads.q_BTHK.shape[:2]
    device = heads.q_BTHK.device
    if seen_B is None:
        if heads.mask_BT is None and heads.segments_BT is None:  # nothing to compute
            seen_B = torch.empty(batch, dtype=torch.long, device=device)
            return heads, Timeline(None, None, seen_B if heads.last else seen_B.fill_(length)), lambda y_BTX: y_BTX
        seen_B = torch.zeros(batch, dtype=torch.long, device=device)
    if heads.mask_BT is not None:
        assert heads.segments_BT is None, "packed rows have no padding"
        order_BT = heads.mask_BT.long().argsort(dim=1, stable=True)
        back_BT = order_BT.argsort(dim=1)
        heads = _reorder(heads, order_BT)
        assert heads.mask_BT is not None
        position_BT = (seen_B[:, None] + heads.mask_BT.cumsum(1) - 1).masked_fill(~heads.mask_BT, -1)
        real_B = heads.mask_BT.sum(1)
        return heads, Timeline(position_BT, length - real_B, seen_B + real_B), lambda y_BTX: take(y_BTX, back_BT)
    position_BT = seen_B[:, None] + positions(heads)
    if heads.segments_BT is None:
        return heads, Timeline(position_BT, None, seen_B + length), lambda y_BTX: y_BTX
    return heads, Timeline(position_BT, None, position_BT[:, -1] + 1, packed=True), lambda y_BTX: y_BTX


def positions(heads: HeadInputs) -> Tensor:
    """Index [B, T] of each token in its document, counting real tokens only, on sequences from their start."""
    batch, length = heads.q_BTHK.shape[:2]
    if heads.mask_BT is not None:
        return (heads.mask_BT.cumsum(1) - 1).masked_fill(~heads.mask_BT, -1)
    place_T = torch.arange(length, device=heads.q_BTHK.device)
    if heads.segments_BT is None:
        return place_T.expand(batch, -1)
    starts_BT = F.pad(heads.segments_BT[:, 1:] != heads.segments_BT[:, :-1], (1, 0), value=False)
    return place_T - torch.where(starts_BT, place_T, 0).cummax(dim=1).values


def take(x_BTX: Tensor, index_BN: Tensor) -> Tensor:
    """x[b, index[b, n]]: [B, N, ...]."""
    index = index_BN.view(*index_BN.shape, *[1] * (x_BTX.ndim - 2)).expand(-1, -1, *x_BTX.shape[2:])
    return x_BTX.gather(1, index)


def tail_of(joined: Tensor, count: int) -> Tensor:
    """The last `count` tokens, in memory of their own; zeros before the first."""
    tail = joined[:, max(0, joined.shape[1] - count) :]
    missing = count - tail.shape[1]
    return F.pad(tail, (0, 0) * (tail.ndim - 2) + (missing, 0)) if missing else tail.clone()


def find_sinks(
    timeline: Timeline, state: Sinks | None, k_BTGK: Tensor, v_BTGV: Tensor, sinks: int
) -> tuple[Sinks, Sinks]:
    """The first `sinks` tokens of each document: as the current queries see them, and as the state keeps them.

    A sink that has not come yet is anything: queries do not see it, because their positions tell.
    """
    if timeline.position_BT is None:  # sinks stand where rows start
        first = Sinks(*(_first(x, sinks)[:, None] for x in (k_BTGK, v_BTGV)))
        return first, first
    kept = Sinks(
        _kept(timeline, None if state is None else state.k_BXSGK[:, 0], k_BTGK, sinks)[:, None],
        _kept(timeline, None if state is None else state.v_BXSGV[:, 0], v_BTGV, sinks)[:, None],
    )
    if not timeline.packed:
        return kept, kept
    assert timeline.position_BT is not None
    k_BTSGK, v_BTSGV = (first_tokens(x, timeline.position_BT, sinks) for x in (k_BTGK, v_BTGV))
    return Sinks(k_BTSGK, v_BTSGV), kept


def first_tokens(x_BTX: Tensor, position_BT: Tensor, count: int) -> Tensor:
    """The first `count` tokens of each token's document, [B, T, count, ...]; anything where the document is shorter.

    Rows hold whole documents: positions start from 0.
    """
    found: Tensor = _FirstTokens.apply(x_BTX, position_BT, count)
    return found


class _FirstTokens(torch.autograd.Function):
    """A gather whose gradient is a running sum over each document.

    Autograd would add T gradients into the same few rows, one after the other: on an H100 that took longer than all the
    rest of the layer, and its order changed from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_BTX: Tensor, position_BT: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(position_BT)
        length = x_BTX.shape[1]
        place_T = torch.arange(length, device=x_BTX.device)
        source_BTS = (place_T - position_BT).unsqueeze(-1) + torch.arange(count, device=x_BTX.device)
        return take(x_BTX, source_BTS.clamp_max(length - 1).flatten(1)).unflatten(1, (length, count))

    @staticmethod
    def backward(ctx: Any, grad_BTSX: Tensor) -> tuple[Tensor, None, None]:
        (position_BT,) = ctx.saved_tensors
        grad_BTX: Tensor = _sum_over_documents(grad_BTSX, position_BT)
        return grad_BTX, None, None


@torch.library.custom_op("linearize::sum_over_documents", mutates_args=())  # opaque: Inductor of torch 2.11 fails on it
def _sum_over_documents(grad_BTSX: Tensor, position_BT: Tensor) -> Tensor:
    """[B, T, ...]: token p < S of a document gets the sum over the document of entry p along S; other tokens get 0."""
    batch, length, count = grad_BTSX.shape[:3]
    place_T = torch.arange(length, device=grad_BTSX.device)
    ahead_BT = F.pad(torch.where(position_BT == 0, place_T, length)[:, 1:], (0, 1), value=length)
    after_BT = ahead_BT.flip(1).cummin(dim=1).values.flip(1)
    sums = grad_BTSX.to(torch.promote_types(grad_BTSX.dtype, torch.float32)).reshape(batch, length, count, -1).cumsum(1)
    sums = F.pad(sums, (0, 0, 0, 0, 1, 0)).flatten(1, 2)
    entry_BT = position_BT.clamp_max(count - 1)
    total = take(sums, after_BT * count + entry_BT) - take(sums, (place_T - position_BT) * count + entry_BT)
    total = total.masked_fill((position_BT >= count).unsqueeze(-1), 0)
    return total.view(batch, length, *grad_BTSX.shape[3:]).to(grad_BTSX.dtype)


@_sum_over_documents.register_fake
def _(grad_BTSX: Tensor, position_BT: Tensor) -> Tensor:
    return grad_BTSX.new_empty(grad_BTSX.shape[:2] + grad_BTSX.shape[3:])


def _first(x_BTX: Tensor, count: int) -> Tensor:
    """The first `count` tokens, and zeros where there are fewer."""
    missing = count - x_BTX.shape[1]
    return F.pad(x_BTX, (0, 0) * (x_BTX.ndim - 2) + (0, missing)) if missing > 0 else x_BTX[:, :count]


def _kept(timeline: Timeline, state_BSX: Tensor | None, x_BTX: Tensor, sinks: int) -> Tensor:
    """Sink tokens [B, S, ...] of the row's last document, from the state or from the current tokens."""
    batch, length = x_BTX.shape[:2]
    ones = [1] * (x_BTX.ndim - 2)
    index_S = torch.arange(sinks, device=x_BTX.device)
    place_BS = index_S + (length - timeline.seen_B)[:, None]  # where token s stands, if it is a current one
    kept_BSX = take(x_BTX, place_BS.clamp(0, length - 1))
    if state_BSX is not None:
        old_BS = place_BS < (0 if timeline.padding_B is None else timeline.padding_B[:, None])
        kept_BSX = torch.where(old_BS.view(batch, sinks, *ones), state_BSX.to(x_BTX.dtype), kept_BSX)
    unknown_BS = (index_S >= timeline.seen_B[:, None]).view(batch, sinks, *ones)
    return kept_BSX.masked_fill(unknown_BS, 0)


def _reorder(heads: HeadInputs, order_BT: Tensor) -> HeadInputs:
    rope = heads.rope
    if rope is not None:
        cos, sin = (x.expand(order_BT.shape[0], -1, -1) for x in (rope.cos_BTR, rope.sin_BTR))
        rope = Rope(take(cos, order_BT), take(sin, order_BT))
    assert heads.mask_BT is not None
    return replace(
        heads,
        x_BTD=take(heads.x_BTD, order_BT),
        q_BTHK=take(heads.q_BTHK, order_BT),
        k_BTGK=take(heads.k_BTGK, order_BT),
        v_BTGV=take(heads.v_BTGV, order_BT),
        rope=rope,
        mask_BT=heads.mask_BT.gather(1, order_BT),
    )
