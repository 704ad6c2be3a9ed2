"""LAWCAT (arXiv 2509.18467): short causal convolutions on q and k, feature maps, and normalised linear attention with a
decay per channel. No softmax is left unless a window is asked for. Legend in base.py; S taps, W window.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, RowWeights, StudentMixer
from linearize.mixers.feature_maps import HedgehogMap, Normalisation
from linearize.mixers.local import (
    SMALLEST,
    Local,
    LocalRows,
    decayed_rows,
    local_state,
    local_state_bytes,
    read,
)
from linearize.mixers.timeline import Timeline, begin
from linearize_kernels import Branch, LinearState, causal_convs, gated_linear_attention, linear_sums
from linearize_kernels.gated_linear_attention import spread
from linearize_kernels.hedgehog_attention import features_of_both

GATE_RANK, GATE_STD, EPSILON = 16, 0.006, 1e-10
"""Width of the gate's bottleneck, spread of its weights at the start, and what is added to the denominator: the values
of the authors' code."""

OTHER_TAPS = 0.001
"""Start of the taps on earlier tokens; the current token's is 1 (initialiser `idt` of the authors' code)."""


class LawcatConfig(MixerConfig):
    """Options of the LAWCAT mixer."""

    kind: Literal["lawcat"] = "lawcat"
    kernel: int = Field(4, ge=1, le=32, description="taps of the convolutions on q and k; 1 scales the channels only")
    features: int | None = Field(None, ge=1, le=512, description="features per sign; default: half the key width")
    tied: bool = Field(True, description="queries and keys share their feature maps (the paper), or not")
    tied_conv: bool = Field(False, description="queries and keys share their filters")
    normalisation: Normalisation = "softmax"
    gate: Literal["channel", "scalar"] = Field("channel", description="a decay per feature, or one per query head")
    temperature: float = Field(16.0, gt=0, description="log decay = logsigmoid(a) / temperature")
    rope: bool = Field(False, description="rotate q and k before the convolutions; the paper reports that it harms")
    window: int = Field(0, ge=0, le=4096, description="softmax window beside the linear branch; 0 = none (the default)")

    @model_validator(mode="after")
    def _agree(self) -> "LawcatConfig":
        if self.tied_conv and self.kernel == 1:
            raise ValueError("tied_conv with kernel: 1 leaves no filters to tie; leave out tied_conv")
        return self

    @property
    def window_beside_linear(self) -> int:
        return self.window


class _Tails(NamedTuple):
    seen_B: Tensor
    q_BSHK: Tensor  # the last kernel - 1 queries and keys before the convolution
    k_BSGK: Tensor


