"""The ssd kernel against the token loop, and what the contract of test_mixers.py cannot know of the Mamba-2 mixer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from linearize.mixers.base import HeadInputs, HeadShapes
from linearize.mixers.mamba2 import DT_RANGE, FORMS, Mamba2, Mamba2Config, Variant
from linearize.mixers.timeline import begin
from linearize_kernels.ssd import ssd
from linearize_kernels.ssd.chunk import chunk_ssd
from linearize_kernels.ssd.naive import naive_ssd
from tests.rulers import both_close, close, cut, segments

HEADS = {"equal": (3, 3), "gqa3": (6, 2), "gqa4": (4, 1)}  # H, G
LENGTHS = [1, 63, 64, 65, 130, 1000]
KEY, VALUE = 8, 5


def inputs(length: int, heads: str = "gqa3", dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    """q, k, v, log_decay, write."""
    generator = torch.Generator().manual_seed(length)
    query_heads, groups = HEADS[heads]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(batch, length, *sizes, generator=generator, dtype=torch.float64)

    tensors = [draw(query_heads, KEY), draw(groups, KEY), draw(groups, VALUE)]
    return [tensor.to(dtype) for tensor in (*tensors, -0.2 * draw(query_heads).exp(), draw(query_heads).exp())]


def test_naive_is_the_quadratic_form() -> None:
    """Y = (L * C B^T) diag(dt) X, head by head, as arXiv 2405.21060 writes it."""
    q, k, v, log_decay, write = inputs(9, "gqa3", batch=1)
    o, _ = naive_ssd(q, k, v, log_decay, write)
    for h in range(6):
        weight_TT = torch.zeros(9, 9, dtype=torch.float64)
        for i in range(9):
            for j in range(i + 1):
                decay = math.prod(log_decay[0, t, h].exp().item() for t in range(j + 1, i + 1))
                weight_TT[i, j] = decay * write[0, j, h] * (q[0, i, h] @ k[0, j, h // 3])
        close(o[0, :, h], weight_TT @ v[0, :, h // 3])


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_fast_forms_equal_naive(heads: str, length: int, written: bool) -> None:
    q, k, v, log_decay, write = inputs(length, heads)
    scale = write if written else None
    expected = naive_ssd(q, k, v, log_decay, scale)
    both_close(ssd(q, k, v, log_decay, scale), expected)
    zero = torch.zeros_like(expected[1])
    both_close(chunk_ssd(q, k, v, log_decay, scale, zero, chunk=16), expected)


@pytest.mark.parametrize("log_decay", [0.0, -1.6, -20.0, -torch.inf])
def test_strong_decays_are_exact(log_decay: float) -> None:
    """Also in fp32 and after a token that forgot everything: exponents are sums of what lies between two tokens."""
    q, k, v, gate, write = inputs(200)
    gate = gate.clone()
    gate[:, ::7] = log_decay
    expected = naive_ssd(q, k, v, gate, write)
    both_close(ssd(q, k, v, gate, write), expected)
    single = [tensor.float() for tensor in (q, k, v, gate, write)]
    for found, loop, exact in zip(ssd(*single), naive_ssd(*single), expected, strict=True):
        assert (found.double() - exact).abs().max() <= 4 * (loop.double() - exact).abs().max() + 2e-5
    both_close(ssd(q, k, v, torch.full_like(gate, log_decay)), naive_ssd(q, k, v, torch.full_like(gate, log_decay)))


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 199), max_size=5), heads=st.sampled_from(sorted(HEADS)))
def test_split_anywhere_equals_whole(cuts: set[int], heads: str) -> None:
    tensors = inputs(200, heads)
    edges, state, found = [0, *sorted(cuts), 200], None, []
    for start, stop in zip(edges, edges[1:], strict=False):
        o, state = ssd(*cut(tensors, slice(start, stop)), state)
        found.append(o)
    assert state is not None
    both_close((torch.cat(found, 1), state), naive_ssd(*tensors))


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_packed_documents_are_separate(length: int) -> None:
    tensors, segments_BT = inputs(length), segments(length)
    both_close(ssd(*tensors, segments_BT=segments_BT), naive_ssd(*tensors, segments_BT=segments_BT))
    o, end = ssd(*tensors, segments_BT=segments_BT)
    for document in segments_BT[0].unique():
        alone, last = ssd(*cut(tensors, segments_BT[0] == document, slice(1)))
        close(o[:1, segments_BT[0] == document], alone)
    close(end[:1], last)


@pytest.mark.parametrize("written", [True, False])
def test_gradients_equal_those_of_naive(written: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    found = []
    for form in (ssd, naive_ssd):
        leaves = [tensor.requires_grad_() for tensor in inputs(130)]
        state = torch.randn(2, 6, KEY, VALUE, generator=generator.manual_seed(3), dtype=torch.float64)
        leaves.append(state.requires_grad_())
        q, k, v, log_decay, write, state = leaves
        o, end = form(q, k, v, log_decay, write if written else None, state)
        weight = torch.randn(o.shape, generator=generator, dtype=torch.float64)
        loss = (o * weight).sum() + end.square().sum()
        found.append(torch.autograd.grad(loss, [q, k, v, log_decay, state] + ([write] if written else [])))
    for left, right in zip(*found, strict=True):
        close(left, right, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 100])
def test_sums_are_fp32(length: int, dtype: torch.dtype) -> None:
    o, state = ssd(*inputs(length, dtype=dtype))
    assert o.dtype == state.dtype == torch.float32
    assert state.untyped_storage().nbytes() == state.nbytes


# The mixer

SHAPES = HeadShapes(width=12, query_heads=4, key_heads=2, key_width=8, value_width=6, scaling=8**-0.5)
VARIANTS: list[Variant] = list(FORMS)


def heads_of(length: int, batch: int = 2) -> HeadInputs:
    generator = torch.Generator().manual_seed(5)
    sizes = [(12,), (4, 8), (2, 8), (2, 6)]
    return HeadInputs(*(torch.randn(batch, length, *size, generator=generator, dtype=torch.float64) for size in sizes))


def build(**values: Any) -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(Mamba2Config(**values), SHAPES).double()


def moved(**values: Any) -> Mamba2:
    """Parameters off their start."""
    mixer = build(**values)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def loop(score: Callable[[Tensor, Tensor], Tensor], heads: HeadInputs, life_H: Tensor) -> Tensor:
    """y_i = sum_j 2^-((i - j) / life) log(2) / life score(q_i, k_j) v_j, pair by pair."""
    batch, length, count, _ = heads.q_BTHK.shape
    y = torch.zeros(batch, length, count, 6, dtype=torch.float64)
    for b in range(batch):
        for h in range(count):
            for i in range(length):
                for j in range(i + 1):
                    weight = 2 ** (-(i - j) / life_H[h]) * math.log(2) / life_H[h]
                    pair = score(heads.q_BTHK[b, i, h], heads.k_BTGK[b, j, h // 2])
                    y[b, i, h] += weight * pair * heads.v_BTGV[b, j, h // 2]
    return y


@pytest.mark.parametrize("values", [{}, {"maps": False}, {"conv": 2}, {"half_life": (2.0, 16.0)}])
def test_mimic_starts_as_plain_decayed_linear_attention_of_the_teachers_heads(values: dict[str, Any]) -> None:
    """In fp64 the only difference is that starts are stored in fp32."""
    heads, (first, last) = heads_of(12), values.get("half_life", (4.0, 256.0))
    life_H = first * (last / first) ** (torch.arange(4, dtype=torch.float64) / 3)
    mixer = build(**values)
    y, _ = mixer(heads)
    close(y, loop(lambda q, k: 8**-0.5 * (q @ k), heads, life_H), 1e-6)
    log_gate = mixer.readings(heads).log_gate
    assert log_gate is not None
    close(log_gate, (-math.log(2) / life_H).expand(2, 12, 4), 1e-6)


def test_cosine_scores_start_as_softmax_to_first_order() -> None:
    heads, life_H = heads_of(12), torch.tensor([4.0, 16.0, 64.0, 256.0], dtype=torch.float64)
    y, _ = build(scores="cosine")(heads)
    close(y, loop(lambda q, k: 0.5 + F.cosine_similarity(q, k, dim=0), heads, life_H), 1e-4)


def test_one_head_has_the_middle_half_life() -> None:
    mixer = Mamba2(Mamba2Config(half_life=(4.0, 64.0)), replace(SHAPES, query_heads=1, key_heads=1))
    heads = HeadInputs(torch.zeros(1, 1, 12), *(torch.zeros(1, 1, 1, width) for width in (8, 8, 6)))
    log_gate = mixer.readings(heads).log_gate
    assert log_gate is not None
    close(log_gate, torch.full_like(log_gate, -math.log(2) / 16), 1e-6)


def convolved(x_TXC: Tensor, taps_XCS: Tensor, shift_XC: Tensor | None) -> Tensor:
    taps = taps_XCS.shape[-1]
    past = [torch.zeros_like(x_TXC[0])] * (taps - 1) + list(x_TXC)
    rows = [sum(taps_XCS[..., s] * past[t + taps - 1 - s] for s in range(taps)) for t in range(len(x_TXC))]
    return torch.stack(rows) + (0 if shift_XC is None else shift_XC)  # type: ignore[arg-type]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def root_mean_square(x: Tensor) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def published(mixer: Mamba2, variant: str, heads: HeadInputs) -> Tensor:
    """The authors' layers, each by its own formula, for one row."""
    x = heads.x_BTD[0]
    q = convolved(heads.q_BTHK[0], mixer.query_taps_HKS, mixer.query_shift_HK)
    k = convolved(heads.k_BTGK[0], mixer.key_taps_GKS, mixer.key_shift_GK)
    v = convolved(heads.v_BTGV[0], mixer.value_taps_GVS, mixer.value_shift_GV)
    z = (x @ mixer.gate.weight.T + (0 if mixer.gate.bias is None else mixer.gate.bias)).unflatten(-1, (4, 6))
    if variant == "mohawk":
        log_gamma, dt = (-(x @ mixer.dt.weight.T)).sigmoid().log(), None
        q = q * 8**-0.5
    else:
        assert mixer.log_rate_H is not None
        dt = (1 + (x @ mixer.dt.weight.T + mixer.dt.bias).exp()).log()
        log_gamma = -mixer.log_rate_H.exp() * dt
        q, k, v = silu(q), silu(k), silu(v)
    o, _ = naive_ssd(q[None], k[None], v[None], log_gamma[None], None if dt is None else dt[None])
    if variant == "mmmamba":
        return o / root_mean_square(o) * mixer.norm_weight * silu(z)
    assert mixer.skip_H is not None
    o = o + mixer.skip_H[:, None] * v.repeat_interleave(2, 1)
    if variant == "mohawk":
        return o * silu(z)
    return o * silu(z) / root_mean_square(o * silu(z)) * mixer.norm_weight


