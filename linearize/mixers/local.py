"""The exact branch that several mixers share: softmax over a sliding window and over sink tokens.

Sink tokens are the first of the document (arXiv 2309.17453): teachers park attention there that no other key gets.
Legend in base.py; W window, S sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.mixers.base import HeadInputs, HeadShapes, MixerState, StudentMixer
from linearize.mixers.timeline import Timeline, find_sinks, positions, tail_of
from linearize_kernels import (
    Branch,
    Far,
    LocalState,
    Near,
    Sinks,
    query_dtype,
    window_attention,
    windowed_linear_attention,
)
from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_linear_attention import MIN_LOG_GATE

SMALLEST = 1e-30


@dataclass(frozen=True)
class Local:
    """Which keys are attended to exactly, and how."""

    window: int
    sinks: int
    rope: bool
    scaling: float
    far_rope: bool | None = None  # whether the other branch wants rotated keys; None = there is none

    @property
    def own_far_keys(self) -> bool:
        """Keys that leave the window differ from those inside, so that both kinds are kept."""
        return self.far_rope is not None and self.far_rope != self.rope

    def queries_and_keys(self, heads: HeadInputs, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """q (rotated if `rope`, scaled) and k (rotated if `rope`), computed in fp32 at least; in `dtype` if given."""
        q_BTHK, k_BTGK = heads.q_BTHK, heads.k_BTGK
        exact = torch.promote_types(q_BTHK.dtype, torch.float32)
        if self.rope and heads.rope is not None:
            return heads.rope.rotate_both(q_BTHK, k_BTGK, self.scaling, dtype or exact)
        return (q_BTHK.to(exact) * self.scaling).to(dtype or exact), k_BTGK.to(dtype or exact)


LOCAL_TENSORS = len(LocalState._fields)
"""A mixer's own state follows these."""


class Read(NamedTuple):
    """What the exact branch reads, its new state, and the keys that have just left it, one for each current token."""

    near: Near
    window: int
    position_BT: Tensor | None  # None = 0, 1, 2, ...
    state: MixerState  # `LocalState`; empty where no tokens follow
    left_k_BTGK: Tensor  # the key `window` tokens before, rotated as `far_rope` says; the token's own, if `delayed`
    left_v_BTGV: Tensor
    left_BT: Tensor | None  # True where there is such a key and no sink keeps it; None: so from window + sinks on
    delayed: bool

    def attend(self) -> Branch:
        """The exact branch alone."""
        near = self.near
        return window_attention(*near[:3], self.window, self.position_BT, near.sinks, near.meta_HL)


def read(heads: HeadInputs, timeline: Timeline, local: Local, state: LocalState | None) -> Read:
    """The exact branch of the current tokens; `heads` and `timeline` as `timeline.begin` gave them."""
    v_BTGV, dtype = heads.v_BTGV, heads.v_BTGV.dtype
    q_BTHK, k_BTGK = local.queries_and_keys(heads, query_dtype(heads.q_BTHK, v_BTGV))
    # kept in the values' dtype, so that prefill reads what decoding will read
    k_BTGK = k_BTGK.to(dtype)
    window, length = local.window, k_BTGK.shape[1]
    k_far = k_BTGK
    if local.own_far_keys:
        k_far = heads.k_BTGK if not local.far_rope or heads.rope is None else heads.rope.rotate(heads.k_BTGK)
        k_far = k_far.to(dtype)
    fresh = state is None and timeline.padding_B is None
    joined_k, joined_v, joined_far = k_BTGK, v_BTGV, k_far
    if not fresh:
        tails = (None, None, None) if state is None else (state.k_BWGK, state.v_BWGV, state.far_k_BWGK)
        joined_k, joined_v = timeline.join(tails[0], k_BTGK, window), timeline.join(tails[1], v_BTGV, window)
        joined_far = timeline.join(tails[2], k_far, window) if local.own_far_keys else joined_k
    seen, kept = None, Sinks(k_BTGK[:, None, :0], v_BTGV[:, None, :0])
    if local.sinks:
        old = None if state is None else Sinks(state.sink_k_BSGK[:, None], state.sink_v_BSGV[:, None])
        seen, kept = find_sinks(timeline, old, k_BTGK, v_BTGV, local.sinks)
    after: MixerState = ()
    if not heads.last:
        after = LocalState(
            timeline.seen_B,
            tail_of(joined_k, window),
            tail_of(joined_v, window),
            kept.k_BXSGK[:, 0].clone(),
            kept.v_BXSGV[:, 0].clone(),
            tail_of(joined_far, window) if local.own_far_keys else torch.zeros_like(k_BTGK[:, :0]),
        )
    position_BT = timeline.position_BT
    return Read(
        Near(q_BTHK, joined_k, joined_v, seen),
        window,
        position_BT,
        after,
        joined_far[:, :length],
        joined_v[:, :length],
        None if position_BT is None else position_BT >= window + local.sinks,
        delayed=fresh,
    )


