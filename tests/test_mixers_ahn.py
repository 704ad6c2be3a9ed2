"""What the contract of test_mixers.py cannot know of the mixer ahn: its formula, token by token, and its starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny_mixers import HEADS, KEY, VALUE, close, cut, heads_of, mixer_of, shapes
from torch import Tensor

from linearize.mixers.ahn import NORM_EPSILON, RATES, STEPS, Ahn, AhnConfig
from linearize.mixers.base import HeadInputs, silenced
from linearize.mixers.delta import EPSILON
from linearize.mixers.swa import Swa, SwaConfig

GROUP = 2


def softmax_window(mixer: Ahn, heads: HeadInputs, t: int) -> Tensor:
    """What the teacher's softmax over the window and the sinks gives token t: [B, H, V]."""
    assert heads.rope is not None
    q_BTHK, k_BTGK = heads.rope.rotate(heads.q_BTHK), heads.rope.rotate(heads.k_BTGK)
    seen = [j for j in range(t + 1) if t - j < mixer.config.window or j < mixer.config.sinks]
    k_BSHK, v_BSHV = (x[:, seen].repeat_interleave(GROUP, dim=2) for x in (k_BTGK, heads.v_BTGV))
    score_BHS = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], k_BSHK) * KEY**-0.5
    return torch.einsum("bhs,bshv->bhv", score_BHS.softmax(-1), v_BSHV)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + EPSILON).sqrt()


