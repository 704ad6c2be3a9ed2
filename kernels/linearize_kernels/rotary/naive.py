"""Rotary position embedding by its definition: channel pairs as complex numbers, turned one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rotary(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x with channels j and j + R/2 turned by the j-th angle (arXiv 2104.09864); the rest is kept."""
    half = cos_BTR.shape[-1] // 2
    y_BTHK = x_BTHK.clone()
    for j in range(half):
        low, high = x_BTHK[..., j], x_BTHK[..., j + half]
        cos = (cos_BTR[:, :, None, j], cos_BTR[:, :, None, j + half])
        sin = (sin_BTR[:, :, None, j], sin_BTR[:, :, None, j + half])
        y_BTHK = torch.cat(
            (
                y_BTHK[..., :j],
                (low * cos[0] - high * sin[0])[..., None],
                y_BTHK[..., j + 1 : j + half],
                (high * cos[1] + low * sin[1])[..., None],
                y_BTHK[..., j + half + 1 :],
            ),
            dim=-1,
        )
    return y_BTHK * scale
