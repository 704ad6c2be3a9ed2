"""Sliding-window softmax and sink tokens, with nothing for the rest: the baseline that a linear branch must beat.

A student without learned parts (arXiv 2309.17453 for the sinks). Legend in base.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from linearize.mixers.base import HeadInputs, HeadShapes, MixerConfig, MixerState, RowWeights, StudentMixer
from linearize.mixers.feature_maps import normalised
from linearize.mixers.local import Local, LocalRows, decodes, local_state, local_state_bytes, read
from linearize.mixers.timeline import begin


class SwaConfig(MixerConfig):
    """Options of the window without a linear branch."""

    kind: Literal["swa"] = "swa"
    window: int = Field(64, ge=1, le=4096, description="keys that are attended to exactly, the query's own included")
    sinks: int = Field(4, ge=0, le=64, description="first tokens of the document that stay visible")


class Swa(StudentMixer):
    """The teacher's softmax over the last `window` keys and the first `sinks` ones."""

    rows = "normalised"

    def __init__(self, config: SwaConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.local = Local(config.window, config.sinks, rope=True, scaling=shapes.scaling)

    def reset_parameters(self) -> None:
        """There are none."""

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        return local_state_bytes(self.local, self.shapes, dtype)

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        if state is not None and decodes(heads, state, self):
            from linearize.mixers.decoding import decode

            branch, after = decode(heads, self.local, state)
            return branch.o_BTHV, after
        before = local_state(state)
        heads, timeline, put_back = begin(heads, None if before is None else before.seen_B)
        exact = read(heads, timeline, self.local, before)
        return put_back(exact.attend().o_BTHV).to(heads.v_BTGV.dtype), exact.state

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        exact = LocalRows(heads, self.local)
        return lambda start, stop: normalised(exact.weights(start, stop)[0])
