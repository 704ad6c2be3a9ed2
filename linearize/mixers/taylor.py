"""The Taylor map of BASED (arXiv 2402.18668): exp(s) to second order as a dot product of features, normaliser kept.

Shape legend in base.py; d' (in code E) is the width after the projection.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from linearize.errors import RecipeError
from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, RowWeights, StudentMixer
from linearize.mixers.feature_maps import feature_rows, map_heads
from linearize_kernels import LinearState, gated_linear_attention

MAX_LENGTH = 16.0
"""Scaled queries and keys are shortened to this length, so that |s| <= 256. 1 + s + s^2/2 is at least 1/2, but fp32
sums it from terms up to MAX_LENGTH^4 / 2: their rounding (0.004) must stay far below 1/2, or a denominator could be
negative. The series has left exp(s) long before."""


class TaylorConfig(MixerConfig):
    """Options of the Taylor mixer."""

    kind: Literal["taylor"] = "taylor"
    features: int = Field(16, ge=1, le=64, description="d': width of projected q and k; the state grows as d'^2 / 2")
    rope: bool = Field(True, description="apply the teacher's RoPE before the projections")


class Taylor(StudentMixer):
    """phi(q).phi(k) = 1 + s + s^2 / 2 with s = (q P).(k P') / sqrt(d'); y = sum phi.phi v / sum phi.phi.

    One projection per query head for queries and for keys. Published: trained from scratch with projections from the
    model width. Ours: the projections start on the teacher's heads, for conversion.

    Start: d' of the K channels are picked and multiplied by c = sqrt(scaling * sqrt(d')), so that s is the teacher's
    scaling * q.k, summed over these channels only; with d' = K it is the teacher's logit. No K / d' to make up for the
    missing channels: where channels are independent, the sum over some is the best guess of the sum over all, and what
    they add on average cancels in the normaliser. The picked channels are the slowest pairs of RoPE: a projection that
    keeps one channel of a pair, or fast ones, sees little of the content once keys are far.
    """

    rows = "normalised"

    def __init__(self, config: TaylorConfig, shapes: HeadShapes) -> None:
        super().__init__()
        if config.features > shapes.key_width:
            raise RecipeError(
                f"{config.features} projected features of heads that are {shapes.key_width} wide.",
                place="mixer.features",
                remedy=f"Use {shapes.key_width} or less.",
            )
        self.config, self.shapes = config, shapes
        size = (shapes.query_heads, shapes.key_width, config.features)
        self.query_weight_HKE, self.key_weight_HKE = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        half, features = self.shapes.key_width // 2, self.config.features
        low = features // 2
        channels = [*range(half - low, half), *range(self.shapes.key_width - (features - low), self.shapes.key_width)]
        pick_KE = torch.eye(self.shapes.key_width)[:, channels] * (self.shapes.scaling * features**0.5) ** 0.5
        with torch.no_grad():
            self.query_weight_HKE.copy_(pick_KE)
            self.key_weight_HKE.copy_(pick_KE)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        width = self.config.features
        return 4 * self.shapes.query_heads * (1 + width + width * (width + 1) // 2) * (self.shapes.value_width + 1)

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        q_BTHF, k_BTHF = self._features(heads)
        linear_state = None if state is None else LinearState(*state)
        return gated_linear_attention(q_BTHF, k_BTHF, heads.v_BTGV, None, linear_state, heads.segments_BT)

    def _features(self, heads: HeadInputs) -> tuple[Tensor, Tensor]:
        """Query and key features [B, T, H, F]; masked tokens have key features of 0."""
        q_BTHK, k_BTGK = heads.q_BTHK, heads.k_BTGK
        if self.config.rope and heads.rope is not None:
            q_BTHK, k_BTGK = heads.rope.rotate_both(q_BTHK, k_BTGK)
        q_BTHF = taylor_features(map_heads(q_BTHK, self.query_weight_HKE))
        k_BTHF = taylor_features(map_heads(k_BTGK, self.key_weight_HKE))
        if heads.mask_BT is not None:
            k_BTHF = k_BTHF * heads.mask_BT[:, :, None, None]
        return q_BTHF, k_BTHF

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        return feature_rows(heads, *self._features(heads))


def taylor_features(x_BTHE: Tensor) -> Tensor:
    """phi with phi(x).phi(y) = 1 + s + s^2 / 2, s = x.y / sqrt(E); F = 1 + E + E(E + 1)/2.

    Published: [1 ; x / E^(1/4) ; vec(x x^T) / sqrt(2 E)], 1 + E + E^2 features. The matrix is symmetric: each pair off
    the diagonal is kept once, times sqrt(2), with the same products and little more than half the state.
    """
    width = x_BTHE.shape[-1]
    x = x_BTHE * width**-0.25
    # the norm is clamped, not the factor: its gradient at x = 0 would be NaN
    x = x * (MAX_LENGTH / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(MAX_LENGTH))
    squares = x.square() * 0.5**0.5
    # channel c with channel c + r, around the end: r up to E / 2 meets every pair once (at E / 2 half of the turn does)
    shifts = range(1, width // 2 + 1)
    pairs = [(x * x.roll(-r, dims=-1))[..., : width // 2 if 2 * r == width else width] for r in shifts]
    return torch.cat([torch.ones_like(x[..., :1]), x, squares, *pairs], dim=-1)