def written_out(mixer: Ahn, heads: HeadInputs) -> Tensor:
    """The formulas of the mixer's docstring, with a loop over tokens and one state matrix for every query head."""
    config, (batch, length) = mixer.config, heads.q_BTHK.shape[:2]
    assert heads.rope is not None
    if config.published:
        q_BTHK, k_BTGK = heads.rope.rotate(heads.q_BTHK), heads.rope.rotate(heads.k_BTGK)
        q_BTHK, k_BTHK = unit(q_BTHK), unit(k_BTGK).repeat_interleave(GROUP, dim=2)
    else:
        weights: dict[str, Any] = dict(mixer.named_parameters())
        q_BTHK = torch.einsum("bthk,hkl->bthl", heads.q_BTHK, weights["query_weight_HKK"]) + weights["query_bias_HK"]
        k_BTGK = torch.einsum("btgk,gkl->btgl", heads.k_BTGK, weights["key_weight_GKK"]) + weights["key_bias_GK"]
        q_BTHK, k_BTGK = unit(F.silu(q_BTHK)), unit(F.silu(k_BTGK))
        k_BTHK = k_BTGK.repeat_interleave(GROUP, dim=2)
    v_BTHV = heads.v_BTGV.repeat_interleave(GROUP, dim=2)
    copies = 1 if config.published else GROUP
    rate_BTJ = F.softplus(heads.x_BTD @ mixer.decay.weight.T + mixer.decay.bias)
    alpha_BTH = (-mixer.decay_log_rate_J.exp() * rate_BTJ).exp().repeat_interleave(copies, dim=-1)
    beta_BTH = mixer.beta(heads.x_BTD).sigmoid().repeat_interleave(copies, dim=-1)
    s_BHKV, outputs = heads.x_BTD.new_zeros(batch, HEADS, KEY, VALUE), []
    for t in range(length):
        j = t - config.window
        if j >= config.sinks:
            key, value = k_BTHK[:, j], v_BTHV[:, j]
            s_BHKV = alpha_BTH[:, j, :, None, None] * s_BHKV
            wrong_BHV = value - torch.einsum("bhkv,bhk->bhv", s_BHKV, key)
            s_BHKV = s_BHKV + beta_BTH[:, j, :, None, None] * key[..., None] * wrong_BHV[:, :, None]
        o_BHV, near_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BTHK[:, t]), softmax_window(mixer, heads, t)
        logit_BH = mixer.gate(heads.x_BTD[:, t])
        if config.published:
            assert mixer.norm_weight_V is not None
            assert mixer.output_weight_HVV is not None
            o_BHV = o_BHV * KEY**-0.5
            o_BHV = o_BHV / (o_BHV.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt() * mixer.norm_weight_V
            o_BHV = torch.einsum("bhv,hvw->bhw", o_BHV * F.silu(logit_BH)[..., None], mixer.output_weight_HVV)
            outputs.append(near_BHV + o_BHV)
        else:
            assert mixer.scale_HV is not None
            share_BH1 = logit_BH.sigmoid()[..., None] * float(j >= config.sinks)
            outputs.append((1 - share_BH1) * near_BHV + share_BH1 * mixer.scale_HV * o_BHV)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("case", ["ahn-small", "ahn-one", "ahn-published-small", "ahn-published"])
def test_ahn_is_its_formula(case: str) -> None:
    mixer, heads = mixer_of(case), heads_of(60)
    assert isinstance(mixer, Ahn)
    close(mixer(heads)[0], written_out(mixer, heads), 1e-9)


@pytest.mark.parametrize("published", [False, True])
def test_ahn_starts_at_its_window(published: bool) -> None:
    """Ours with a tenth of the state's answer, the published form with none; before a key has left, exactly."""
    torch.manual_seed(0)
    mixer = Ahn(AhnConfig(published=published, window=8, sinks=2), shapes()).double()
    heads = heads_of(40)
    window = Swa(SwaConfig(window=8, sinks=2), shapes())(heads)[0]
    found = mixer(heads)[0]
    close(found[:, :10], window[:, :10])
    if published:
        close(found, window)
    else:
        with silenced([mixer], "window"):
            o_BTHV = mixer(heads)[0]
        close(found[:, 10:], 0.9 * window[:, 10:] + 0.1 * o_BTHV[:, 10:], 1e-7)  # gates and maps are fp32 at the start


def test_published_gates_start_as_drawn() -> None:
    torch.manual_seed(0)
    mixer = Ahn(AhnConfig(published=True), replace(shapes(), query_heads=64, key_heads=64))
    rate_J, step_J = mixer.decay_log_rate_J.exp(), F.softplus(mixer.decay.bias)
    assert RATES[0] <= rate_J.min() < 2
    assert 14 < rate_J.max() <= RATES[1]
    assert STEPS[0] * 0.999 <= step_J.min() < 3 * STEPS[0]
    assert STEPS[1] / 3 < step_J.max() <= STEPS[1] * 1.001
    chosen = Ahn(AhnConfig(published=True, half_life=(4.0, 4.0)), shapes())
    half = chosen.readings(heads_of(3, dtype=torch.float32)).log_gate
    assert half is not None
    close(half, torch.full_like(half, math.log(0.5) / 4), 1e-6)


@pytest.mark.parametrize("case", ["ahn-small", "ahn-published-small"])
def test_what_leaves_is_written_with_the_gates_of_its_own_token(case: str) -> None:
    """The inputs that gates read change at one token: nothing differs before it has left the window."""
    mixer, heads = mixer_of(case), heads_of(30)
    assert isinstance(mixer, Ahn)
    changed = heads.x_BTD.clone()
    changed[:, 4] += 1.0
    other = replace(heads, x_BTD=changed)
    leaves = 4 + mixer.config.window
    same, different = mixer(heads)[0], mixer(other)[0]
    same, different = (torch.cat([y[:, :4], y[:, 5:leaves]], dim=1) for y in (same, different))
    close(same, different)
    assert (mixer(heads)[0][:, leaves:] - mixer(other)[0][:, leaves:]).abs().max() > 1e-6


@pytest.mark.parametrize("case", ["ahn-small", "ahn-published-small"])
def test_share_is_read_only_where_a_key_has_left(case: str) -> None:
    mixer, heads = mixer_of(case), heads_of(30)
    assert isinstance(mixer, Ahn)
    found = mixer.readings(heads)
    assert found.log_gate is not None
    assert (found.log_gate <= 0).all()
    assert found.linear_share_BTH is not None
    first = mixer.config.window + mixer.config.sinks
    assert found.linear_share_BTH[:, :first].isnan().all()
    share_BTH = found.linear_share_BTH[:, first:]
    assert (share_BTH > 0).all()
    assert (share_BTH < 1).all()
    with torch.no_grad(), silenced([mixer], "linear"):
        silent = mixer.readings(heads).linear_share_BTH
    assert silent is not None
    assert not silent[:, first:].any()


def test_state_is_the_size_it_says() -> None:
    for case in ("ahn-small", "ahn-published-small"):
        mixer, heads = mixer_of(case, dtype=torch.float32), heads_of(20, dtype=torch.float32, batch=1)
        _, state = mixer(cut(heads, slice(0, 20)))
        assert mixer.state_bytes() == sum(x.numel() * x.element_size() for x in state)


def test_ahn_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValidationError, match="the smaller one first"):
        AhnConfig(half_life=(9.0, 3.0))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AhnConfig(window=0)
