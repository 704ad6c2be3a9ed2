"""T2R (arXiv 2103.13076): softmax replaced by a one-layer ReLU feature map, with the normaliser kept.

Shape legend in base.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, RowWeights, StudentMixer
from linearize.mixers.feature_maps import MIN_FEATURE, feature_rows, map_heads
from linearize_kernels import LinearState, gated_linear_attention


class T2rConfig(MixerConfig):
    """Options of the T2R mixer."""

    kind: Literal["t2r"] = "t2r"
    features: int | None = Field(None, ge=1, le=512, description="features per head; default: the key width")
    rope: bool = Field(True, description="apply the teacher's RoPE before the maps")
    start: Literal["identity", "kaiming"] = Field(
        "identity", description="identity: x and, with features for it, -x; the rest Kaiming-uniform"
    )


class T2r(StudentMixer):
    """phi(x) = relu(xW + b), one map per query head for queries and for keys; O(1) decoding state.

    A ReLU can switch off all features of a query, or all that its keys have: the denominator would be 0. No feature is
    therefore smaller than MIN_FEATURE, as in Hedgehog: such a query reads the mean of the values it sees, weighted by
    their keys' features. This is ours; arXiv 2410.10254 clamps its ReLU baseline in the same place.
    """

    rows = "normalised"

    def __init__(self, config: T2rConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.features = config.features or shapes.key_width
        maps = (shapes.query_heads, shapes.key_width, self.features)
        self.query_weight_HKF, self.key_weight_HKF = (nn.Parameter(torch.empty(maps)) for _ in range(2))
        self.query_bias_HF, self.key_bias_HF = (nn.Parameter(torch.empty(maps[0], maps[2])) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        width = self.shapes.key_width
        bound = (6.0 / width) ** 0.5
        with torch.no_grad():
            for weight_HKF in (self.query_weight_HKF, self.key_weight_HKF):
                weight_HKF.uniform_(-bound, bound)
                if self.config.start == "identity":
                    both = torch.cat([torch.eye(width), -torch.eye(width)], dim=1)[:, : self.features]
                    weight_HKF[..., : both.shape[1]] = both.to(weight_HKF)
        nn.init.zeros_(self.query_bias_HF)
        nn.init.zeros_(self.key_bias_HF)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        return 4 * self.shapes.query_heads * self.features * (self.shapes.value_width + 1)

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        q_BTHF, k_BTHF = self._features(heads)
        linear_state = None if state is None else LinearState(*state)
        return gated_linear_attention(q_BTHF, k_BTHF, heads.v_BTGV, None, linear_state, heads.segments_BT)

    def _features(self, heads: HeadInputs) -> tuple[Tensor, Tensor]:
        """Query and key features [B, T, H, F]; masked tokens have key features of 0."""
        q_BTHK, k_BTGK = heads.q_BTHK, heads.k_BTGK
        if self.config.rope and heads.rope is not None:
            q_BTHK, k_BTGK = heads.rope.rotate_both(q_BTHK, k_BTGK)
        q_BTHF = map_heads(q_BTHK, self.query_weight_HKF, self.query_bias_HF).clamp_min(MIN_FEATURE)
        k_BTHF = map_heads(k_BTGK, self.key_weight_HKF, self.key_bias_HF).clamp_min(MIN_FEATURE)
        if heads.mask_BT is not None:
            k_BTHF = k_BTHF * heads.mask_BT[:, :, None, None]
        return q_BTHF, k_BTHF

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        return feature_rows(heads, *self._features(heads))
