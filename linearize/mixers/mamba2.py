"""Mamba-2 (arXiv 2405.21060) on a teacher's heads: C = q, B = k, x = v, one decay per head and token, no normaliser.

    S_t = gamma_t S_t-1 + dt_t B_t x_t^T,   y_t = S_t^T C_t + D x_t,   gamma_t = exp(-A dt_t)

before RoPE, which is dropped. Legend in base.py; S taps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, RowWeights, StudentMixer
from linearize.mixers.feature_maps import map_heads, start_maps
from linearize.mixers.gates import OPEN_GATE, HalfLife, rates
from linearize.mixers.timeline import Timeline, begin
from linearize_kernels import causal_convs
from linearize_kernels.ssd import ssd

EPSILON = 1e-5
"""Added to the mean square under a norm's root: the value of the authors' codes."""

DT_RANGE, A_RANGE = (1e-3, 1e-1), (1.0, 16.0)
"""Mamba-2's start: dt even in the log, A even."""

HALF_LIFE, START_CONSTANT = (4.0, 256.0), 0.5

Variant = Literal["mimic", "mmmamba", "mamba_in_llama", "mohawk"]


class Form(NamedTuple):
    """What a variant fixes."""

    conv: int  # taps
    bias: bool  # of the convolutions
    silu: bool  # after the convolutions
    scaled: bool  # queries are multiplied with the teacher's scaling
    decay: Literal["dt", "logit"]  # gamma = exp(-A dt), dt also at the input; or gamma = sigmoid(-a), 1 at the input
    skip: bool  # D
    norm: Literal["none", "head", "gated"]  # RMSNorm per head: none, before the output gate, or after it
    gate_bias: bool
    starts: tuple[Literal["mimic", "random"], ...]  # the first is the default


FORMS: dict[Variant, Form] = {
    "mimic": Form(4, False, False, True, "dt", True, "none", True, ("mimic", "random")),
    "mmmamba": Form(2, True, True, False, "dt", False, "head", False, ("mimic", "random")),
    "mamba_in_llama": Form(4, True, True, False, "dt", True, "gated", False, ("random",)),
    "mohawk": Form(4, True, False, True, "logit", True, "none", True, ("mimic", "random")),
}


class Mamba2Config(MixerConfig):
    """Options of the Mamba-2 mixer."""

    kind: Literal["mamba2"] = "mamba2"
    variant: Variant = Field("mimic", description="whose structure and start; mimic is ours")
    start: Literal["mimic", "random"] | None = Field(
        None, description="near the teacher, or Mamba-2's random start; default: the variant's"
    )
    conv: int | None = Field(
        None, ge=2, le=32, description="taps of the convolutions on q, k, v; default: the variant's"
    )
    maps: bool | None = Field(
        None, description="mimic: learned linear maps with bias on q per query head, on k per key head; default: true"
    )
    scores: Literal["dot", "cosine"] = Field(
        "dot", description="mimic: q.k as the teacher scales it, or their cosine plus a learned constant per head"
    )
    half_life: HalfLife = Field(HALF_LIFE, description="mimic: tokens; heads start spread between the two")

    @model_validator(mode="after")
    def _agree(self) -> "Mamba2Config":
        if self.start is not None and self.start not in self.form.starts:
            raise ValueError(f"variant {self.variant} has a random start only; leave out start, or use variant: mimic")
        ours = {"maps": self.maps is not None, "scores": self.scores != "dot", "half_life": self.half_life != HALF_LIFE}
        given = [name for name, is_given in ours.items() if is_given]
        if self.variant != "mimic" and given:
            raise ValueError(f"variant {self.variant} has a fixed structure; {', '.join(given)} needs variant: mimic")
        if self.random and "half_life" in given:
            raise ValueError("start: random draws its own decays; leave out half_life, or use start: mimic")
        return self

    @property
    def form(self) -> Form:
        """What the variant fixes, with the taps that were asked for."""
        form = FORMS[self.variant]
        return form if self.conv is None else form._replace(conv=self.conv)

    @property
    def random(self) -> bool:
        """Whether the start is Mamba-2's own."""
        return (self.start or self.form.starts[0]) == "random"


class _Tails(NamedTuple):
    """What the convolutions need of the tokens before."""

    seen_B: Tensor
    q_BSHK: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor


