"""One decoding step: decay the state, write once, read once. Legend in __init__.py."""

from __future__ import annotations

from torch import Tensor


def step_ssd(
    q_B1HK: Tensor,
    k_B1GK: Tensor,
    v_B1GV: Tensor,
    log_decay_B1H: Tensor,
    write_B1H: Tensor | None,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself. Same arguments and results as `ssd`, for one token."""
    dtype, groups = state_BHKV.dtype, k_B1GK.shape[2]
    outer_BGKV = k_B1GK[:, 0].to(dtype).unsqueeze(-1) * v_B1GV[:, 0].to(dtype).unsqueeze(-2)
    outer_BGPKV = outer_BGKV.unsqueeze(2)
    if write_B1H is not None:
        outer_BGPKV = outer_BGPKV * write_B1H[:, 0].to(dtype).unflatten(1, (groups, -1))[..., None, None]
    decay_BH11 = log_decay_B1H[:, 0].to(dtype).exp()[..., None, None]
    s_BHKV = (decay_BH11 * state_BHKV).unflatten(1, (groups, -1)).add(outer_BGPKV).flatten(1, 2)
    return (q_B1HK.to(dtype).transpose(1, 2) @ s_BHKV).transpose(1, 2), s_BHKV
