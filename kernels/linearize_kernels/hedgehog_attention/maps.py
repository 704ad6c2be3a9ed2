"""The Hedgehog feature map in torch. Legend in __init__.py."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

FeatureMap = Literal["exp", "softmax", "softmax_joint"]

MAX_EXPONENT = 60.0
"""Key exponents of the `exp` form are cut here: e^60 times a million tokens still fits fp32."""

MIN_FEATURE = 1e-12
"""No feature is smaller (arXiv 2410.10254 does the same): where a query and all keys peak in different features, the
sum of their products would leave fp32, and its gradient would be NaN."""


class Map(NamedTuple):
    """A learned linear map per head."""

    weight_HKF: Tensor
    bias_HF: Tensor | None = None


def hedgehog_features(
    x_BTGK: Tensor, weight_HKF: Tensor, bias_HF: Tensor | None, feature_map: FeatureMap, side: Literal["query", "key"]
) -> Tensor:
    """Features [B, T, H, 2F] in fp32 (fp64 for fp64 weights). Input heads are not repeated in memory.

    Feature maps, which are three functions (arXiv 2402.04347, arXiv 2410.10254 and a later library); the query side
    of each cancels in the attention's denominator, the key side does not:
        exp: [exp(u) ; exp(-u)] with u = xW + b. Query exponents are shifted by their maximum, which cancels.
        softmax: [softmax(u) ; softmax(-u)], two separate softmaxes over F.
        softmax_joint: softmax([2u ; -2u]), one softmax over 2F.
    """
    u_BTHF = map_heads(x_BTGK, weight_HKF, bias_HF)
    if feature_map == "softmax":
        return torch.cat([u_BTHF.softmax(-1), (-u_BTHF).softmax(-1)], dim=-1).clamp_min(MIN_FEATURE)
    both = torch.cat([u_BTHF, -u_BTHF], dim=-1)
    if feature_map == "softmax_joint":
        return (2 * both).softmax(-1).clamp_min(MIN_FEATURE)
    if side == "query":
        return (both - both.amax(-1, keepdim=True).detach()).exp().clamp_min(MIN_FEATURE)
    return both.clamp_max(MAX_EXPONENT).exp()


def map_heads(x_BTGK: Tensor, weight_HKF: Tensor, bias_HF: Tensor | None = None) -> Tensor:
    """u [B, T, H, F] = x W + b in fp32 (fp64 for fp64 weights); input head g feeds maps g * H / G and on.

    Input heads are not repeated in memory.
    """
    maps, width, features = weight_HKF.shape
    batch, length, groups, _ = x_BTGK.shape
    dtype = torch.promote_types(weight_HKF.dtype, torch.float32)
    weight_GKN = weight_HKF.to(dtype).view(groups, maps // groups, width, features).transpose(1, 2).flatten(2)
    x_GLK = x_BTGK.to(dtype).flatten(0, 1).transpose(0, 1)
    u_BTHF = (x_GLK @ weight_GKN).transpose(0, 1).reshape(batch, length, maps, features)
    return u_BTHF if bias_HF is None else u_BTHF + bias_HF.to(dtype)
