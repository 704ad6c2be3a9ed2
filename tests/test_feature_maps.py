"""Hedgehog's feature maps against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize.mixers import build_mixer
from linearize.mixers.feature_maps import MAX_EXPONENT, HedgehogMap
from linearize.mixers.hedgehog import HedgehogConfig
from linearize_kernels.gated_linear_attention.naive import naive_linear_attention
from tests.tiny_mixers import CASES, HEADS, KEY, close, heads_of, mixer_of, shapes


def phi(x: Tensor, weight: Tensor, bias: Tensor, form: str) -> Tensor:
    """Feature vector of one head's row x [K], element by element."""
    u = [sum(x[k] * weight[k, f] for k in range(weight.shape[0])) + bias[f] for f in range(weight.shape[1])]
    plus, minus = torch.stack(u).exp(), (-torch.stack(u)).exp()
    if form == "exp":
        return torch.cat([plus, minus])
    if form == "softmax":
        return torch.cat([plus / plus.sum(), minus / minus.sum()])
    return torch.cat([plus**2, minus**2]) / (plus**2 + minus**2).sum()


@pytest.mark.parametrize("form", ["exp", "softmax", "softmax_joint"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_feature_maps_are_their_formulas(form: str, groups: int) -> None:
    torch.manual_seed(2)
    maps = HedgehogMap(4, 3, 5, bias=True, normalisation=form).double()  # type: ignore[arg-type]
    assert maps.bias_HF is not None
    with torch.no_grad():
        maps.weight_HKF.normal_()
        maps.bias_HF.normal_()
    x = torch.randn(2, 3, groups, 3, dtype=torch.float64)
    for side in ("query", "key"):
        got = maps(x, side)
        for head in range(4):
            expected = phi(x[1, 2, head // (4 // groups)], maps.weight_HKF[head], maps.bias_HF[head], form)
            if form == "exp" and side == "query":
                expected = expected / expected.max()
            close(got[1, 2, head], expected)


def test_query_shift_of_the_exp_form_cancels() -> None:
    mixer, heads = mixer_of("hedgehog-exp", dtype=torch.float64), heads_of(65)
    assert heads.rope is not None
    q, k = heads.rope.rotate(heads.q_BTHK), heads.rope.rotate(heads.k_BTGK)
    u = torch.einsum("bthk,hkf->bthf", q, mixer.query_map.weight_HKF)  # type: ignore[union-attr]
    w = torch.einsum("bthk,hkf->bthf", k.repeat_interleave(2, 2), mixer.key_map.weight_HKF)  # type: ignore[union-attr]
    unshifted = naive_linear_attention(torch.cat([u, -u], -1).exp(), torch.cat([w, -w], -1).exp(), heads.v_BTGV)
    close(mixer(heads)[0], unshifted)


def test_exp_form_survives_huge_exponents() -> None:
    maps = HedgehogMap(1, 1, 1, bias=False, normalisation="exp")
    maps.reset_parameters()
    x = torch.tensor([500.0, -500.0, 0.0]).view(1, 3, 1, 1)
    assert maps(x, "query").amax(-1).unique().tolist() == [1.0]
    keys = maps(x, "key")
    assert torch.isfinite(keys).all()
    assert keys.max() == torch.tensor(MAX_EXPONENT).exp()


@pytest.mark.parametrize("features", [4, 16, 24])
def test_identity_start_passes_the_heads_through(features: int) -> None:
    mixer = build_mixer(HedgehogConfig(features=features, bias=True), shapes())
    for maps in (mixer.query_map, mixer.key_map):
        assert torch.equal(maps.weight_HKF, torch.eye(KEY, features).expand(HEADS, -1, -1))  # type: ignore[union-attr]
        assert not maps.bias_HF.any()  # type: ignore[union-attr]


def test_tied_maps_are_one_parameter() -> None:
    count = {case: sum(p.numel() for p in mixer_of(case).parameters()) for case in CASES}
    assert count["hedgehog"] == 2 * HEADS * KEY * KEY
    assert count["hedgehog-tied"] == HEADS * KEY * KEY
    assert count["hedgehog-bias"] == 2 * HEADS * (KEY + 1) * KEY