@pytest.mark.parametrize("variant", ["mmmamba", "mamba_in_llama", "mohawk"])
def test_published_variants_are_their_formulas(variant: str) -> None:
    heads, mixer = heads_of(70, batch=1), moved(variant=variant)
    close(mixer(heads)[0], published(mixer, variant, heads))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_start_is_that_of_mamba2(variant: Variant) -> None:
    if variant == "mamba_in_llama":
        mixer = build(variant=variant)
    else:
        mixer = build(variant=variant, start="random")
    bound = mixer.form.conv**-0.5
    for taps in (mixer.query_taps_HKS, mixer.key_taps_GKS, mixer.value_taps_GVS):
        assert 0.5 * bound < taps.abs().max() <= bound
    assert 0 < mixer.dt.weight.abs().max() <= 12**-0.5
    if mixer.log_rate_H is not None:
        dt_H, rate_H = F.softplus(mixer.dt.bias), mixer.log_rate_H.exp()
        assert DT_RANGE[0] * 0.999 <= dt_H.min() < dt_H.max() <= DT_RANGE[1] * 1.001
        assert 1 <= rate_H.min() < rate_H.max() <= 16
    if mixer.skip_H is not None:
        assert (mixer.skip_H == 1).all()
    assert mixer.gate.weight.any()


