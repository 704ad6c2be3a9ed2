"""The Hedgehog feature map phi(x) = [f(xW + b) ; f(-(xW + b))] (arXiv 2402.04347) in its three published forms.

Shape legend: B batch, T tokens, H maps, G input heads (H = G * N: head g feeds maps g*N .. g*N+N-1), K head width,
F features per sign.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, RowWeights

Normalisation = Literal["exp", "softmax", "softmax_joint"]

MAX_EXPONENT = 60.0
"""Key exponents of the `exp` form are cut here: e^60 times a million tokens still fits fp32."""


MIN_FEATURE = 1e-12
"""No feature is smaller (arXiv 2410.10254 does the same): where a query and all keys peak in different features, the
sum of their products would leave fp32, and its gradient would be NaN."""


class HedgehogMap(nn.Module):
    """H learned maps, each K -> 2F non-negative features.

    Normalisations, which are three different functions (methods of arXiv 2402.04347, 2410.10254 and of a later
    library); the query side of each cancels in the attention's denominator, the key side does not:
        exp: [exp(u) ; exp(-u)] with u = xW + b. Query exponents are shifted by their maximum, which cancels.
        softmax: [softmax(u) ; softmax(-u)], two separate softmaxes over F.
        softmax_joint: softmax([2u ; -2u]), one softmax over 2F.
    """

    def __init__(self, maps: int, width: int, features: int, bias: bool, normalisation: Normalisation) -> None:
        super().__init__()
        self.weight_HKF = nn.Parameter(torch.empty(maps, width, features))
        self.bias_HF = nn.Parameter(torch.empty(maps, features)) if bias else None
        self.normalisation = normalisation

    def reset_parameters(self, start: Literal["identity", "kaiming"] = "identity") -> None:
        """Rectangular identity (the student starts from the teacher's own q and k) or Kaiming-uniform; zero bias."""
        maps, width, features = self.weight_HKF.shape
        with torch.no_grad():
            if start == "identity":
                self.weight_HKF.copy_(torch.eye(width, features).expand(maps, -1, -1))
            else:
                bound = (6.0 / width) ** 0.5
                self.weight_HKF.uniform_(-bound, bound)
            if self.bias_HF is not None:
                self.bias_HF.zero_()

    def forward(self, x_BTGK: Tensor, side: Literal["query", "key"]) -> Tensor:
        """Features [B, T, H, 2F] in fp32 (fp64 for fp64 weights). Input heads are not repeated in memory."""
        u_BTHF = map_heads(x_BTGK, self.weight_HKF, self.bias_HF)
        if self.normalisation == "softmax":
            return torch.cat([u_BTHF.softmax(-1), (-u_BTHF).softmax(-1)], dim=-1).clamp_min(MIN_FEATURE)
        both = torch.cat([u_BTHF, -u_BTHF], dim=-1)
        if self.normalisation == "softmax_joint":
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


def feature_rows(heads: HeadInputs, q_BTHF: Tensor, k_BTHF: Tensor) -> RowWeights:
    """`StudentMixer.row_weights` of normalised linear attention with these features."""

    def rows(start: int, stop: int) -> Tensor:
        score_BHRT = torch.einsum("bihf,bjhf->bhij", q_BTHF[:, start:stop], k_BTHF)
        return normalised(score_BHRT.masked_fill(~heads.seen(start, stop), 0))

    return rows


def normalised(weight_BHRT: Tensor) -> Tensor:
    """Rows that sum to 1."""
    return weight_BHRT / weight_BHRT.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_BHRT.dtype).tiny)
