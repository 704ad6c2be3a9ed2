"""One decoding step: a token after a state of tails, sinks and sums. Legend in __init__.py.

In Triton it is one launch. Elsewhere, and where anybody differentiates, the operations on whole sequences do the same
with the tail put before the token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from linearize_kernels.gated_linear_attention import Branch, LinearState, contiguous, unit
from linearize_kernels.hedgehog_attention import FeatureMap, Map
from linearize_kernels.windowed_linear_attention.chunk import LocalState


class Token(NamedTuple):
    """One token a row; query and key before rotation and scaling."""

    q_B1HK: Tensor
    k_B1GK: Tensor
    v_B1GV: Tensor
    cos_B1R: Tensor | None = None  # B or 1; None = nothing is rotated
    sin_B1R: Tensor | None = None
    mask_B1: Tensor | None = None  # False: padding, which changes no state


class NearStep(NamedTuple):
    """The window: its state, what scores are multiplied with, and whether it reads rotated queries and keys."""

    state: LocalState
    scale: float
    rotated: bool
    meta_HL: Tensor | None = None


class FarStep(NamedTuple):
    """The linear branch beside it. `left`: the key that leaves the window enters, if no sink keeps it, and not the
    token's own.
    """

    query_map: Map
    key_map: Map
    state: LinearState
    feature_map: FeatureMap = "softmax"
    gate_B1H: Tensor | None = None  # logits: the state is multiplied with their sigmoid before the key enters
    rotated: bool = False
    left: bool = True


def window_step(
    token: Token,
    near: NearStep,
    far: FarStep | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    separate: bool = False,
) -> tuple[Branch, LocalState, LinearState | None]:
    """Both branches of one token in one launch, as `windowed_linear_attention` has them; without `far`, the window.

    Args:
        weights: of the window and of the linear branch, [H] each; None = 1.
        separate: each branch has its own denominator.

    Returns:
        y [B, 1, H, V] in the dtype of v with the window's denominator, relative to the largest score, and both states
        after the token, in memory of their own.
    """
    from linearize_kernels.windowed_linear_attention.triton_step import window_step_op

    turned = [None if x is None else unit(x) for x in (token.cos_B1R, token.sin_B1R)]
    maps: list[Tensor | None] = [None] * 4
    sums: list[Tensor | None] = [None] * 2
    gate, form = None, "none"
    if far is not None:
        (query_weight, query_bias), (key_weight, key_bias) = far.query_map, far.key_map
        maps = [contiguous(x) for x in (query_weight, key_weight, query_bias, key_bias)]
        gate, form = far.gate_B1H, far.feature_map
        sums = [x.float().contiguous() for x in far.state]
    y, den, *state, s, z = window_step_op(
        unit(token.q_B1HK), unit(token.k_B1GK), unit(token.v_B1GV), *turned, token.mask_B1,
        *(x.contiguous() for x in near.state), contiguous(near.meta_HL), *maps, gate,
        *(contiguous(x) for x in weights), *sums,
        form, near.scale, near.rotated and turned[0] is not None,
        far is not None and far.rotated and turned[0] is not None, far is not None and far.left, separate,
    )  # fmt: skip
    return Branch(y, den), LocalState(*state), None if far is None else LinearState(s, z)
