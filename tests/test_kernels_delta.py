"""The gated delta rule: chunkwise and recurrent form against the token loop, and that loop against plain sums.

And what the contract of test_mixers.py cannot know of the mixers gdn, t2r and taylor: their formulas and starts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from linearize.errors import RecipeError
from linearize.mixers.base import HeadInputs, HeadShapes
from linearize.mixers.feature_maps import MIN_FEATURE
from linearize.mixers.gdn import EPSILON, Gdn, GdnConfig
from linearize.mixers.t2r import T2r, T2rConfig
from linearize.mixers.taylor import MAX_LENGTH, Taylor, TaylorConfig, taylor_features
from linearize_kernels.gated_delta import gated_delta_rule
from linearize_kernels.gated_delta.chunk import chunk_gated_delta_rule
from linearize_kernels.gated_delta.naive import naive_gated_delta_rule
from tests.rulers import Largest, both_close, close, cut, segments

HEADS = {"equal": (3, 3), "gqa3": (6, 2), "gqa4": (4, 1)}  # H, J
LENGTHS = [1, 63, 64, 65, 130, 1000]
KEY, VALUE = 8, 5
DECAYS = {"none": 0.0, "strong": -20.0, "everything": -torch.inf}
BETAS = {"nothing": 0.0, "replaces": 1.0, "reflects": 2 - 1e-6}


def inputs(length: int, heads: str = "gqa3", dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    """q, k, v, log_decay, beta. Keys of length 1; half-lives from 4 tokens on."""
    generator = torch.Generator().manual_seed(length)
    query_heads, state_heads = HEADS[heads]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(batch, length, *sizes, generator=generator, dtype=torch.float64)

    k = torch.nn.functional.normalize(draw(state_heads, KEY) + 0.5, dim=-1)
    log_decay = -0.17 * draw(state_heads).sigmoid() ** 4
    tensors = [draw(query_heads, KEY), k, draw(state_heads, VALUE), log_decay, draw(state_heads).sigmoid()]
    return [tensor.to(dtype) for tensor in tensors]


def test_naive_is_the_definition() -> None:
    """Head by head with the transition matrix alpha (I - beta k k^T), as the paper writes it."""
    q, k, v, log_decay, beta = inputs(6, "gqa3", batch=1)
    o, end = naive_gated_delta_rule(q, k, v, log_decay, beta)
    for h in range(6):
        j, s_VK = h // 3, torch.zeros(VALUE, KEY, dtype=torch.float64)
        for t in range(6):
            key = k[0, t, j]
            keep = torch.eye(KEY, dtype=torch.float64) - beta[0, t, j] * torch.outer(key, key)
            s_VK = log_decay[0, t, j].exp() * s_VK @ keep + beta[0, t, j] * torch.outer(v[0, t, j], key)
            close(o[0, t, h], s_VK @ q[0, t, h])
        close(end[0, j], s_VK.T)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_equals_naive(heads: str, length: int) -> None:
    tensors = inputs(length, heads)
    expected = naive_gated_delta_rule(*tensors)
    both_close(gated_delta_rule(*tensors), expected)
    both_close(chunk_gated_delta_rule(*tensors, chunk=16), expected)
    both_close(chunk_gated_delta_rule(*tensors), expected)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("same_key", [False, True])
def test_extreme_decays_and_writing_strengths(decay: str, beta: str, same_key: bool) -> None:
    """One key for all tokens makes the triangular system as badly conditioned as it gets."""
    q, k, v, log_decay, _ = inputs(200)
    k = k[:, :1].expand_as(k) if same_key else k
    log_decay = log_decay.clone()
    log_decay[:, ::7] = DECAYS[decay]
    tensors = [q, k, v, log_decay, torch.full_like(log_decay, BETAS[beta])]
    expected = naive_gated_delta_rule(*tensors)
    both_close(gated_delta_rule(*tensors), expected)
    single = [tensor.float() for tensor in tensors]
    o, end = gated_delta_rule(*single)
    again, reference = naive_gated_delta_rule(*single)  # the loop's own error in fp32
    for found, eager, exact in [(o, again, expected[0]), (end, reference, expected[1])]:
        assert (found.double() - exact).abs().max() <= 4 * (eager.double() - exact).abs().max() + 2e-5


def test_constant_extremes() -> None:
    for log_decay in (0.0, -20.0):
        for beta in BETAS.values():
            q, k, v, gate, strength = inputs(130)
            tensors = [q, k, v, torch.full_like(gate, log_decay), torch.full_like(strength, beta)]
            both_close(gated_delta_rule(*tensors), naive_gated_delta_rule(*tensors))


@pytest.mark.parametrize("heads", HEADS)
def test_token_by_token_equals_naive(heads: str) -> None:
    tensors, state, found = inputs(65, heads), None, []
    for t in range(65):
        o, state = gated_delta_rule(*cut(tensors, slice(t, t + 1)), state)
        found.append(o)
    assert state is not None
    both_close((torch.cat(found, 1), state), naive_gated_delta_rule(*tensors))


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 199), max_size=5), st.sampled_from(sorted(HEADS)))
def test_split_anywhere_equals_whole(cuts: set[int], heads: str) -> None:
    tensors, state, found = inputs(200, heads), None, []
    edges = [0, *sorted(cuts), 200]
    for start, stop in zip(edges, edges[1:], strict=False):
        o, state = gated_delta_rule(*cut(tensors, slice(start, stop)), state)
        found.append(o)
    assert state is not None
    both_close((torch.cat(found, 1), state), gated_delta_rule(*tensors))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_documents_are_separate(heads: str, length: int) -> None:
    tensors, segments_BT = inputs(length, heads), segments(length)
    o, state = gated_delta_rule(*tensors, segments_BT=segments_BT)
    both_close((o, state), naive_gated_delta_rule(*tensors, segments_BT=segments_BT))
    for row in range(2):
        rows = slice(row, row + 1)
        for document in segments_BT[row].unique():
            here = segments_BT[row] == document
            alone, end = naive_gated_delta_rule(*cut(tensors, here, rows))
            close(o[rows, here], alone)
        close(state[rows], end)  # what goes on is the last document's


@pytest.mark.parametrize("length", [65, 130])
def test_tokens_that_do_not_exist_change_nothing(length: int) -> None:
    q, k, v, log_decay, beta = inputs(length)
    real = torch.rand(length, generator=torch.Generator().manual_seed(3)) > 0.3
    real[0], real[-1] = True, False
    real_T1 = real[:, None]
    o, state = gated_delta_rule(q, k * real_T1[:, None], v, log_decay * real_T1, beta * real_T1)
    both_close((o[:, real], state), naive_gated_delta_rule(*cut([q, k, v, log_decay, beta], real)))


@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_fp32_and_output_has_the_dtype_of_the_values(length: int, dtype: torch.dtype) -> None:
    tensors = inputs(length, dtype=dtype)
    o, state = gated_delta_rule(*tensors)
    again, after = gated_delta_rule(*cut(tensors, slice(1)), state)
    assert o.dtype == again.dtype == dtype
    assert state.dtype == after.dtype == torch.float32


@pytest.mark.parametrize("length", [1, 65, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_state_keeps_nothing_else_in_memory(length: int, packed: bool) -> None:
    _, state = gated_delta_rule(*inputs(length), segments_BT=segments(length) if packed else None)
    assert state.untyped_storage().nbytes() == state.nbytes
    if not packed:
        before = state.clone()
        _, after = gated_delta_rule(*inputs(length), state)
        assert after.untyped_storage().nbytes() == after.nbytes
        assert torch.equal(state, before)  # the caller's state is not written to


@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
@pytest.mark.parametrize("start", ["nothing", "state", "packed"])
def test_gradcheck(heads: tuple[int, int], start: str) -> None:
    torch.manual_seed(0)
    query_heads, state_heads = heads
    make: dict[str, Any] = {"dtype": torch.float64}
    q, k = torch.randn(1, 5, query_heads, 2, **make), torch.randn(1, 5, state_heads, 2, **make)
    v, s = torch.randn(1, 5, state_heads, 2, **make), torch.randn(1, state_heads, 2, 2, **make)
    log_decay, beta = -torch.rand(1, 5, state_heads, **make), torch.rand(1, 5, state_heads, **make)
    segments_BT = torch.tensor([[0, 0, 1, 2, 2]]) if start == "packed" else None
    tensors = [q, k, v, log_decay, beta, *([s] if start == "state" else [])]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return chunk_gated_delta_rule(*given[:5], given[5] if start == "state" else None, segments_BT, chunk=2)

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        return gated_delta_rule(*(tensor[:, :1] for tensor in given[:5]), given[5])

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])
    if start == "state":
        assert torch.autograd.gradcheck(step, tensors)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("form", ["start", "state", "packed"])
def test_gradients_equal_those_of_naive(heads: str, form: str) -> None:
    tensors = inputs(130, heads)
    if form == "state":
        tensors.append(torch.randn(2, HEADS[heads][1], KEY, VALUE, dtype=torch.float64))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    segments_BT = segments(130) if form == "packed" else None
    found, expected = (rule(*tensors, segments_BT=segments_BT) for rule in (gated_delta_rule, naive_gated_delta_rule))
    upstream = [torch.randn_like(tensor) for tensor in found]
    gradients = torch.autograd.grad(found, tensors, upstream)
    for left, right in zip(gradients, torch.autograd.grad(expected, tensors, upstream), strict=True):
        close(left, right)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_stay_finite_at_the_extremes(decay: str) -> None:
    q, k, v, log_decay, beta = inputs(130, dtype=torch.float32)
    log_decay[:, ::5], beta[:, ::3] = DECAYS[decay], 1.0
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, log_decay, beta)]
    o, state = gated_delta_rule(*tensors)
    for gradient in torch.autograd.grad(o.square().sum() + state.sum(), tensors):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_eager_torch(heads: str, dtype: torch.dtype) -> None:
    def run(form: Any, to: torch.dtype) -> list[Tensor]:
        tensors = [tensor.to(dtype).to(to).requires_grad_() for tensor in inputs(200, heads)]
        o, _ = form(*tensors)
        upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return [o.detach(), *torch.autograd.grad(o, tensors, upstream.to(to))]

    exact = run(naive_gated_delta_rule, torch.float64)
    eager, ours = run(naive_gated_delta_rule, dtype), run(gated_delta_rule, dtype)
    for wanted, reference, found in zip(exact, eager, ours, strict=True):
        assert torch.isfinite(found).all()
        error, allowed = ((tensor.double() - wanted).abs().max() for tensor in (found, reference))
        assert error <= 2 * allowed + 1e-5 + 1e-6 * wanted.abs().max()  # gradients are as large as 60


@pytest.mark.parametrize("packed", [False, True])
def test_no_quadratic_tensor(packed: bool) -> None:
    length = 4096
    tensors = [tensor.requires_grad_() for tensor in inputs(length, "gqa4", torch.float32, batch=1)]
    with Largest() as largest:
        o, _ = gated_delta_rule(*tensors, segments_BT=segments(length)[:1] if packed else None)
        o.sum().backward()
    assert 0 < largest.elements < length * length / 4


# The mixers


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