@pytest.mark.parametrize("variant", ["mmmamba", "mohawk"])
def test_published_starts_that_mimic(variant: str) -> None:
    mixer = build(variant=variant)
    for taps in (mixer.query_taps_HKS, mixer.key_taps_GKS, mixer.value_taps_GVS):
        assert (taps[..., 0] == 1).all()
        assert not taps[..., 1:].any()
    for shift in (mixer.query_shift_HK, mixer.key_shift_GK, mixer.value_shift_GV):
        assert shift is not None
        assert not shift.any()
    log_gate = mixer.readings(heads_of(3)).log_gate
    assert log_gate is not None
    if variant == "mohawk":
        close(log_gate, torch.full_like(log_gate, -math.log(2)))
        z = F.silu(mixer.gate(heads_of(3).x_BTD))
        close(z, torch.ones_like(z), 1e-6)
    else:  # A = e, dt between 0.001 and 0.1
        assert 0.762 <= log_gate.min().exp() < log_gate.max().exp() <= 0.9973


def test_the_convolution_on_values_reads_its_tail_when_decoding() -> None:
    mixer, heads = build(), heads_of(6)
    with torch.no_grad():
        mixer.value_taps_GVS.zero_()[..., 3] = 1.0  # the value of three tokens ago
    whole, _ = mixer(heads)
    state, found = None, []
    for t in range(6):
        one = HeadInputs(*(tensor[:, t : t + 1] for tensor in vars(heads).values() if isinstance(tensor, Tensor)))
        y, state = mixer(one, state)
        found.append(y)
    close(torch.cat(found, 1), whole)
    delayed = replace(heads, v_BTGV=F.pad(heads.v_BTGV, (0, 0, 0, 0, 3, 0))[:, :6])
    close(whole, build()(delayed)[0])
    assert not whole[:, :3].any()
    assert whole[:, 3:].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["whole", "packed", "padded"])