def decodes(heads: HeadInputs, state: MixerState, mixer: StudentMixer, features: int = 0) -> bool:
    """Whether `decoding` takes these heads: one token a row, not differentiated; `features` per sign."""
    q_BTHK, v_BTGV = heads.q_BTHK, heads.v_BTGV
    if q_BTHK.shape[1] != 1 or heads.segments_BT is not None:
        return False
    if torch.is_grad_enabled():
        read = (heads.x_BTD, q_BTHK, heads.k_BTGK, v_BTGV, *state, *mixer.parameters())
        if any(x.requires_grad for x in read):
            return False
    return uses_triton("window_step", v_BTGV, q_BTHK.shape[-1], v_BTGV.shape[-1], 2 * features)


def far_share(read: Read, far: Far, segments_BT: Tensor | None, weights: Weights) -> Tensor:
    """The linear branch's share of the denominator, [B, T, H]: what it answers to values of 1, the window's being 0."""
    near, sinks = read.near, read.near.sinks
    near = near._replace(
        v_BMGV=torch.zeros_like(near.v_BMGV),
        sinks=None if sinks is None else sinks._replace(v_BXSGV=torch.zeros_like(sinks.v_BXSGV)),
    )
    far = far._replace(v_BTGV=torch.ones_like(far.v_BTGV), state=None)
    y_BTHV, _ = windowed_linear_attention(near, far, read.window, read.position_BT, segments_BT, weights)
    return y_BTHV[..., 0]


Weights = tuple[Tensor | None, Tensor | None]
"""Of the window and of the linear branch, [H] each; None = 1."""


def weigh(learned: Weights, mixer: StudentMixer, like_H: Tensor) -> Weights:
    """What was learned, and 0 for a branch that is silenced."""
    near_H = learned[0] if mixer.window_branch else torch.zeros_like(like_H)
    far_H = learned[1] if mixer.linear_branch else torch.zeros_like(like_H)
    return near_H, far_H


def local_state(state: MixerState | None) -> LocalState | None:
    """The first tensors of a mixer's state."""
    return None if state is None else LocalState(*state[:LOCAL_TENSORS])


def local_state_bytes(local: Local, shapes: HeadShapes, dtype: torch.dtype) -> int:
    """Bytes of `LocalState` per sequence."""
    element = torch.finfo(dtype).bits // 8
    exact = (local.window + local.sinks) * (shapes.key_width + shapes.value_width)
    far = local.window * shapes.key_width if local.own_far_keys else 0
    return 8 + element * shapes.key_heads * (exact + far)


class LocalRows:
    """exp(score - max) of the exact branch by query rows, on whole sequences.

    Quadratic in memory per row block: for objectives on attention weights, diagnostics and tests.
    """

    def __init__(self, heads: HeadInputs, local: Local) -> None:
        self.heads, self.window = heads, local.window
        self.q_BTHK, k_BTGK = local.queries_and_keys(heads)
        k_BTGK = k_BTGK.to(heads.v_BTGV.dtype).to(k_BTGK.dtype)
        self.k_BTHK = k_BTGK.repeat_interleave(self.q_BTHK.shape[2] // k_BTGK.shape[2], dim=2)
        self.position_BT = positions(heads)
        self.sink_BT = self.position_BT < local.sinks

    def split(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The keys that rows start..stop see exactly, and those left to the other branch: bool [B, 1, R, T]."""
        back_BRT = self.position_BT[:, start:stop, None] - self.position_BT[:, None]
        exact_BHRT = (back_BRT < self.window)[:, None] | self.sink_BT[:, None, None]
        seen = self.heads.seen(start, stop)
        return seen & exact_BHRT, seen & ~exact_BHRT

    def weights(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """exp(score - max) [B, H, R, T], 0 outside, and max [B, H, R, 1]."""
        score = torch.einsum("bihk,bjhk->bhij", self.q_BTHK[:, start:stop], self.k_BTHK)
        score = score.masked_fill(~self.split(start, stop)[0], float("-inf"))
        top = score.amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0)
        return (score - top).exp(), top


def where_far(share_BTH: Tensor, heads: HeadInputs, local: Local) -> Tensor:
    """NaN for queries all of whose keys are attended to exactly; whole sequences."""
    near_BT = positions(heads) < local.window + local.sinks
    return share_BTH.masked_fill(near_BT.unsqueeze(-1), float("nan"))


def divide(num_BTHV: Tensor, den_BTH: Tensor) -> Tensor:
    """num / den, and 0 where nothing was seen. Denominators below SMALLEST count as nothing: gradients stay finite."""
    return num_BTHV / den_BTH.where(den_BTH > SMALLEST, 1).unsqueeze(-1)


def decayed_rows(q_BTHF: Tensor, k_BTHF: Tensor, log_gate_BTHF: Tensor, start: int, stop: int) -> Tensor:
    """sum_f q_if k_jf exp(sum of the log gates after j up to i) of rows start..stop, [B, H, R, T]; not causal.

    Row by row: decays per feature do not leave the sum over features.
    """
    since_BTHF = log_gate_BTHF.clamp_min(MIN_LOG_GATE).cumsum(1)
    decays = ((since_BTHF[:, i, None] - since_BTHF).clamp_max(0).exp() for i in range(start, stop))
    rows = [torch.einsum("bhf,bjhf->bhj", q_BTHF[:, start + n], k_BTHF * decay) for n, decay in enumerate(decays)]
    return torch.stack(rows, dim=2)