class Mamba2(StudentMixer):
    """One state [B, H, K, V] per query head; keys and values are those of its group.

        q, k, v = activation(conv(.) + bias)                         depthwise over the channels of all heads
        dt_t = softplus(x_t W_dt + dt_bias),  gamma_t = exp(-A dt_t)  mohawk: gamma_t = sigmoid(-x_t W_a), dt_t = 1
        o_t = sum_j<=t (gamma_j+1 .. gamma_t) dt_j (q_t . k_j) v_j + D v_t
        y_t = o_t * silu(z_t), normalised as the variant says,  z_t = x_t W_z + b_z

    mmmamba (arXiv 2502.13145), mamba_in_llama (arXiv 2408.15237) and mohawk (arXiv 2408.10189) have the structures and
    starts of their authors' codes, apart from mohawk's queries, which are multiplied with the teacher's scaling: its
    authors learn the projections from scratch, here they are the teacher's.

    mimic is ours. It starts as plain decayed linear attention of the teacher's heads,

        y_t = sum_j<=t gamma^(t - j) log(1 / gamma) (scaling q_t . k_j) v_j

    Convolutions start as the current token only, maps as identities, the output gate as 1, D = 0, A = 1, and dt as
    log(2) / half-life, half-lives spread evenly in the log. As dt is nearly 1 - gamma, the sum is a decayed mean: with
    1 in dt's place outputs start 10^5 times the values' size (SmolLM2-135M). `scores: cosine` is ours as well: softmax
    to first order is 1 + score, so a constant c, learned from 0.5 on, stands beside a score that cannot exceed 1,
    c + cos(q_t, k_j), in place of the scaled product. It starts much closer.
    """

    rows = "matrix"

    def __init__(self, config: Mamba2Config, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes, self.form = config, shapes, config.form
        form, heads, groups = config.form, shapes.query_heads, shapes.key_heads
        width, value_width = shapes.key_width, shapes.value_width
        maps = config.variant == "mimic" and config.maps is not False

        def parameter(wanted: bool, *sizes: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(sizes)) if wanted else None

        self.query_taps_HKS = nn.Parameter(torch.empty(heads, width, form.conv))
        self.key_taps_GKS = nn.Parameter(torch.empty(groups, width, form.conv))
        self.value_taps_GVS = nn.Parameter(torch.empty(groups, value_width, form.conv))
        self.query_shift_HK = parameter(form.bias, heads, width)
        self.key_shift_GK = parameter(form.bias, groups, width)
        self.value_shift_GV = parameter(form.bias, groups, value_width)
        self.query_weight_HKK = parameter(maps, heads, width, width)
        self.query_bias_HK = parameter(maps, heads, width)
        self.key_weight_GKK = parameter(maps, groups, width, width)
        self.key_bias_GK = parameter(maps, groups, width)
        self.constant_H = parameter(config.scores == "cosine", heads)
        self.dt = nn.Linear(shapes.width, heads, bias=form.decay == "dt")
        self.log_rate_H = parameter(form.decay == "dt", heads)
        self.skip_H = parameter(form.skip, heads)
        norm_sizes = (value_width,) if form.norm == "head" else (heads, value_width)
        self.norm_weight = parameter(form.norm != "none", *norm_sizes)
        self.gate = nn.Linear(shapes.width, heads * value_width, bias=form.gate_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            start_maps((self.query_weight_HKK, self.key_weight_GKK), (self.query_bias_HK, self.key_bias_GK))
            if self.constant_H is not None:
                self.constant_H.fill_(START_CONSTANT)
            if self.norm_weight is not None:
                self.norm_weight.fill_(1.0)
            if self.skip_H is not None:
                self.skip_H.fill_(0.0 if self.config.variant == "mimic" and not self.config.random else 1.0)
            self._start_convolutions()
            self._start_decays()
            self._start_gate()

    def _start_convolutions(self) -> None:
        """The current token only, or as nn.Conv1d starts."""
        bound = self.form.conv**-0.5 if self.config.random else 0.0
        for taps in (self.query_taps_HKS, self.key_taps_GKS, self.value_taps_GVS):
            taps.uniform_(-bound, bound)
            if not self.config.random:
                taps[..., 0] = 1.0
        for shift in (self.query_shift_HK, self.key_shift_GK, self.value_shift_GV):
            if shift is not None:
                shift.uniform_(-bound, bound)

    def _start_decays(self) -> None:
        """mimic: half-lives; mmmamba: dt as Mamba-2, A = e; mohawk: gamma = 1/2; random: dt and A as Mamba-2."""
        heads, random = self.shapes.query_heads, self.config.random
        bound = self.shapes.width**-0.5 if random else 0.0
        self.dt.weight.uniform_(-bound, bound)
        if self.log_rate_H is None:
            return
        if self.config.variant == "mimic" and not random:
            dt_H = torch.tensor(rates(heads, self.config.half_life), dtype=torch.float64)
        else:
            dt_H = torch.empty(heads).uniform_(*map(math.log, DT_RANGE)).double().exp()
        self.dt.bias.copy_(dt_H.expm1().log())  # the inverse of softplus
        if random:
            self.log_rate_H.uniform_(*A_RANGE).log_()
        else:
            self.log_rate_H.fill_(1.0 if self.config.variant == "mmmamba" else 0.0)

    def _start_gate(self) -> None:
        """Open; or as the authors' codes draw it."""
        random = self.config.random
        if self.config.variant == "mmmamba":
            nn.init.xavier_uniform_(self.gate.weight, gain=2**-2.5)
        else:
            bound = self.shapes.width**-0.5 if random else 0.0
            self.gate.weight.uniform_(-bound, bound)
        if self.gate.bias is not None:
            self.gate.bias.fill_(0.0 if random else OPEN_GATE)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        shapes = self.shapes
        rows = shapes.key_width + int(self.config.scores == "cosine")
        matrices = 4 * shapes.query_heads * rows * shapes.value_width
        channels = (shapes.query_heads + shapes.key_heads) * shapes.key_width + shapes.key_heads * shapes.value_width
        return matrices + 8 + torch.finfo(dtype).bits // 8 * (self.form.conv - 1) * channels

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        dtype = heads.v_BTGV.dtype
        tails = None if state is None else _Tails(*state[1:])
        heads, timeline, put_back = begin(heads, None if tails is None else tails.seen_B)
        mixed, after = self._convolve(heads, timeline, tails)
        log_decay_BTH, write_BTH = self._decays(heads)
        state_BHKV = None if state is None else state[0]
        o_BTHV, s_BHKV = ssd(
            mixed.q_BTHK, mixed.k_BTGK, mixed.v_BTGV, log_decay_BTH, write_BTH, state_BHKV, heads.segments_BT
        )
        if self.skip_H is not None:
            o_BTHV = o_BTHV + self.skip_H.unsqueeze(-1) * self._per_query_head(mixed.v_BTGV)
        return put_back(self._finish(heads, o_BTHV)).to(dtype), (s_BHKV, *after)

    def _convolve(self, heads: HeadInputs, timeline: Timeline, tails: _Tails | None) -> tuple[HeadInputs, _Tails]:
        """The heads as the state reads and writes them, in fp32, and the tokens that the next call needs."""
        (q_BTHK, k_BTGK, v_BTGV), kept = causal_convs(
            [x_BTXC.to(heads.v_BTGV.dtype) for x_BTXC in (heads.q_BTHK, heads.k_BTGK, heads.v_BTGV)],
            (self.query_taps_HKS, self.key_taps_GKS, self.value_taps_GVS),
            timeline.position_BT,
            None if tails is None else tails[1:],
            timeline.padding_B,
            shifts=(self.query_shift_HK, self.key_shift_GK, self.value_shift_GV),
            activation="silu" if self.form.silu else "none",
        )
        q_BTHK = self._map(q_BTHK, self.query_weight_HKK, self.query_bias_HK)
        k_BTGK = self._map(k_BTGK, self.key_weight_GKK, self.key_bias_GK)
        if self.constant_H is not None:  # one more feature
            constant_BTH1 = self.constant_H.unsqueeze(-1).expand(*q_BTHK.shape[:3], 1)
            q_BTHK = torch.cat([q_BTHK, constant_BTH1.to(q_BTHK.dtype)], dim=-1)
            k_BTGK = torch.cat([k_BTGK, torch.ones_like(k_BTGK[..., :1])], dim=-1)
        elif self.form.scaled:
            q_BTHK = q_BTHK * self.shapes.scaling
        if heads.mask_BT is not None:
            k_BTGK = k_BTGK * heads.mask_BT[:, :, None, None]
        return replace(heads, q_BTHK=q_BTHK, k_BTGK=k_BTGK, v_BTGV=v_BTGV), _Tails(timeline.seen_B, *kept)

    def _map(self, x_BTXK: Tensor, weight_XKK: Tensor | None, bias_XK: Tensor | None) -> Tensor:
        """Queries or keys through their map; of length 1 where scores are cosines."""
        if weight_XKK is not None:
            x_BTXK = map_heads(x_BTXK, weight_XKK, bias_XK)
        if self.constant_H is None:
            return x_BTXK
        return x_BTXK * (x_BTXK.square().sum(-1, keepdim=True) + EPSILON).rsqrt()

    def _decays(self, heads: HeadInputs) -> tuple[Tensor, Tensor | None]:
        """log gamma [B, T, H] <= 0, 0 for padding; and dt [B, T, H], None where the input is not scaled."""
        rate_BTH = F.softplus(self.dt(heads.x_BTD.to(self.dt.weight.dtype)))
        log_decay_BTH = -rate_BTH if self.log_rate_H is None else -self.log_rate_H.exp() * rate_BTH
        if heads.mask_BT is not None:
            log_decay_BTH = log_decay_BTH * heads.mask_BT.unsqueeze(-1)
        return log_decay_BTH, None if self.log_rate_H is None else rate_BTH

    def _per_query_head(self, x_BTGX: Tensor) -> Tensor:
        return x_BTGX.repeat_interleave(self.shapes.query_heads // self.shapes.key_heads, dim=2)

    def _finish(self, heads: HeadInputs, o_BTHV: Tensor) -> Tensor:
        """Gate the outputs, and normalise them before or after."""
        # the one wide product: in the inputs' precision, as autocast would have it
        z_BTHV = F.linear(heads.x_BTD, self.gate.weight.to(heads.x_BTD.dtype)).to(o_BTHV.dtype)
        z_BTHV = z_BTHV if self.gate.bias is None else z_BTHV + self.gate.bias
        open_BTHV = F.silu(z_BTHV.unflatten(-1, o_BTHV.shape[-2:]))
        return self._norm(o_BTHV) * open_BTHV if self.form.norm == "head" else self._norm(o_BTHV * open_BTHV)

    def _norm(self, y_BTHV: Tensor) -> Tensor:
        if self.norm_weight is None:
            return y_BTHV
        return y_BTHV * (y_BTHV.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.norm_weight

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        """M_ij = (q_i . k_j) (gamma_j+1 .. gamma_i) dt_j, + D on the diagonal, of each query head.

        What MOHAWK (arXiv 2408.10189) compares with the attention matrix: M multiplies the values as they leave their
        convolution, and the norm and the output gate come after it.
        """
        ordered, timeline, put_back = begin(heads, None)
        mixed, _ = self._convolve(ordered, timeline, None)
        q_BTHK, k_BTHK = put_back(mixed.q_BTHK), self._per_query_head(put_back(mixed.k_BTGK))
        log_decay_BTH, write_BTH = self._decays(heads)
        since_BHT = log_decay_BTH.cumsum(1).transpose(1, 2)

        def rows(start: int, stop: int) -> Tensor:
            score_BHRT = torch.einsum("bihk,bjhk->bhij", q_BTHK[:, start:stop], k_BTHK)
            span_BHRT = since_BHT[:, :, start:stop, None] - since_BHT[:, :, None]
            weight_BHRT = score_BHRT * span_BHRT.clamp_max(0).exp()
            if write_BTH is not None:
                weight_BHRT = weight_BHRT * write_BTH.transpose(1, 2).unsqueeze(2)
            weight_BHRT = weight_BHRT.masked_fill(~heads.seen(start, stop), 0)
            if self.skip_H is None:
                return weight_BHRT
            own_RT = torch.eye(q_BTHK.shape[1], dtype=weight_BHRT.dtype, device=weight_BHRT.device)[start:stop]
            return weight_BHRT + self.skip_H[:, None, None] * own_RT

        return rows

    def readings(self, heads: HeadInputs) -> Readings:
        return Readings(log_gate=self._decays(heads)[0])