def test_row_weights_multiply_the_convolved_values(variant: Variant, form: str) -> None:
    mixer, heads = moved(variant=variant), heads_of(70)
    if form == "packed":
        heads = replace(heads, segments_BT=(torch.arange(70) >= 33).long().expand(2, -1))
    if form == "padded":
        heads = replace(heads, mask_BT=torch.arange(70).expand(2, -1) >= torch.tensor([[9], [0]]))
    rows = mixer.row_weights(heads)
    weight_BHTT = torch.cat([rows(start, min(start + 32, 70)) for start in range(0, 70, 32)], dim=2)
    assert not weight_BHTT.triu(1).any()
    ordered, timeline, put_back = begin(heads, None)
    v_BTHV = put_back(mixer._convolve(ordered, timeline, None)[0].v_BTGV).repeat_interleave(2, dim=2)
    y = mixer._finish(heads, torch.einsum("bhij,bjhv->bihv", weight_BHTT, v_BTHV))
    real = slice(None) if heads.mask_BT is None else heads.mask_BT
    close(y[real], mixer(heads)[0][real])


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_tokens_anywhere_change_nothing(variant: Variant) -> None:
    mixer, heads = moved(variant=variant), heads_of(100, batch=1)
    real = torch.rand(100, generator=torch.Generator().manual_seed(3)) > 0.4
    expected, end = mixer(
        HeadInputs(*(tensor[:, real] for tensor in vars(heads).values() if isinstance(tensor, Tensor)))
    )
    y, state = mixer(replace(heads, mask_BT=real[None]))
    close(y[:, real], expected)
    _, after = mixer(replace(heads, mask_BT=torch.zeros_like(real)[None]), state)
    for left, right, last in zip(state, end, after, strict=True):
        close(left, right)
        close(left, last)


def test_published_structures_have_what_is_published() -> None:
    found = {
        variant: {name.partition(".")[0] for name, _ in build(variant=variant).named_parameters()} for variant in FORMS
    }
    taps = {"query_taps_HKS", "key_taps_GKS", "value_taps_GVS", "dt", "gate"}
    shifts = {"query_shift_HK", "key_shift_GK", "value_shift_GV"}
    maps = {"query_weight_HKK", "query_bias_HK", "key_weight_GKK", "key_bias_GK"}
    assert found["mimic"] == taps | maps | {"log_rate_H", "skip_H"}
    assert found["mmmamba"] == taps | shifts | {"log_rate_H", "norm_weight"}
    assert found["mamba_in_llama"] == taps | shifts | {"log_rate_H", "skip_H", "norm_weight"}
    assert found["mohawk"] == taps | shifts | {"skip_H"}
    assert [build(variant=variant).form.conv for variant in VARIANTS] == [4, 2, 4, 4]


@pytest.mark.parametrize(
    "values, rule",
    [
        ({"conv": 0}, "greater than or equal to 2"),
        ({"conv": 33}, "less than or equal to 32"),
        ({"variant": "mamba"}, "mimic"),
        ({"variant": "mamba_in_llama", "start": "mimic"}, "has a random start only"),
        ({"variant": "mmmamba", "maps": True}, "maps needs variant: mimic"),
        ({"variant": "mohawk", "maps": False}, "maps needs variant: mimic"),
        ({"variant": "mohawk", "scores": "cosine"}, "scores needs variant: mimic"),
        ({"variant": "mmmamba", "half_life": (1.0, 2.0)}, "half_life needs variant: mimic"),
        ({"start": "random", "half_life": (1.0, 2.0)}, "start: random draws its own decays"),
        ({"half_life": (8.0, 4.0)}, "the smaller one first"),
        ({"half_life": (0.0, 4.0)}, "two positive numbers"),
        ({"half_life": (1.0, math.inf)}, "two positive numbers"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Mamba2Config(**values)


def test_linears_have_the_biases_of_their_variant() -> None:
    has = {variant: (build(variant=variant).dt.bias, build(variant=variant).gate.bias) for variant in VARIANTS}
    found = {variant: tuple(isinstance(bias, nn.Parameter) for bias in biases) for variant, biases in has.items()}
    assert found == {
        "mimic": (True, True),
        "mmmamba": (True, False),
        "mamba_in_llama": (True, False),
        "mohawk": (False, True),
    }
