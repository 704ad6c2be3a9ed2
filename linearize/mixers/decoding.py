"""One token of a windowed mixer in one launch. Mixers import it where they use it: code that travels has no Triton.

Legend in base.py; L meta logits.
"""

from __future__ import annotations

from torch import Tensor

from linearize.mixers.base import HeadInputs, MixerState
from linearize.mixers.local import Local, local_state
from linearize_kernels import Branch, FarStep, NearStep, Token, window_step

__all__ = ["FarStep", "decode"]


def decode(
    heads: HeadInputs,
    local: Local,
    state: MixerState,
    meta_HL: Tensor | None = None,
    far: FarStep | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    separate: bool = False,
) -> tuple[Branch, MixerState]:
    """One token after `LocalState` (the first tensors of `state`), in one launch; the new state ends with `far`'s."""
    before = local_state(state)
    assert before is not None
    rope = heads.rope
    cos, sin = (None, None) if rope is None else (rope.cos_BTR, rope.sin_BTR)
    token = Token(heads.q_BTHK, heads.k_BTGK, heads.v_BTGV, cos, sin, heads.mask_BT)
    near = NearStep(before, local.scaling, local.rope, meta_HL)
    found, exact, linear = window_step(token, near, far, weights, separate=separate)
    return found, (*exact, *(linear or ()))
