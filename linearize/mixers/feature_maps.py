"""The Hedgehog feature map phi(x) = [f(xW + b) ; f(-(xW + b))] (arXiv 2402.04347) in its three published forms.

Shape legend: B batch, T tokens, H maps, G input heads (H = G * N: head g feeds maps g*N .. g*N+N-1), K head width,
F features per sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, RowWeights
from linearize_kernels.hedgehog_attention import FeatureMap as Normalisation
from linearize_kernels.hedgehog_attention import Map, hedgehog_features, map_heads
from linearize_kernels.hedgehog_attention.maps import MAX_EXPONENT, MIN_FEATURE

__all__ = [
    "MAX_EXPONENT",
    "MIN_FEATURE",
    "HedgehogMap",
    "Normalisation",
    "feature_rows",
    "map_heads",
    "normalised",
    "start_maps",
]


class HedgehogMap(nn.Module):
    """H learned maps, each K -> 2F non-negative features, see `hedgehog_features`."""

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
        return hedgehog_features(x_BTGK, *self.weights(), self.normalisation, side)

    def weights(self) -> Map:
        """For operations that map heads themselves."""
        return Map(self.weight_HKF, self.bias_HF)


def start_maps(weights: Iterable[Tensor | None], biases: Iterable[Tensor | None]) -> None:
    """Linear maps of heads [X, K, K] begin as identities, biases [X, K] as 0; None is a map that there is not."""
    with torch.no_grad():
        for weight_XKK in weights:
            if weight_XKK is not None:
                weight_XKK.copy_(torch.eye(weight_XKK.shape[-1]))
        for bias_XK in biases:
            if bias_XK is not None:
                bias_XK.zero_()


def feature_rows(heads: HeadInputs, q_BTHF: Tensor, k_BTHF: Tensor) -> RowWeights:
    """`StudentMixer.row_weights` of normalised linear attention with these features."""

    def rows(start: int, stop: int) -> Tensor:
        score_BHRT = torch.einsum("bihf,bjhf->bhij", q_BTHF[:, start:stop], k_BTHF)
        return normalised(score_BHRT.masked_fill(~heads.seen(start, stop), 0))

    return rows


def normalised(weight_BHRT: Tensor) -> Tensor:
    """Rows that sum to 1."""
    return weight_BHRT / weight_BHRT.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_BHRT.dtype).tiny)
