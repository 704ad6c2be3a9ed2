"""What mixers with the gated delta rule (arXiv 2412.06464) share: decays, and queries and keys of length 1.

Shape legend in base.py; J heads that decay.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.mixers.feature_maps import map_heads
from linearize.mixers.gates import HalfLife, rates

Activation = Literal["none", "silu"]

START_BETA = 0.25
"""Of the writing strength. What is read under a key is then a running mean over about four tokens with that key."""

EPSILON = 1e-6
"""Added to sums of squares before their root is divided by."""


def mapped(x_BTXK: Tensor, weight_XKK: Tensor | None, bias_XK: Tensor | None, activation: Activation) -> Tensor:
    """Queries or keys in fp32 at least, through their map, where there is one, and the activation."""
    x_BTXK = x_BTXK.to(torch.promote_types(x_BTXK.dtype, torch.float32))
    if weight_XKK is not None:
        x_BTXK = map_heads(x_BTXK, weight_XKK, bias_XK)
    return F.silu(x_BTXK) if activation == "silu" else x_BTXK


def unit(x_BTXK: Tensor) -> Tensor:
    """Of length 1."""
    return x_BTXK * (x_BTXK.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def log_decay(x_BTD: Tensor, decay: nn.Linear, log_rate_J: Tensor) -> Tensor:
    """log alpha = -exp(A_log) softplus(x w_a + dt_bias), [B, T, J] <= 0; `decay` is w_a with dt_bias."""
    return -log_rate_J.exp() * F.softplus(decay(x_BTD.to(decay.weight.dtype)))


def start_decay(decay: nn.Linear, log_rate_J: Tensor, half_life: HalfLife) -> None:
    """Constant decays of these half-lives: A = 1, w_a = 0, softplus(dt_bias) = log(2) / half-life."""
    with torch.no_grad():
        decay.weight.zero_()
        rate_J = torch.tensor(rates(decay.out_features, half_life), dtype=torch.float64)
        decay.bias.copy_(rate_J.expm1().log())  # the inverse of softplus
        log_rate_J.zero_()
