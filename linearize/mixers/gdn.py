"""Gated DeltaNet (arXiv 2412.06464) on a teacher's heads: a decaying state that is corrected under each key.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_t-1 + beta_t k_t v_t^T,   o_t = S_t^T q_t,   |q_t| = |k_t| = 1

Shape legend in base.py; S taps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, StudentMixer
from linearize.mixers.delta import EPSILON, START_BETA, Activation, log_decay, mapped, start_decay, unit
from linearize.mixers.feature_maps import start_maps
from linearize.mixers.gates import OPEN_GATE, HalfLife
from linearize.mixers.timeline import Timeline, begin
from linearize_kernels import causal_convs
from linearize_kernels.gated_delta import gated_delta_rule


class GdnConfig(MixerConfig):
    """Options of the gated delta rule mixer."""

    kind: Literal["gdn"] = "gdn"
    maps: bool = Field(True, description="learned linear maps with bias on q per query head, on k per key head")
    conv: int = Field(0, ge=0, le=32, description="taps of the convolutions on q, k and v; 0 = none; published: 4")
    activation: Activation = Field("silu", description="on q and k, before their length is set to 1")
    rope: bool = Field(False, description="apply the teacher's RoPE to q and k, after the activation")
    half_life: HalfLife = Field((16.0, 512.0), description="tokens; key heads start spread between the two")
    norm: Literal["none", "rms"] = Field("none", description="of outputs: a scale per head, or RMSNorm (published)")
    gate: bool = Field(True, description="output gate silu(x W + b) per channel; starts open")

    @field_validator("conv")
    @classmethod
    def _earlier_tokens(cls, conv: int) -> int:
        if conv == 1:
            raise ValueError("a convolution of 1 tap sees no earlier token; use 0 for none, or 2 and more")
        return conv


class _Tails(NamedTuple):
    """What the convolutions need of the tokens before."""

    seen_B: Tensor
    q_BSHK: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor


class Gdn(StudentMixer):
    """One state per key/value head, [B, G, K, V], that the query heads of a group share; no normaliser.

        alpha_t = exp(-exp(A_log) softplus(x_t w_a + dt_bias)),  beta_t = sigmoid(x_t w_b + b)    per key head
        q_t = unit(activation(conv(q) W + c)), k_t likewise, v_t = conv(v);   y_t = norm(o_t) * silu(x_t W_g + b_g)

    Published: queries are also multiplied by K^-0.5 (RMSNorm undoes it), maps come from the model width, and v passes a
    SiLU. Ours: the teacher's heads through the maps, and these starts:
        - maps are identities, convolutions the current token only, the output gate 1;
        - queries keep length 1 and the scale is 1: reading a key just written with beta = 1 gives its value back;
        - w_a = w_b = 0: gates begin as constants. A = 1 and softplus(dt_bias) = log(2) / half-life, with half-lives
          spread evenly in the log: the default's rates, 0.0014 to 0.043, lie in the published range of 0.001 to 0.1;
        - beta = 0.25: what is read under a key is a running mean over about four tokens with that key, as softmax would
          average them; 0.5 and 0.9 start further from a teacher (SmolLM2-135M), and training ends at the same error.
    RMSNorm starts far away: its outputs have length sqrt(V), whatever the values have.

    There are no attention weights: the matrix that mixes values is not positive, its rows have no fixed sum, and it
    would need a T x T triangular inverse.
    """

    rows = "none"

    def __init__(self, config: GdnConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        heads, groups, width, value_width = shapes.query_heads, shapes.key_heads, shapes.key_width, shapes.value_width

        def parameter(wanted: bool, *sizes: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(sizes)) if wanted else None

        self.query_weight_HKK = parameter(config.maps, heads, width, width)
        self.query_bias_HK = parameter(config.maps, heads, width)
        self.key_weight_GKK = parameter(config.maps, groups, width, width)
        self.key_bias_GK = parameter(config.maps, groups, width)
        self.query_taps_HKS = parameter(config.conv > 0, heads, width, config.conv)
        self.key_taps_GKS = parameter(config.conv > 0, groups, width, config.conv)
        self.value_taps_GVS = parameter(config.conv > 0, groups, value_width, config.conv)
        self.decay = nn.Linear(shapes.width, groups)
        self.decay_log_rate_G = nn.Parameter(torch.empty(groups))
        self.beta = nn.Linear(shapes.width, groups)
        self.scale_H = parameter(config.norm == "none", heads)
        self.norm_weight_HV = parameter(config.norm == "rms", heads, value_width)
        self.gate = nn.Linear(shapes.width, heads * value_width) if config.gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            start_maps((self.query_weight_HKK, self.key_weight_GKK), (self.query_bias_HK, self.key_bias_GK))
            for taps in (self.query_taps_HKS, self.key_taps_GKS, self.value_taps_GVS):
                if taps is not None:
                    taps.zero_()[..., 0] = 1.0
            start_decay(self.decay, self.decay_log_rate_G, self.config.half_life)
            self.beta.weight.zero_()
            self.beta.bias.fill_(math.log(START_BETA / (1 - START_BETA)))
            for ones in (self.scale_H, self.norm_weight_HV):
                if ones is not None:
                    ones.fill_(1.0)
            if self.gate is not None:
                self.gate.weight.zero_()
                self.gate.bias.fill_(OPEN_GATE)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        shapes = self.shapes
        matrices = 4 * shapes.key_heads * shapes.key_width * shapes.value_width
        if not self.config.conv:
            return matrices
        channels = (shapes.query_heads + shapes.key_heads) * shapes.key_width + shapes.key_heads * shapes.value_width
        return matrices + 8 + torch.finfo(dtype).bits // 8 * (self.config.conv - 1) * channels

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        dtype = heads.v_BTGV.dtype
        if not self.config.conv:
            o_BTHV, s_BGKV = self._delta_rule(heads, None if state is None else state[0])
            return self._finish(heads, o_BTHV).to(dtype), (s_BGKV,)
        tails = None if state is None else _Tails(*state[1:])
        heads, timeline, put_back = begin(heads, None if tails is None else tails.seen_B)
        mixed, after = self._convolve(heads, timeline, tails)
        o_BTHV, s_BGKV = self._delta_rule(mixed, None if state is None else state[0])
        return put_back(self._finish(heads, o_BTHV)).to(dtype), (s_BGKV, *after)

    def _convolve(self, heads: HeadInputs, timeline: Timeline, tails: _Tails | None) -> tuple[HeadInputs, _Tails]:
        """The heads with q, k and v convolved, and the tokens that the next call needs."""
        taps = [x for x in (self.query_taps_HKS, self.key_taps_GKS, self.value_taps_GVS) if x is not None]
        (q_BTHK, k_BTGK, v_BTGV), kept = causal_convs(
            [x_BTXC.to(heads.v_BTGV.dtype) for x_BTXC in (heads.q_BTHK, heads.k_BTGK, heads.v_BTGV)],
            taps, timeline.position_BT, None if tails is None else tails[1:], timeline.padding_B,
        )  # fmt: skip
        return replace(heads, q_BTHK=q_BTHK, k_BTGK=k_BTGK, v_BTGV=v_BTGV), _Tails(timeline.seen_B, *kept)

    def _delta_rule(self, heads: HeadInputs, state_BGKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, H, V] in fp32 and the state; masked tokens neither decay, erase nor write."""
        q_BTHK = self._unit(heads, heads.q_BTHK, self.query_weight_HKK, self.query_bias_HK)
        k_BTGK = self._unit(heads, heads.k_BTGK, self.key_weight_GKK, self.key_bias_GK)
        log_decay_BTG = self._log_decay(heads)
        beta_BTG = self.beta(heads.x_BTD.to(self.beta.weight.dtype)).sigmoid()
        if heads.mask_BT is not None:
            k_BTGK = k_BTGK * heads.mask_BT[:, :, None, None]
            beta_BTG = beta_BTG * heads.mask_BT.unsqueeze(-1)
        v_BTGV = heads.v_BTGV.to(q_BTHK.dtype)
        return gated_delta_rule(q_BTHK, k_BTGK, v_BTGV, log_decay_BTG, beta_BTG, state_BGKV, heads.segments_BT)

    def _unit(self, heads: HeadInputs, x_BTXK: Tensor, weight_XKK: Tensor | None, bias_XK: Tensor | None) -> Tensor:
        """Queries or keys of length 1 in fp32: map, activation, RoPE."""
        x_BTXK = mapped(x_BTXK, weight_XKK, bias_XK, self.config.activation)
        if self.config.rope and heads.rope is not None:
            x_BTXK = heads.rope.rotate(x_BTXK)
        return unit(x_BTXK)

    def _log_decay(self, heads: HeadInputs) -> Tensor:
        """log alpha [B, T, G] <= 0; 0 for padding."""
        log_decay_BTG = log_decay(heads.x_BTD, self.decay, self.decay_log_rate_G)
        return log_decay_BTG if heads.mask_BT is None else log_decay_BTG * heads.mask_BT.unsqueeze(-1)

    def _finish(self, heads: HeadInputs, o_BTHV: Tensor) -> Tensor:
        """Scale or normalise the outputs, and gate them."""
        if self.norm_weight_HV is not None:
            y_BTHV = o_BTHV * (o_BTHV.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.norm_weight_HV
        else:
            assert self.scale_H is not None
            y_BTHV = o_BTHV * self.scale_H.unsqueeze(-1)
        if self.gate is None:
            return y_BTHV
        # the one wide product: in the inputs' precision, as autocast would have it
        x_BTD = heads.x_BTD
        z_BTHV = F.linear(x_BTD, self.gate.weight.to(x_BTD.dtype)).to(y_BTHV.dtype) + self.gate.bias
        return y_BTHV * F.silu(z_BTHV.unflatten(-1, o_BTHV.shape[-2:]))

    def readings(self, heads: HeadInputs) -> Readings:
        return Readings(log_gate=self._log_decay(heads))