class Lawcat(StudentMixer):
    """y = sum_j phi(q~_i).(phi(k~_j) * decay_ij) v_j / (the same without v, + 1e-10).

    With a window: (g num_W + num) / (g den_W + den + 1e-10), g = sigmoid(factor) per head, the window rotated. The
    linear branch still covers all keys, so those in the window count twice: this is what is published.
    """

    rows = "matrix"  # 1e-10 in the denominator: rows sum to a little less than 1

    def __init__(self, config: LawcatConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        heads, width = shapes.query_heads, shapes.key_width
        self.features = config.features or max(1, width // 2)
        arguments = (heads, width, self.features, False, config.normalisation)
        self.query_map = HedgehogMap(*arguments)
        self.key_map = None if config.tied else HedgehogMap(*arguments)  # one name per weight: files cannot share
        self.query_taps_HKS = nn.Parameter(torch.empty(heads, width, config.kernel))
        self.key_taps_HKS = None if config.tied_conv else nn.Parameter(torch.empty(heads, width, config.kernel))
        self.gate_width = 2 * self.features if config.gate == "channel" else 1
        self.gate_down = nn.Linear(shapes.width, GATE_RANK, bias=False)
        self.gate_up = nn.Linear(GATE_RANK, self._gate_heads() * self.gate_width)
        self.window_factor_H = nn.Parameter(torch.empty(heads)) if config.window else None
        self.local = Local(max(1, config.window), 0, rope=True, scaling=shapes.scaling)
        self.reset_parameters()

    def _gate_heads(self) -> int:
        """Published: per key/value head, repeated over its queries; the scalar gate is one per query head."""
        return self.shapes.key_heads if self.config.gate == "channel" else self.shapes.query_heads

    def reset_parameters(self) -> None:
        for maps in (self.query_map, self.key_map):
            if maps is not None:
                maps.reset_parameters()
        for taps in (self.query_taps_HKS, self.key_taps_HKS):
            if taps is not None:
                nn.init.constant_(taps, OTHER_TAPS)
                nn.init.ones_(taps[..., 0])
        nn.init.normal_(self.gate_down.weight, std=GATE_STD)
        nn.init.normal_(self.gate_up.weight, std=GATE_STD)
        nn.init.zeros_(self.gate_up.bias)
        if self.window_factor_H is not None:
            nn.init.zeros_(self.window_factor_H)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        shapes, element = self.shapes, torch.finfo(dtype).bits // 8
        linear = 4 * shapes.query_heads * 2 * self.features * (shapes.value_width + 1)
        taps = 8 + element * (self.config.kernel - 1) * (shapes.query_heads + shapes.key_heads) * shapes.key_width
        local = local_state_bytes(self.local, shapes, dtype) if self.config.window else 0
        return linear + taps + local

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        tails = None if state is None else _Tails(*state[:3])
        heads, timeline, put_back = begin(heads, None if tails is None else tails.seen_B)
        one = heads.q_BTHK.shape[1] == 1  # steps read features in fp32
        q_BTHF, k_BTHF, after = self._features(heads, timeline, tails, torch.float32 if one else heads.v_BTGV.dtype)
        linear_state = None if state is None else LinearState(*state[3:5])
        gate = self._log_gate(heads)
        other: Branch | None = None
        exact_state: MixerState = ()
        if self.window_factor_H is not None:
            exact = read(heads, timeline, self.local, None if state is None else local_state(state[5:]))
            o_BTHV, den_BTH = exact.attend()
            far = 1.0 if self.linear_branch else SMALLEST
            near_H = self.window_factor_H.sigmoid() * self.window_branch
            other, exact_state = Branch(o_BTHV, den_BTH * (near_H / far)), exact.state
        y_BTHV, linear = gated_linear_attention(
            q_BTHF, k_BTHF, heads.v_BTGV, gate, linear_state, heads.segments_BT,
            other=other, epsilon=EPSILON, last=heads.last,
        )  # fmt: skip
        new_state: MixerState = (*after, *linear, *exact_state)
        return put_back(y_BTHV).to(heads.v_BTGV.dtype), new_state

    def _features(
        self, heads: HeadInputs, timeline: Timeline, tails: _Tails | None, rounded: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, _Tails]:
        """Query and key features [B, T, H, 2F] after the convolutions; 0 for padded keys."""
        q_BTHK, k_BTGK, dtype = heads.q_BTHK, heads.k_BTGK, heads.v_BTGV.dtype
        if self.config.rope and heads.rope is not None:
            q_BTHK, k_BTGK = heads.rope.rotate_both(q_BTHK, k_BTGK)
        key_map = self.query_map if self.key_map is None else self.key_map
        key_taps_HKS = self.query_taps_HKS if self.key_taps_HKS is None else self.key_taps_HKS
        (q_BTHK, k_BTHK), kept = causal_convs(
            (q_BTHK.to(dtype), k_BTGK.to(dtype)), (self.query_taps_HKS, key_taps_HKS), timeline.position_BT,
            None if tails is None else tails[1:], timeline.padding_B,
        )  # fmt: skip
        q_BTHF, k_BTHF = features_of_both(
            q_BTHK, k_BTHK, self.query_map.weights(), key_map.weights(), self.config.normalisation, heads.mask_BT,
            rounded,
        )  # fmt: skip
        return q_BTHF, k_BTHF, _Tails(timeline.seen_B, *kept)

    def _log_gate(self, heads: HeadInputs) -> Tensor:
        """[B, T, G, 2F] or [B, T, H]; 0 for padding."""
        a = self.gate_up(self.gate_down(heads.x_BTD.to(self.gate_up.weight.dtype)))
        log_gate = (F.logsigmoid(a) / self.config.temperature).unflatten(-1, (self._gate_heads(), self.gate_width))
        if heads.mask_BT is not None:
            log_gate = log_gate * heads.mask_BT[:, :, None, None]
        return log_gate if self.config.gate == "channel" else log_gate.squeeze(-1)

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        ordered, timeline, put_back = begin(heads, None)
        q_BTHF, k_BTHF, _ = self._features(ordered, timeline, None)
        q_BTHF, k_BTHF, gate = put_back(q_BTHF), put_back(k_BTHF), self._log_gate(heads)
        gate = spread(gate if gate.ndim == 4 else gate.unsqueeze(-1), self.shapes.query_heads)
        exact = LocalRows(heads, self.local) if self.window_factor_H is not None else None

        def rows(start: int, stop: int) -> Tensor:
            weight = decayed_rows(q_BTHF, k_BTHF, gate, start, stop).masked_fill(~heads.seen(start, stop), 0)
            if exact is not None and self.window_factor_H is not None:
                near_H11 = (self.window_factor_H.sigmoid() * self.window_branch).view(-1, 1, 1)
                weight = float(self.linear_branch) * weight + near_H11 * exact.weights(start, stop)[0]
            return weight / (weight.sum(-1, keepdim=True) + EPSILON)

        return rows

    def readings(self, heads: HeadInputs) -> Readings:
        log_gate = self._log_gate(heads)
        if self.window_factor_H is None:
            return Readings(log_gate)
        ordered, timeline, put_back = begin(heads, None)
        q_BTHF, k_BTHF, _ = self._features(ordered, timeline, None)
        far_BTH = linear_sums(q_BTHF, k_BTHF, ordered.v_BTGV, self._log_gate(ordered), None, heads.segments_BT)[1]
        far_BTH = far_BTH * float(self.linear_branch)
        near_H = self.window_factor_H.sigmoid() * self.window_branch
        near_BTH = near_H * read(ordered, timeline, self.local, None).attend().den_BTH
        return Readings(log_gate, put_back(far_BTH / (far_BTH + near_BTH + EPSILON)))
