"""Artificial hippocampus network (arXiv 2510.07318), in the form with a gated delta rule: the teacher's softmax over a
window and sinks, and a delta-rule state for the keys that have left the window.

    S_t = alpha_j (I - beta_j k_j k_j^T) S_t-1 + beta_j k_j v_j^T,   o_t = S_t^T q_t,   j = t - W,   |q_t| = |k_j| = 1

Two forms. `published` follows the authors' code and adds its outputs to the window's. Ours reads q and k before RoPE,
through learned maps, and mixes both outputs. Shape legend in base.py; W window, J heads of states, C = 2 J.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, StudentMixer
from linearize.mixers.delta import START_BETA, Activation, log_decay, mapped, start_decay, unit
from linearize.mixers.feature_maps import start_maps
from linearize.mixers.gates import HalfLife
from linearize.mixers.local import LOCAL_TENSORS, Local, decodes, local_state, local_state_bytes, read
from linearize.mixers.timeline import PutBack, begin, positions, tail_of
from linearize_kernels.gated_delta import gated_delta_rule

START_SHARE = 0.1
"""Of the state in the mix."""

NORM_EPSILON = 1e-5
"""Of the published RMSNorm, of outputs whose queries are multiplied by K^-0.5."""

GATE_STD = 0.02
"""Spread of the published gates' weights at the start; our reading (a linear layer of the authors' teacher)."""

RATES, STEPS = (0.0, 16.0), (1e-3, 0.1)
"""Ranges that the published A (evenly) and softplus(dt_bias) (evenly in the log) are drawn from."""


class AhnConfig(MixerConfig):
    """Options of the artificial hippocampus network."""

    kind: Literal["ahn"] = "ahn"
    published: bool = Field(False, description="the authors' form: rotated q and k as they are, outputs added")
    window: int = Field(128, ge=1, le=32_768, description="keys that are attended to exactly, the query's own included")
    sinks: int = Field(4, ge=0, le=128, description="first tokens that stay in the exact branch")
    half_life: HalfLife | None = Field(
        None, description="tokens; heads start spread between the two. Default: 16 to 512, drawn at random if published"
    )

    @property
    def window_beside_linear(self) -> int:
        return self.window


class _Left(NamedTuple):
    """What has just left the window, one key for each current token."""

    k_BTGK: Tensor
    v_BTGV: Tensor
    gates_BTC: Tensor  # log alpha, then beta, of the keys' own tokens
    real_BT: Tensor  # False: no such key, or a sink


class Ahn(StudentMixer):
    """alpha, beta are gates of the token that leaves, read off its own x; o_t is 0 until one has left.

        alpha_j = exp(-exp(A_log) softplus(x_j w_a + dt_bias)),  beta_j = sigmoid(x_j w_b + b)

    published: y_t = o^W_t + W_h (RMSNorm(K^-0.5 o_t) * silu(x_t w_g)), with a state per query head, q and k as the
               teacher rotates them, b = 0, and W_h = 0 at the start: the student begins as the window alone.
    ours:      y_t = (1 - lambda_t) o^W_t + lambda_t s * o_t, with lambda_t = sigmoid(x_t w_l + c) per head for tokens
               that a key has left, else 0; s a scale per channel; q and k = silu(q W + b) of the teacher's before RoPE,
               a state per key/value head.

    Starts, ours: as `gdn` (maps identities, half-lives of 16 to 512 tokens, beta 1/4); s = 1, lambda 1/10.

    There are no attention weights, as in `gdn`.
    """

    rows = "none"

    def __init__(self, config: AhnConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        heads, groups, width, value_width = shapes.query_heads, shapes.key_heads, shapes.key_width, shapes.value_width
        self.local = Local(config.window, config.sinks, True, shapes.scaling, far_rope=config.published)
        self.state_heads = heads if config.published else groups

        def parameter(wanted: bool, *sizes: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(sizes)) if wanted else None

        ours = not config.published
        self.query_weight_HKK = parameter(ours, heads, width, width)
        self.query_bias_HK = parameter(ours, heads, width)
        self.key_weight_GKK = parameter(ours, groups, width, width)
        self.key_bias_GK = parameter(ours, groups, width)
        self.scale_HV = parameter(ours, heads, value_width)
        self.norm_weight_V = parameter(config.published, value_width)
        self.output_weight_HVV = parameter(config.published, heads, value_width, value_width)
        self.decay = nn.Linear(shapes.width, self.state_heads)
        self.decay_log_rate_J = nn.Parameter(torch.empty(self.state_heads))
        self.beta = nn.Linear(shapes.width, self.state_heads, bias=ours)
        self.gate = nn.Linear(shapes.width, heads, bias=ours)  # lambda, or the published output gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            start_maps((self.query_weight_HKK, self.key_weight_GKK), (self.query_bias_HK, self.key_bias_GK))
            for ones in (self.scale_HV, self.norm_weight_V):
                if ones is not None:
                    ones.fill_(1.0)
            if self.output_weight_HVV is not None:
                self.output_weight_HVV.zero_()
            for linear, start in ((self.beta, START_BETA), (self.gate, START_SHARE)):
                if linear.bias is None:
                    linear.weight.normal_(std=GATE_STD)
                else:
                    linear.weight.zero_()
                    linear.bias.fill_(math.log(start / (1 - start)))
            if self.config.published and self.config.half_life is None:
                self.decay.weight.normal_(std=GATE_STD)
                self.decay_log_rate_J.uniform_(*RATES).log_()
                step_J = torch.empty_like(self.decay.bias).uniform_(*map(math.log, STEPS)).exp()
                self.decay.bias.copy_(step_J.expm1().log())  # the inverse of softplus
            else:
                start_decay(self.decay, self.decay_log_rate_J, self.config.half_life or (16.0, 512.0))

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        matrix = self.shapes.key_width * self.shapes.value_width
        gates = 2 * self.config.window
        return local_state_bytes(self.local, self.shapes, dtype) + 4 * self.state_heads * (matrix + gates)

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        if state is not None and decodes(heads, state, self):
            y_BTHV, after = self._decode(heads, state)
            return y_BTHV.to(heads.v_BTGV.dtype), after
        ordered, put_back, near_BTHV, left, kept = self._read(heads, state)
        o_BTHV, s_BJKV = self._recall(ordered, left, state)
        y_BTHV = self._mix(ordered, near_BTHV, o_BTHV, left.real_BT)
        return put_back(y_BTHV).to(heads.v_BTGV.dtype), (*kept, s_BJKV)

    def _decode(self, heads: HeadInputs, state: MixerState) -> tuple[Tensor, MixerState]:
        """One token, its window in one launch."""
        from linearize.mixers.decoding import decode

        before, gates_BWC = local_state(state), state[LOCAL_TENSORS]
        assert before is not None
        near, exact = decode(heads, self.local, state)
        real_B1 = before.seen_B[:, None] >= self.config.window + self.config.sinks
        after_BWC = torch.cat([gates_BWC[:, 1:], self._gates(heads)], dim=1)
        if heads.mask_BT is not None:
            real_B1 = real_B1 & heads.mask_BT
            after_BWC = torch.where(heads.mask_BT.unsqueeze(-1), after_BWC, gates_BWC)
        k_BWGK = before.far_k_BWGK if self.local.own_far_keys else before.k_BWGK
        left = _Left(k_BWGK[:, :1], before.v_BWGV[:, :1], gates_BWC[:, :1], real_B1)
        o_BTHV, s_BJKV = self._recall(heads, left, state)
        return self._mix(heads, near.o_BTHV, o_BTHV, real_B1), (*exact, after_BWC, s_BJKV)

    def _read(
        self, heads: HeadInputs, state: MixerState | None
    ) -> tuple[HeadInputs, PutBack, Tensor, _Left, MixerState]:
        """The heads in order, the window's outputs, what has left it, and the states of both."""
        before, (batch, length), window = local_state(state), heads.q_BTHK.shape[:2], self.config.window
        heads, timeline, put_back = begin(heads, None if before is None else before.seen_B)
        exact = read(heads, timeline, self.local, before)
        k_BTGK, v_BTGV, real_BT = exact.left_k_BTGK, exact.left_v_BTGV, exact.left_BT
        if exact.delayed:
            late = min(window, length)
            k_BTGK, v_BTGV = (timeline.join(None, x_BTGX, late)[:, :length] for x_BTGX in (k_BTGK, v_BTGV))
        if real_BT is None:
            place_T = torch.arange(length, device=k_BTGK.device)
            real_BT = (place_T >= window + self.config.sinks).expand(batch, -1)
        joined_BTC = timeline.join(None if state is None else state[LOCAL_TENSORS], self._gates(heads), window)
        left = _Left(k_BTGK, v_BTGV, joined_BTC[:, :length], real_BT)
        kept = exact.state if heads.last else (*exact.state, tail_of(joined_BTC, window))
        return heads, put_back, exact.attend().o_BTHV, left, kept

    def _gates(self, heads: HeadInputs) -> Tensor:
        """log alpha and beta of each token, [B, T, 2 J]."""
        beta_BTJ = self.beta(heads.x_BTD.to(self.beta.weight.dtype)).sigmoid()
        return torch.cat([log_decay(heads.x_BTD, self.decay, self.decay_log_rate_J), beta_BTJ], dim=-1)

    def _recall(self, heads: HeadInputs, left: _Left, state: MixerState | None) -> tuple[Tensor, Tensor]:
        """o_t [B, T, H, V] in fp32 at least, and the delta rule's state."""
        q_BTHK, k_BTGK, v_BTGV = heads.q_BTHK, left.k_BTGK, left.v_BTGV
        activation: Activation = "silu"
        if self.config.published:
            activation = "none"
            q_BTHK = q_BTHK if heads.rope is None else heads.rope.rotate(q_BTHK)
            repeats = self.shapes.query_heads // self.shapes.key_heads
            k_BTGK, v_BTGV = (x_BTGX.repeat_interleave(repeats, dim=2) for x_BTGX in (k_BTGK, v_BTGV))
        q_BTHK = unit(mapped(q_BTHK, self.query_weight_HKK, self.query_bias_HK, activation))
        k_BTJK = unit(mapped(k_BTGK, self.key_weight_GKK, self.key_bias_GK, activation))
        log_alpha_BTJ, beta_BTJ = (left.gates_BTC * left.real_BT.unsqueeze(-1)).chunk(2, dim=-1)
        return gated_delta_rule(
            q_BTHK,
            k_BTJK * left.real_BT[:, :, None, None],
            v_BTGV.to(q_BTHK.dtype),
            log_alpha_BTJ,
            beta_BTJ,
            None if state is None else state[LOCAL_TENSORS + 1],
            heads.segments_BT,
        )

    def _mix(self, heads: HeadInputs, near_BTHV: Tensor, o_BTHV: Tensor, real_BT: Tensor) -> Tensor:
        """Both branches' outputs as one."""
        near_BTHV = near_BTHV.to(o_BTHV.dtype)
        if self.config.published:
            far_BTHV = self._added(heads, o_BTHV)
            return near_BTHV * float(self.window_branch) + far_BTHV * float(self.linear_branch)
        assert self.scale_HV is not None
        share_BTH1 = self._share(heads, real_BT).unsqueeze(-1)
        return (1 - share_BTH1) * near_BTHV * float(self.window_branch) + share_BTH1 * self.scale_HV * o_BTHV

    def _added(self, heads: HeadInputs, o_BTHV: Tensor) -> Tensor:
        """What the published form adds to the window's outputs."""
        assert self.norm_weight_V is not None
        assert self.output_weight_HVV is not None
        epsilon = NORM_EPSILON * self.shapes.key_width  # o is K^0.5 times the authors'
        o_BTHV = o_BTHV * (o_BTHV.square().mean(-1, keepdim=True) + epsilon).rsqrt() * self.norm_weight_V
        open_BTH = F.silu(self.gate(heads.x_BTD.to(self.gate.weight.dtype)))
        return torch.einsum("bthv,hvw->bthw", o_BTHV * open_BTH.unsqueeze(-1), self.output_weight_HVV)

    def _share(self, heads: HeadInputs, real_BT: Tensor) -> Tensor:
        """lambda [B, T, H]."""
        if not self.linear_branch:
            return torch.zeros_like(heads.q_BTHK[..., 0], dtype=self.gate.weight.dtype)
        if not self.window_branch:
            return torch.ones_like(heads.q_BTHK[..., 0], dtype=self.gate.weight.dtype)
        return self.gate(heads.x_BTD.to(self.gate.weight.dtype)).sigmoid() * real_BT.unsqueeze(-1)

    def readings(self, heads: HeadInputs) -> Readings:
        log_alpha_BTJ = log_decay(heads.x_BTD, self.decay, self.decay_log_rate_J)
        if heads.mask_BT is not None:
            log_alpha_BTJ = log_alpha_BTJ * heads.mask_BT.unsqueeze(-1)
        far_BT = positions(heads) >= self.config.window + self.config.sinks
        if self.config.published:
            ordered, put_back, near_BTHV, left, _ = self._read(heads, None)
            added_BTHV = self._added(ordered, self._recall(ordered, left, None)[0])
            near_BTH, added_BTH = (put_back(x_BTHV).float().norm(dim=-1) for x_BTHV in (near_BTHV, added_BTHV))
            share_BTH = added_BTH * float(self.linear_branch) / (near_BTH + added_BTH)
        else:
            share_BTH = self._share(heads, far_BT)
        return Readings(log_alpha_BTJ, share_BTH.masked_fill(~far_BT.unsqueeze(-1), float("nan")))
