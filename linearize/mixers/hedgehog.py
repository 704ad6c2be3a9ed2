"""Hedgehog (arXiv 2402.04347): softmax replaced by learned non-negative feature maps, with the normaliser kept.

Shape legend in base.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, RowWeights, StudentMixer
from linearize.mixers.feature_maps import HedgehogMap, Normalisation, feature_rows
from linearize_kernels import LinearState, hedgehog_attention


class HedgehogConfig(MixerConfig):
    """Options of the Hedgehog mixer."""

    kind: Literal["hedgehog"] = "hedgehog"
    normalisation: Normalisation = Field("softmax", description="exp | softmax | softmax_joint: three functions")
    features: int | None = Field(None, ge=1, le=512, description="features per sign; default: the key width")
    tied: bool = Field(False, description="queries and keys share their maps")
    bias: bool = Field(False, description="add a bias inside the maps")
    rope: bool = Field(True, description="apply the teacher's RoPE before the maps")
    start: Literal["identity", "kaiming"] = "identity"


class Hedgehog(StudentMixer):
    """One map per query head for queries and for keys, causal normalised linear attention, O(1) decoding state."""

    rows = "normalised"

    def __init__(self, config: HedgehogConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        features = config.features or shapes.key_width
        arguments = (shapes.query_heads, shapes.key_width, features, config.bias, config.normalisation)
        self.query_map = HedgehogMap(*arguments)
        self.key_map = None if config.tied else HedgehogMap(*arguments)  # one name per weight: files cannot share
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query_map.reset_parameters(self.config.start)
        if self.key_map is not None:
            self.key_map.reset_parameters(self.config.start)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        features = 2 * (self.config.features or self.shapes.key_width)
        return 4 * self.shapes.query_heads * features * (self.shapes.value_width + 1)

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        rope = heads.rope if self.config.rope else None
        return hedgehog_attention(
            heads.q_BTHK,
            heads.k_BTGK,
            heads.v_BTGV,
            self.query_map.weights(),
            (self.key_map or self.query_map).weights(),
            self.config.normalisation,
            state=None if state is None else LinearState(*state),
            segments_BT=heads.segments_BT,
            mask_BT=heads.mask_BT,
            last=heads.last,
            angles=None if rope is None else (rope.cos_BTR, rope.sin_BTR),
        )

    def positioned(self, heads: HeadInputs) -> tuple[Tensor, Tensor]:
        """Queries and keys as the maps read them."""
        if self.config.rope and heads.rope is not None:
            return heads.rope.rotate_both(heads.q_BTHK, heads.k_BTGK)
        return heads.q_BTHK, heads.k_BTGK

    def features(self, heads: HeadInputs) -> tuple[Tensor, Tensor]:
        """Query and key features [B, T, H, 2F]; masked tokens have key features of 0."""
        q_BTHK, k_BTGK = self.positioned(heads)
        k_BTHF = (self.key_map or self.query_map)(k_BTGK, "key")
        if heads.mask_BT is not None:
            k_BTHF = k_BTHF * heads.mask_BT[:, :, None, None]
        return self.query_map(q_BTHK, "query"), k_BTHF

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        return feature_rows(heads, *self.features(heads))
