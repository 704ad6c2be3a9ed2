"""Windowed Hedgehog of LoLCATs (arXiv 2410.10254): softmax in a sliding window, feature maps beyond, one denominator.

Legend in base.py; W window.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, Readings, RowWeights, StudentMixer
from linearize.mixers.feature_maps import HedgehogMap, Normalisation, normalised
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

WINDOW_FACTOR = -2.1972
"""sigmoid of it is 0.1, the published start of the window's weight (configurations of arXiv 2410.10254)."""


class LolcatsConfig(MixerConfig):
    """Options of the windowed Hedgehog mixer."""

    kind: Literal["lolcats"] = "lolcats"
    window: int = Field(64, ge=1, le=4096, description="keys that are attended to exactly, the query's own included")
    sinks: int = Field(0, ge=0, le=64, description="first tokens that stay in the exact branch; published: 0")
    features: int | None = Field(None, ge=1, le=512, description="features per sign; default: the key width")
    normalisation: Normalisation = Field("softmax", description="exp | softmax | softmax_joint: three functions")
    affine: bool = Field(False, description="the linear branch weighs 1 - g beside the window's g, instead of 1")
    start: Literal["identity", "kaiming"] = "identity"

    @property
    def window_beside_linear(self) -> int:
        return self.window


class Lolcats(StudentMixer):
    """num / den with num = g sum_W e^(s - m) v + l sum_beyond phi(q).phi(k) v, and the same with 1 for v.

    g = sigmoid(factor) per head. The maximum m of the window's scores is not compensated in the linear branch: this is
    what is published, so the mixture depends on m. Both branches read rotated q and k.
    """

    rows = "normalised"

    def __init__(self, config: LolcatsConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.features = config.features or shapes.key_width
        self.local = Local(config.window, config.sinks, rope=True, scaling=shapes.scaling, far_rope=True)
        arguments = (shapes.query_heads, shapes.key_width, self.features, False, config.normalisation)
        self.query_map, self.key_map = HedgehogMap(*arguments), HedgehogMap(*arguments)
        self.window_factor_H = nn.Parameter(torch.empty(shapes.query_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query_map.reset_parameters(self.config.start)
        self.key_map.reset_parameters(self.config.start)
        nn.init.constant_(self.window_factor_H, WINDOW_FACTOR)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        linear = 4 * self.shapes.query_heads * 2 * self.features * (self.shapes.value_width + 1)
        return local_state_bytes(self.local, self.shapes, dtype) + linear

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        if state is not None and decodes(heads, state, self, self.features):
            from linearize.mixers.decoding import FarStep, decode

            beyond = FarStep(
                self.query_map.weights(),
                self.key_map.weights(),
                LinearState(*state[LOCAL_TENSORS:]),
                self.config.normalisation,
                rotated=True,
            )
            branch, after = decode(heads, self.local, state, None, beyond, self._weights())
            return branch.o_BTHV, after
        ordered, put_back, exact, far = self._branches(heads, state)
        y_BTHV, linear = windowed_linear_attention(
            exact.near, far, exact.window, exact.position_BT, ordered.segments_BT, self._weights(), last=heads.last
        )
        return put_back(y_BTHV).to(heads.v_BTGV.dtype), (*exact.state, *linear)

    def _branches(self, heads: HeadInputs, state: MixerState | None) -> tuple[HeadInputs, PutBack, Read, Far]:
        before = local_state(state)
        heads, timeline, put_back = begin(heads, None if before is None else before.seen_B)
        exact = read(heads, timeline, self.local, before)
        far = Far(
            heads.q_BTHK if heads.rope is None else heads.rope.rotate(heads.q_BTHK),
            exact.left_k_BTGK,
            exact.left_v_BTGV,
            self.query_map.weights(),
            self.key_map.weights(),
            self.config.normalisation,
            state=None if state is None else LinearState(*state[LOCAL_TENSORS:]),
            mask_BT=exact.left_BT,
            delayed=exact.delayed,
        )
        return heads, put_back, exact, far

    def _weights(self) -> Weights:
        """Of the window and of the linear branch, per head."""
        near_H = self.window_factor_H.sigmoid()
        return weigh((near_H, 1 - near_H if self.config.affine else None), self, near_H)

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        exact = LocalRows(heads, self.local)
        rope = heads.rope
        q_BTHK, k_BTGK = heads.q_BTHK, heads.k_BTGK
        if rope is not None:
            q_BTHK, k_BTGK = rope.rotate_both(q_BTHK, k_BTGK)
        q_BTHF, k_BTHF = self.query_map(q_BTHK, "query"), self.key_map(k_BTGK, "key")
        near_H11, far_H11 = (1 if weight is None else weight.view(-1, 1, 1) for weight in self._weights())

        def rows(start: int, stop: int) -> Tensor:
            far = torch.einsum("bihf,bjhf->bhij", q_BTHF[:, start:stop], k_BTHF)
            far = far.masked_fill(~exact.split(start, stop)[1], 0)
            return normalised(near_H11 * exact.weights(start, stop)[0] + far_H11 * far)

        return rows

    def readings(self, heads: HeadInputs) -> Readings:
        ordered, put_back, exact, far = self._branches(heads, None)
        share_BTH = put_back(far_share(exact, far, ordered.segments_BT, self._weights())) * float(self.linear_branch)
        return Readings(linear_share_BTH=where_far(share_BTH, heads, self.local))
