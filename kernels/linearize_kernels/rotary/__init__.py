"""Rotary position embedding (arXiv 2104.09864) of queries and keys at once.

In plain torch it takes seven launches for each of the two, which is more of the host's time than the attention of a
linear student takes itself.

Shape legend: B batch, T tokens, H query heads, G key heads, K head width, R rotated channels. In Triton: C tokens of a
tile, P channels of half a rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.backend import uses_triton
from linearize_kernels.gated_linear_attention import unit

__all__ = ["rotary"]


def rotary(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn both, and multiply the queries by `scale`; computed in fp32 at least, rounded once.

    Args:
        q_BTHK, k_BTGK: before rotation, of one dtype.
        cos_BTR, sin_BTR: of each token's angles, both halves, [B or 1, T, R]; half-split convention, R <= K.
        dtype: of the results; None = that of the inputs.

    Returns:
        q [B, T, H, K] and k [B, T, G, K]. Cosines and sines get no gradient.
    """
    dtype = dtype or q_BTHK.dtype
    if q_BTHK.dtype == k_BTGK.dtype and uses_triton("rotary", q_BTHK, q_BTHK.shape[-1]):
        from linearize_kernels.rotary.launch import rotate

        if cos_BTR.requires_grad or sin_BTR.requires_grad:
            cos_BTR, sin_BTR = cos_BTR.detach(), sin_BTR.detach()
        return rotate(unit(q_BTHK), unit(k_BTGK), unit(cos_BTR), unit(sin_BTR), scale, dtype)
    cos, sin = cos_BTR.detach()[:, :, None], sin_BTR.detach()[:, :, None]
    return _turn(q_BTHK, cos, sin, scale).to(dtype), _turn(k_BTGK, cos, sin, 1.0).to(dtype)


def _turn(x_BTHK: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, scale: float) -> Tensor:
    x_BTHK = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    width = cos_BT1R.shape[-1]
    turned, kept = x_BTHK[..., :width], x_BTHK[..., width:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos_BT1R + torch.cat((-high, low), dim=-1) * sin_BT1R
    found = torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned
    return found if scale == 1 else found * scale
