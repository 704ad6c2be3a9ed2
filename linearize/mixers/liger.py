"""Liger (arXiv 2503.01496): gated linear attention without any new parameter, beside a sliding window, in equal halves.

Legend in base.py; W window.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, RowWeights, StudentMixer
from linearize.mixers.feature_maps import MIN_FEATURE, normalised
from linearize.mixers.local import (
    LOCAL_TENSORS,
    Local,
    LocalRows,
    decayed_rows,
    decodes,
    divide,
    local_state,
    local_state_bytes,
    read,
)
from linearize.mixers.timeline import begin
from linearize_kernels import LinearState, linear_sums


class LigerConfig(MixerConfig):
    """Options of the Liger mixer."""

    kind: Literal["liger"] = "liger"
    window: int = Field(64, ge=1, le=4096, description="keys that are attended to exactly, the query's own included")
    sinks: int = Field(0, ge=0, le=64, description="first tokens that stay in the exact branch; published: 0")
    normaliser: bool = Field(False, description="divide the linear branch by its own sum of weights; published: no")
    temperature: float = Field(16.0, gt=0, description="log decay = logsigmoid(k) / temperature")
    share: float = Field(0.5, gt=0, lt=1, description="what the linear branch weighs, fixed; the window has the rest")

    @property
    def window_beside_linear(self) -> int:
        return self.window


class Liger(StudentMixer):
    """y = share num + (1 - share) window, S_t = diag(alpha_t) S_t-1 + softmax(k_t) v_t^T, num = softmax(q_t) S_t.

    log alpha_t = logsigmoid(k_t) / 16: the keys before RoPE are the gate's logits. Published without a denominator: the
    linear branch then has no fixed scale: it grows with the keys that are remembered. `normaliser` is ours.
    """

    rows = "matrix"

    def __init__(self, config: LigerConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.local = Local(config.window, config.sinks, rope=True, scaling=shapes.scaling)

    def reset_parameters(self) -> None:
        """There are none."""

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        linear = 4 * self.shapes.key_heads * self.shapes.key_width * (self.shapes.value_width + 1)
        return local_state_bytes(self.local, self.shapes, dtype) + linear

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        if state is not None and decodes(heads, state, self):
            from linearize.mixers.decoding import decode

            branch, after = decode(heads, self.local, state)
            far_BTHV, linear = self._far(heads, state)
            return self._mixed(branch.o_BTHV, far_BTHV).to(heads.v_BTGV.dtype), (*after, *linear)
        before = local_state(state)
        heads, timeline, put_back = begin(heads, None if before is None else before.seen_B)
        exact = read(heads, timeline, self.local, before)
        far_BTHV, linear = self._far(heads, state)
        y_BTHV = self._mixed(exact.attend().o_BTHV, far_BTHV)
        return put_back(y_BTHV).to(heads.v_BTGV.dtype), (*exact.state, *linear)

    def _far(self, heads: HeadInputs, state: MixerState | None) -> tuple[Tensor, LinearState]:
        """The linear branch's output and its state."""
        before = None if state is None else LinearState(*state[LOCAL_TENSORS:])
        q_BTHK, k_BTGK, log_gate_BTGK = self._features(heads)
        num_BTHV, den_BTH, after = linear_sums(q_BTHK, k_BTGK, heads.v_BTGV, log_gate_BTGK, before, heads.segments_BT)
        return divide(num_BTHV, den_BTH) if self.config.normaliser else num_BTHV, after

    def _mixed(self, near_BTHV: Tensor, far_BTHV: Tensor) -> Tensor:
        near, far = self._weights()
        return near * near_BTHV + far * far_BTHV

    def _weights(self) -> tuple[float, float]:
        """Of the window and of the linear branch; one has all where the other is silenced."""
        if not self.window_branch:
            return 0.0, 1.0
        far = self.config.share if self.linear_branch else 0.0
        return 1 - far, far

    def _features(self, heads: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
        """softmax(q) [B, T, H, K], softmax(k) and log decay [B, T, G, K] in fp32; 0 for padded keys."""
        dtype = torch.promote_types(heads.q_BTHK.dtype, torch.float32)
        logits_BTGK = heads.k_BTGK.to(dtype)
        k_BTGK = logits_BTGK.softmax(-1).clamp_min(MIN_FEATURE)
        log_gate_BTGK = F.logsigmoid(logits_BTGK) / self.config.temperature
        if heads.mask_BT is not None:
            real_BT11 = heads.mask_BT[:, :, None, None]
            k_BTGK, log_gate_BTGK = k_BTGK * real_BT11, log_gate_BTGK * real_BT11
        return heads.q_BTHK.to(dtype).softmax(-1).clamp_min(MIN_FEATURE), k_BTGK, log_gate_BTGK

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        q_BTHK, k_BTGK, log_gate_BTGK = self._features(heads)
        group = q_BTHK.shape[2] // k_BTGK.shape[2]
        k_BTHK, gate_BTHK = (x.repeat_interleave(group, dim=2) for x in (k_BTGK, log_gate_BTGK))
        exact, (near, far) = LocalRows(heads, self.local), self._weights()

        def rows(start: int, stop: int) -> Tensor:
            weight = decayed_rows(q_BTHK, k_BTHK, gate_BTHK, start, stop).masked_fill(~heads.seen(start, stop), 0)
            weight = normalised(weight) if self.config.normaliser else weight
            return near * normalised(exact.weights(start, stop)[0]) + far * weight

        return rows

    def readings(self, heads: HeadInputs) -> Readings:
        share_BTH = heads.q_BTHK.new_full(heads.q_BTHK.shape[:3], self._weights()[1])
        return Readings(self._features(heads)[2], share_BTH)
