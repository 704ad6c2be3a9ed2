"""What the contract of test_mixers.py cannot know of the mixers gdn, t2r and taylor: their formulas and starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from linearize.errors import RecipeError
from linearize.mixers.base import HeadInputs, HeadShapes
from linearize.mixers.feature_maps import MIN_FEATURE
from linearize.mixers.gdn import EPSILON, Gdn, GdnConfig
from linearize.mixers.t2r import T2r, T2rConfig
from linearize.mixers.taylor import MAX_LENGTH, Taylor, TaylorConfig, taylor_features
from linearize_kernels.gated_delta.naive import naive_gated_delta_rule
from tests.rulers import close

SHAPES = HeadShapes(width=12, query_heads=4, key_heads=2, key_width=8, value_width=6, scaling=8**-0.5)


def heads_of(length: int, batch: int = 2) -> HeadInputs:
    generator = torch.Generator().manual_seed(5)
    sizes = [(12,), (4, 8), (2, 8), (2, 6)]
    return HeadInputs(*(torch.randn(batch, length, *size, generator=generator, dtype=torch.float64) for size in sizes))


def moved(mixer: Any) -> Any:
    """Parameters off their start, in fp64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.double()


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + EPSILON).sqrt()


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def test_gdn_starts_as_the_plain_rule_on_the_teachers_heads() -> None:
    """Maps, convolutions, scale and output gate change nothing; beta is 0.25; decays follow the half-lives."""
    heads = heads_of(70)
    life_G = torch.tensor([16.0, 512.0], dtype=torch.float64)
    log_decay = (-math.log(2) / life_G).expand(2, 70, 2)
    expected, _ = naive_gated_delta_rule(
        unit(silu(heads.q_BTHK)), unit(silu(heads.k_BTGK)), heads.v_BTGV, log_decay, torch.full_like(log_decay, 0.25)
    )
    for config in (GdnConfig(), GdnConfig(maps=False, gate=False), GdnConfig(conv=4)):
        mixer = Gdn(config, SHAPES).double()
        close(mixer(heads)[0], expected, 1e-5)
        log_gate = mixer.readings(heads).log_gate
        assert log_gate is not None
        close(log_gate, log_decay, 1e-6)
    normed = Gdn(GdnConfig(norm="rms"), SHAPES).double()(heads)[0]
    close(normed, rms(expected), 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_half_lives_are_spread_over_key_heads(groups: int) -> None:
    shapes = replace(SHAPES, query_heads=groups, key_heads=groups)
    heads = HeadInputs(torch.zeros(1, 3, 12), *(torch.zeros(1, 3, groups, width) for width in (8, 8, 6)))
    log_gate = Gdn(GdnConfig(half_life=(4.0, 64.0)), shapes).readings(heads).log_gate
    assert log_gate is not None
    life_G = -math.log(2) / log_gate[0, 0]
    spread = {1: [16.0], 2: [4.0, 64.0], 5: [4.0, 8.0, 16.0, 32.0, 64.0]}[groups]
    close(life_G, torch.tensor(spread), 1e-4)


def test_gdn_is_its_formula() -> None:
    heads = heads_of(9, batch=1)
    mixer = moved(Gdn(GdnConfig(conv=3, norm="rms"), SHAPES))
    x = heads.x_BTD[0]

    def convolved(x_TXC: Tensor, taps_XCS: Tensor) -> Tensor:
        past = [torch.zeros_like(x_TXC[0])] * 2 + list(x_TXC)
        return torch.stack([sum(taps_XCS[..., s] * past[t + 2 - s] for s in range(3)) for t in range(9)])  # type: ignore[misc]

    q = convolved(heads.q_BTHK[0], mixer.query_taps_HKS)
    k = convolved(heads.k_BTGK[0], mixer.key_taps_GKS)
    v = convolved(heads.v_BTGV[0], mixer.value_taps_GVS)
    q = torch.stack([q[:, h] @ mixer.query_weight_HKK[h] + mixer.query_bias_HK[h] for h in range(4)], 1)
    k = torch.stack([k[:, g] @ mixer.key_weight_GKK[g] + mixer.key_bias_GK[g] for g in range(2)], 1)
    q, k = unit(silu(q)), unit(silu(k))
    rate = (1 + (x @ mixer.decay.weight.T + mixer.decay.bias).exp()).log()
    beta = (x @ mixer.beta.weight.T + mixer.beta.bias).sigmoid()
    o, _ = naive_gated_delta_rule(q[None], k[None], v[None], (-mixer.decay_log_rate_G.exp() * rate)[None], beta[None])
    z = (x @ mixer.gate.weight.T + mixer.gate.bias).view(1, 9, 4, 6)
    expected = rms(o) * mixer.norm_weight_HV * z * z.sigmoid()
    close(mixer(heads)[0], expected)


@pytest.mark.parametrize("conv", [0, 4])
def test_gdn_masked_tokens_anywhere_change_nothing(conv: int) -> None:
    mixer, heads = moved(Gdn(GdnConfig(conv=conv), SHAPES)), heads_of(100, batch=1)
    real = torch.rand(100, generator=torch.Generator().manual_seed(3)) > 0.4
    tensors = {name: tensor[:, real] for name, tensor in vars(heads).items() if isinstance(tensor, Tensor)}
    expected, end = mixer(HeadInputs(**tensors))
    y, state = mixer(replace(heads, mask_BT=real[None]))
    close(y[:, real], expected)
    for left, right in zip(state, end, strict=True):
        close(left, right)
    _, after = mixer(replace(heads, mask_BT=torch.zeros_like(real)[None]), state)
    for left, right in zip(after, state, strict=True):
        close(left, right)


@pytest.mark.parametrize(
    "values",
    [{"conv": 1}, {"conv": 33}, {"half_life": (64, 16)}, {"half_life": (0, 16)}, {"half_life": (1, math.inf)}],
)
def test_gdn_refuses_contradictions(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GdnConfig(**values)


@pytest.mark.parametrize("width", [1, 2, 5, 8, 16])
def test_taylor_features_are_the_series(width: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, width, dtype=torch.float64)
    s = (q * k).sum(-1) / width**0.5
    phi_q, phi_k = taylor_features(q), taylor_features(k)
    assert phi_q.shape[-1] == 1 + width + width * (width + 1) // 2
    close((phi_q * phi_k).sum(-1), 1 + s + s**2 / 2)


def test_taylor_weights_stay_positive_in_fp32_whatever_the_heads() -> None:
    torch.manual_seed(0)
    q, k = (taylor_features(1e4 * torch.randn(300, 16)) for _ in range(2))
    assert (q @ k.T).min() > 0.4
    assert taylor_features(torch.zeros(1, 16)).isfinite().all()
    long = taylor_features(torch.tensor([[100.0, 0, 0, 0]]))
    close(long[0, 1:5].norm(), torch.tensor(MAX_LENGTH), 1e-6)
    x = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(taylor_features(x).sum(), x)
    assert gradient.isfinite().all()


def test_taylor_starts_at_the_teachers_logits() -> None:
    """With d' = K exactly; with fewer, on the channels it picks, which are whole pairs of RoPE."""
    heads = heads_of(20)
    heads = replace(heads, q_BTHK=heads.q_BTHK / 4)
    whole = Taylor(TaylorConfig(features=8), SHAPES).double()
    logit = torch.einsum("bihk,bjhk->bhij", heads.q_BTHK, heads.k_BTGK.repeat_interleave(2, 2)) * SHAPES.scaling
    weight = (1 + logit + logit**2 / 2).tril()
    close(whole.row_weights(heads)(0, 20), weight / weight.sum(-1, keepdim=True), 1e-6)
    part = Taylor(TaylorConfig(features=4), SHAPES)
    assert part.query_weight_HKE.abs().sum((0, 2)).nonzero().flatten().tolist() == [2, 3, 6, 7]


def test_taylor_refuses_more_features_than_the_heads_have() -> None:
    with pytest.raises(RecipeError, match=r"mixer\.features: 9 projected features of heads that are 8 wide\. Use 8"):
        Taylor(TaylorConfig(features=9), SHAPES)


@pytest.mark.parametrize("features", [None, 3, 20])
def test_t2r_is_its_formula(features: int | None) -> None:
    heads, mixer = heads_of(10), moved(T2r(T2rConfig(features=features), SHAPES))
    rows = mixer.row_weights(heads)(0, 10)
    for head in range(4):
        q = (heads.q_BTHK[:, :, head] @ mixer.query_weight_HKF[head] + mixer.query_bias_HF[head]).relu()
        k = (heads.k_BTGK[:, :, head // 2] @ mixer.key_weight_HKF[head] + mixer.key_bias_HF[head]).relu()
        weight = (q.clamp_min(MIN_FEATURE) @ k.clamp_min(MIN_FEATURE).mT).tril()
        close(rows[:, head], weight / weight.sum(-1, keepdim=True))


def test_t2r_starts_with_both_signs_and_reads_the_mean_where_nothing_fires() -> None:
    mixer = T2r(T2rConfig(features=20), SHAPES)
    both = torch.cat([torch.eye(8), -torch.eye(8)], dim=1)
    assert torch.equal(mixer.query_weight_HKF[2, :, :16], both)
    assert (mixer.key_weight_HKF[..., 16:] != 0).all()
    heads = heads_of(6)
    off = replace(heads, q_BTHK=-heads.q_BTHK.abs(), k_BTGK=-heads.k_BTGK.abs())
    y, _ = T2r(T2rConfig(features=8), SHAPES).double()(off)
    mean = off.v_BTGV.cumsum(1) / torch.arange(1, 7).view(1, 6, 1, 1)
    close(y, mean.repeat_interleave(2, dim=2), 1e-6)
