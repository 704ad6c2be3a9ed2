"""Lizard (arXiv 2507.09025): gated linear attention beside a sliding window with meta-memory logits.

Two forms. `published` follows the paper: no RoPE, both branches over their own denominators, outputs added. Ours keeps
RoPE in the window, gives the linear branch only the keys that the window and the sinks do not see, and divides both by
one denominator. Legend in base.py; W window, M meta-memory logits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, RowWeights, StudentMixer
from linearize.mixers.feature_maps import HedgehogMap, Normalisation, normalised
from linearize.mixers.gates import HalfLife, rates
from linearize.mixers.local import (
    LOCAL_TENSORS,
    Local,
    LocalRows,
    Read,
    Weights,
    decodes,
    far_share,
    local_state,
    local_state_bytes,
    read,
    weigh,
    where_far,
)
from linearize.mixers.timeline import PutBack, begin
from linearize_kernels import Far, LinearState, windowed_linear_attention


class LizardConfig(MixerConfig):
    """Options of the Lizard mixer."""

    kind: Literal["lizard"] = "lizard"
    published: bool = Field(False, description="the paper's form: no RoPE, separate denominators, overlapping keys")
    window: int = Field(128, ge=1, le=4096, description="keys that are attended to exactly, the query's own included")
    sinks: int = Field(0, ge=0, le=64, description="first tokens that stay in the exact branch; published: 0")
    meta: int = Field(4, ge=0, le=64, description="meta-memory logits: they take weight in the window and give nothing")
    features: int | None = Field(None, ge=1, le=512, description="features per sign; default: the key width")
    normalisation: Normalisation = Field("softmax", description="exp (the paper's text) | softmax (its Table 13)")
    gate: Literal["token", "head"] = Field("token", description="one decay per token, or one per token and head")
    half_life: HalfLife | None = Field(
        None, description="tokens; heads start spread between the two. Default: gate 0.5 if published, else 256"
    )
    mix: float | None = Field(None, gt=0, description="start of the learned mix; default 1 if published, else 0.1")

    @model_validator(mode="after")
    def _agree(self) -> "LizardConfig":
        if self.published and self.sinks:
            raise ValueError("published has no sinks; leave out sinks, or published")
        return self

    @property
    def window_beside_linear(self) -> int:
        return self.window


class Lizard(StudentMixer):
    """gamma_t = sigmoid(x_t W + b), scalar; S_t = gamma_t S_t-1 + phi(k) v^T; both branches mixed by a learned factor.

    published: y = num_gate / den_gate + alpha num_W / (den_W + sum_j e^t_j).
    ours:      y = (num_W + a num_far) / (den_W + sum_j e^t_j + a den_far), where the window's sums and e^t_j carry e^-m
               (m the largest of their exponents) and a does not. A key starts to decay when it leaves the window.

    The paper gives no initial values: those here are ours. One meta-memory set and one mix per head are our reading.
    """

    rows = "matrix"

    def __init__(self, config: LizardConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.features = config.features or shapes.key_width
        far_rope = None if config.published else False
        self.local = Local(config.window, config.sinks, not config.published, shapes.scaling, far_rope)
        arguments = (shapes.query_heads, shapes.key_width, self.features, False, config.normalisation)
        self.query_map, self.key_map = HedgehogMap(*arguments), HedgehogMap(*arguments)
        self.gate = nn.Linear(shapes.width, shapes.query_heads if config.gate == "head" else 1)
        self.meta_HM = nn.Parameter(torch.empty(shapes.query_heads, config.meta)) if config.meta else None
        self.mix_H = nn.Parameter(torch.empty(shapes.query_heads))  # alpha, or log a
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        self.query_map.reset_parameters()
        self.key_map.reset_parameters()
        nn.init.zeros_(self.gate.weight)
        half_life = config.half_life or ((1.0, 1.0) if config.published else (256.0, 256.0))
        rate_J = torch.tensor(rates(self.gate.out_features, half_life), dtype=torch.float64)
        with torch.no_grad():
            self.gate.bias.copy_(-rate_J.expm1().log())  # sigmoid of it is exp(-rate)
        mix = config.mix or (1.0 if config.published else 0.1)
        nn.init.constant_(self.mix_H, mix if config.published else math.log(mix))
        if self.meta_HM is not None:
            nn.init.zeros_(self.meta_HM)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        linear = 4 * self.shapes.query_heads * 2 * self.features * (self.shapes.value_width + 1)
        return local_state_bytes(self.local, self.shapes, dtype) + linear

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        if state is not None and decodes(heads, state, self, self.features):
            from linearize.mixers.decoding import FarStep, decode

            logits = self.gate(heads.x_BTD.to(self.gate.weight.dtype))
            beyond = FarStep(
                self.query_map.weights(),
                self.key_map.weights(),
                LinearState(*state[LOCAL_TENSORS:]),
                self.config.normalisation,
                logits.expand(-1, -1, self.shapes.query_heads),
                rotated=False,
                left=not self.config.published,
            )
            rest = (self.meta_HM, beyond, self._weights())
            branch, after = decode(heads, self.local, state, *rest, separate=self.config.published)
            return branch.o_BTHV, after
        ordered, put_back, exact, far = self._branches(heads, state)
        y_BTHV, linear = windowed_linear_attention(
            exact.near, far, exact.window, exact.position_BT, ordered.segments_BT, self._weights(),
            separate=self.config.published, last=heads.last,
        )  # fmt: skip
        return put_back(y_BTHV).to(heads.v_BTGV.dtype), (*exact.state, *linear)

    def _branches(self, heads: HeadInputs, state: MixerState | None) -> tuple[HeadInputs, PutBack, Read, Far]:
        before = local_state(state)
        heads, timeline, put_back = begin(heads, None if before is None else before.seen_B)
        exact = read(heads, timeline, self.local, before)
        exact = exact._replace(near=exact.near._replace(meta_HL=self.meta_HM))
        keys = (exact.left_k_BTGK, exact.left_v_BTGV, exact.left_BT, exact.delayed)
        if self.config.published:
            keys = (heads.k_BTGK, heads.v_BTGV, heads.mask_BT, False)
        far = Far(
            heads.q_BTHK,
            *keys[:2],
            self.query_map.weights(),
            self.key_map.weights(),
            self.config.normalisation,
            self._log_gate(heads).expand(-1, -1, self.shapes.query_heads),
            None if state is None else LinearState(*state[LOCAL_TENSORS:]),
            *keys[2:],
        )
        return heads, put_back, exact, far

    def _weights(self) -> Weights:
        """Of the window and of the linear branch, per head."""
        learned = (self.mix_H, None) if self.config.published else (None, self.mix_H.exp())
        return weigh(learned, self, self.mix_H)

    def _log_gate(self, heads: HeadInputs) -> Tensor:
        """[B, T, 1 or H]; 0 for padding."""
        log_gate = F.logsigmoid(self.gate(heads.x_BTD.to(self.gate.weight.dtype)))
        return log_gate if heads.mask_BT is None else log_gate * heads.mask_BT.unsqueeze(-1)

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        exact = LocalRows(heads, self.local)
        q_BTHF, k_BTHF = self.query_map(heads.q_BTHK, "query"), self.key_map(heads.k_BTGK, "key")
        since_BTH = self._log_gate(heads).expand(-1, -1, self.shapes.query_heads).cumsum(1)
        # ours: a key decays from the token on at which it leaves the window
        late = 0 if self.config.published else self.config.window
        near_H11, far_H11 = (1 if weight is None else weight.view(-1, 1, 1) for weight in self._weights())

        def rows(start: int, stop: int) -> Tensor:
            far = torch.einsum("bihf,bjhf->bhij", q_BTHF[:, start:stop], k_BTHF)
            since_j = F.pad(since_BTH, (0, 0, 0, late), mode="replicate")[:, late:] if late else since_BTH
            log_decay = since_BTH[:, start:stop, None] - since_j[:, None]
            far = far * log_decay.clamp_max(0).exp().movedim(-1, 1)
            near, top = exact.weights(start, stop)
            near_den = near.sum(-1, keepdim=True)
            if self.meta_HM is not None:
                kept, meta = (
                    x.transpose(1, 2).unsqueeze(-1) for x in _with_meta(self.meta_HM, top.squeeze(-1).transpose(1, 2))
                )
                near, near_den = near * kept, near_den * kept + meta
            if self.config.published:
                far = far.masked_fill(~heads.seen(start, stop), 0)
                return near_H11 * near / near_den + far_H11 * normalised(far)
            far = far_H11 * far.masked_fill(~exact.split(start, stop)[1], 0)
            near, near_den = near * near_H11, near_den * near_H11
            return (near + far) / (near_den + far.sum(-1, keepdim=True)).clamp_min(torch.finfo(far.dtype).tiny)

        return rows

    def readings(self, heads: HeadInputs) -> Readings:
        ordered, put_back, exact, far = self._branches(heads, None)
        weights = (None, None) if self.config.published else self._weights()
        share_BTH = put_back(far_share(exact, far, ordered.segments_BT, weights)) * float(self.linear_branch)
        if not self.config.published:
            share_BTH = where_far(share_BTH, heads, self.local)
        return Readings(self._log_gate(heads), share_BTH)


def _with_meta(meta_HM: Tensor, top_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """What the window's sums are multiplied with, and what the meta-memory adds to their denominator."""
    new_BTH = torch.maximum(top_BTH, meta_HM.detach().amax(-1))
    return (top_BTH - new_BTH).exp(), (meta_HM - new_BTH.unsqueeze(-1)).exp().sum(-1)
