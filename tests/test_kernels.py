"""Every form of every operation against plain loops or quadratic definitions.

The oracle of linear attention is `loop`, token by token; that of windows is `naive_window_sums`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize_kernels import LinearState, gated_linear_attention, linear_sums
from linearize_kernels.gated_linear_attention import MIN_LOG_GATE
from linearize_kernels.gated_linear_attention.chunk import chunk_linear_sums
from linearize_kernels.gated_linear_attention.naive import naive_linear_attention, naive_linear_sums
from tests.linear_sums import GATES, HEADS, LENGTHS, flat, gates, inputs, loop, segments, some_state
from tests.rulers import Largest, close


def test_naive_is_the_definition() -> None:
    q, k, v = inputs(6, "gqa3_shared_maps", batch=1)
    got = naive_linear_attention(q, k, v)
    for i in range(6):
        for h in range(6):
            weights = [float(q[0, i, h] @ k[0, j, h // 3]) for j in range(i + 1)]
            expected = sum(w * v[0, j, h // 3] for j, w in enumerate(weights)) / sum(weights)
            close(got[0, i, h], expected)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_equals_naive(heads: str, length: int) -> None:
    q, k, v = inputs(length, heads)
    y, state = gated_linear_attention(q, k, v)
    close(y, naive_linear_attention(q, k, v))
    groups = k.shape[2] // v.shape[2]
    close(state.s_BJFV, torch.einsum("btjf,btjv->bjfv", k, v.repeat_interleave(groups, 2)))
    close(state.z_BJF, k.sum(1))


@pytest.mark.parametrize("heads", HEADS)
def test_token_by_token_equals_naive(heads: str) -> None:
    q, k, v = inputs(65, heads)
    y, state = gated_linear_attention(q[:, :1], k[:, :1], v[:, :1])
    found = [y]
    for t in range(1, 65):
        y, state = gated_linear_attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], None, state)
        found.append(y)
    close(torch.cat(found, 1), naive_linear_attention(q, k, v))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_naive_sums_equal_the_loop(gate: str, packed: bool) -> None:
    q, k, v = inputs(70, "gqa3_shared_maps")
    log_gate, segments_BT = gates(70, 2, gate), segments(70) if packed else None
    for state in (None, some_state("gqa3_shared_maps")):
        found = naive_linear_sums(q, k, v, log_gate, segments_BT, state)
        for left, right in zip(flat(found), flat(loop(q, k, v, log_gate, state, segments_BT)), strict=True):
            close(left, right)


def check_sums(length: int, heads: str, gate: str, start: str) -> None:
    """Sums, end state and all gradients, against the loop in fp64."""
    tensors = list(inputs(length, heads))
    log_gate = gates(length, tensors[1].shape[2], gate)
    tensors += [] if log_gate is None else [log_gate]
    tensors += [*some_state(heads)] if "state" in start else []
    for tensor in tensors:
        tensor.requires_grad_()
    state = LinearState(*tensors[-2:]) if "state" in start else None
    arguments = (*tensors[:3], log_gate, state, segments(length) if "packed" in start else None)
    found, expected = flat(linear_sums(*arguments)), flat(loop(*arguments))
    for left, right in zip(found, expected, strict=True):
        close(left, right)
    upstream = [torch.randn_like(tensor) for tensor in found]
    found = torch.autograd.grad(found, tensors, upstream, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(expected, tensors, upstream, allow_unused=True, materialize_grads=True)
    for left, right in zip(found, expected, strict=True):
        close(left, right, 1e-10)


@pytest.mark.parametrize("start", ["nothing", "state", "packed", "packed state"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 130])
def test_sums_equal_the_loop(length: int, gate: str, start: str) -> None:
    check_sums(length, "gqa3", gate, start)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("gate", GATES)
def test_sums_of_shared_heads_equal_the_loop(heads: str, gate: str) -> None:
    check_sums(70, heads, gate, "packed state")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_many_chunks_are_scanned_in_blocks(gate: str, chunk: int) -> None:
    q, k, v = inputs(300, "gqa3")
    for start in (None, some_state("gqa3")):
        for segments_BT in (None, segments(300)):
            arguments = (q, k, v, gates(300, 6, gate, 0.1), start, segments_BT)
            for left, right in zip(flat(chunk_linear_sums(*arguments, chunk)), flat(loop(*arguments)), strict=True):
                close(left, right)


@pytest.mark.parametrize("strength", [1e-4, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("gate", ["head", "feature"])
def test_fp32_is_accurate_over_a_thousand_tokens(gate: str, strength: float) -> None:
    """Outputs, state and gradients, relative to their largest entry."""
    tensors = [*inputs(1000, "gqa4", batch=1), *(tensor[:1] for tensor in some_state("gqa4"))]
    tensors.append(gates(1000, 4, gate, strength, batch=1))

    def run(form: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        out = flat(form(*given[:3], given[5], LinearState(*given[3:5]), None))
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(tensor.shape, generator=generator).to(dtype) for tensor in out]
        return [*out, *torch.autograd.grad(out, given, upstream)]

    def cut_loop(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *more: Any) -> Any:
        return loop(q, k, v, log_gate.clamp_min(MIN_LOG_GATE) if gate == "feature" else log_gate, *more)

    for found, exact in zip(run(linear_sums, torch.float32), run(cut_loop, torch.float64), strict=True):
        assert torch.isfinite(found).all()
        assert (found - exact).abs().max() <= 3e-5 * exact.abs().max()


@pytest.mark.parametrize("value", [0.0, -5.0, -30.0, -1000.0])
@pytest.mark.parametrize("gate", ["head", "feature"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_whole_chunks_of_the_strongest_gates(gate: str, value: float, scale: float) -> None:
    """Exponents of 32 * 5 would leave fp32: they are counted from the middle. Row by row, no matter how small."""
    q, k, v = (tensor * scale for tensor in inputs(130, "equal"))
    log_gate = torch.full_like(gates(130, 4, gate), value)
    given = [tensor.float().requires_grad_() for tensor in (q, k, v, log_gate)]
    num, den, _ = linear_sums(*given)
    cut = log_gate.clamp_min(MIN_LOG_GATE) if gate == "feature" else log_gate
    exact_num, exact_den, _ = loop(q, k, v, cut, None, None)
    torch.testing.assert_close(den.double(), exact_den, rtol=3e-5, atol=0)
    torch.testing.assert_close(num.double(), exact_num, rtol=3e-5, atol=3e-5 * float(exact_num.abs().max()))
    for gradient in torch.autograd.grad((num / den.unsqueeze(-1)).sum(), given):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("gate", GATES)
def test_rows_that_see_nothing_are_zero_and_have_finite_gradients(gate: str) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(70, dtype=torch.float32))
    log_gate = gates(70, 6, gate)
    real = torch.ones(2, 70, 1, 1)
    real[0], real[1, :40] = 0, 0  # row 0 is empty, row 1 begins late
    y, _ = gated_linear_attention(q, k * real, v, log_gate=log_gate)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert torch.equal(y[1, :40], torch.zeros_like(y[1, :40]))
    for gradient in torch.autograd.grad(y, [q, k, v], 1e6 * torch.randn_like(y)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_documents_are_separate(heads: str, length: int) -> None:
    q, k, v = inputs(length, heads)
    segments_BT = segments(length)
    y, state = gated_linear_attention(q, k, v, segments_BT=segments_BT)
    close(y, naive_linear_attention(q, k, v, segments_BT))
    for row in range(2):
        for document in segments_BT[row].unique():
            here = segments_BT[row] == document
            alone, end = gated_linear_attention(q[row : row + 1, here], k[row : row + 1, here], v[row : row + 1, here])
            close(y[row : row + 1, here], alone)
        close(state.s_BJFV[row], end.s_BJFV[0])  # what goes on is the last document's
        close(state.z_BJF[row], end.z_BJF[0])


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 199), max_size=5), st.sampled_from(sorted(HEADS)), st.sampled_from(GATES), st.booleans())
def test_split_anywhere_equals_whole(cuts: set[int], heads: str, gate: str, packed: bool) -> None:
    q, k, v = inputs(200, heads)
    log_gate, segments_BT = gates(200, k.shape[2], gate), segments(200) if packed else None
    whole, end = gated_linear_attention(q, k, v, log_gate, None, segments_BT)
    edges = [0, *sorted(cuts), 200]
    state, found = None, []
    for start, stop in zip(edges, edges[1:], strict=False):
        now = slice(start, stop)
        if packed and state is not None:  # a state belongs to the first token's document: theirs may have ended
            goes_on = (segments(200)[:, start] == segments(200)[:, start - 1])[:, None, None]
            state = LinearState(state.s_BJFV * goes_on.unsqueeze(-1), state.z_BJF * goes_on)
        parts = (None if segments_BT is None else segments_BT[:, now], None if log_gate is None else log_gate[:, now])
        y, state = gated_linear_attention(q[:, now], k[:, now], v[:, now], parts[1], state, parts[0])
        found.append(y)
    assert state is not None
    close(torch.cat(found, 1), whole)
    close(state.s_BJFV, end.s_BJFV)
    close(state.z_BJF, end.z_BJF)


@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_fp32_and_output_has_the_dtype_of_the_values(length: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(length, dtype=dtype)
    y, state = gated_linear_attention(q, k, v)
    again, state_after = gated_linear_attention(q[:, :1], k[:, :1], v[:, :1], None, state)
    assert y.dtype == again.dtype == dtype
    assert {tensor.dtype for tensor in (*state, *state_after)} == {torch.float32}


@pytest.mark.parametrize("length", [1, 65, 1000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_state_keeps_nothing_else_in_memory(length: int, packed: bool, gate: str) -> None:
    q, k, v = inputs(length, dtype=torch.float32)
    segments_BT = segments(length) if packed else None
    _, state = gated_linear_attention(q, k, v, gates(length, 6, gate), None, segments_BT)
    for tensor in state:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("heads", [(2, 2, 1), (2, 1, 1)])
@pytest.mark.parametrize("start", ["nothing", "state", "packed"])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(heads: tuple[int, int, int], start: str, gate: str) -> None:
    torch.manual_seed(0)
    query_heads, key_heads, value_heads = heads
    make: dict[str, Any] = {"dtype": torch.float64}
    q, k = torch.rand(1, 5, query_heads, 2, **make) + 0.1, torch.rand(1, 5, key_heads, 2, **make) + 0.1
    v, s, z = torch.randn(1, 5, value_heads, 2, **make), torch.randn(1, key_heads, 2, 2, **make), None
    z = torch.rand(1, key_heads, 2, **make) + 0.1
    log_gate = gates(5, key_heads, gate, features=2, batch=1)
    segments_BT = torch.tensor([[0, 0, 0, 1, 1]]) if start == "packed" else None
    gated = [] if log_gate is None else [log_gate]
    tensors = [q, k, v, *gated, *([s, z] if start == "state" else [])]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        state = LinearState(*given[-2:]) if start == "state" else None
        num, den, end = chunk_linear_sums(*given[:3], given[3] if gated else None, state, segments_BT, chunk=2)
        return num, den, *end

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        given = (*(tensor[:, :1] for tensor in given[:-2]), *given[-2:])
        num, den, end = linear_sums(*given[:3], given[3] if gated else None, LinearState(*given[-2:]))
        return num, den, *end

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])
    if start == "state":
        assert torch.autograd.gradcheck(step, tensors)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_naive(heads: str, packed: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(130, heads)]
    segments_BT = segments(130) if packed else None
    y, _ = gated_linear_attention(*tensors, segments_BT=segments_BT)
    expected = naive_linear_attention(*tensors, segments_BT)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, tensors, upstream)
    for left, right in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        close(left, right, 1e-10)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_eager_torch(heads: str, dtype: torch.dtype) -> None:
    def run(form: Any, to: torch.dtype) -> list[Tensor]:
        tensors = [tensor.to(dtype).to(to).requires_grad_() for tensor in inputs(200, heads)]
        y = form(*tensors)
        y = y if isinstance(y, Tensor) else y[0]
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, tensors, upstream.to(to))]

    exact = run(naive_linear_attention, torch.float64)
    eager, ours = run(naive_linear_attention, dtype), run(gated_linear_attention, dtype)
    for wanted, reference, found in zip(exact, eager, ours, strict=True):
        assert torch.isfinite(found).all()
        error, allowed = ((tensor.double() - wanted).abs().max() for tensor in (found, reference))
        assert error <= 2 * allowed + 1e-5


@pytest.mark.parametrize("length", [65, 130])
def test_keys_of_zero_do_not_exist(length: int) -> None:
    q, k, v = inputs(length)
    real = torch.rand(length, generator=torch.Generator().manual_seed(3)) > 0.3
    real[0], real[-1] = True, False
    y, state = gated_linear_attention(q, k * real[:, None, None], v)
    expected, end = gated_linear_attention(q[:, real], k[:, real], v[:, real])
    close(y[:, real], expected)
    close(state.s_BJFV, end.s_BJFV)
    close(state.z_BJF, end.z_BJF)
    nothing, _ = gated_linear_attention(q, torch.zeros_like(k), v)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_no_quadratic_tensor(packed: bool, gate: str) -> None:
    length = 4096
    q, k, v = (tensor.requires_grad_() for tensor in inputs(length, "gqa4", torch.float32, batch=1))
    log_gate = gates(length, 4, gate, batch=1)
    with Largest() as largest:
        segments_BT = segments(length)[:1] if packed else None
        y, _ = gated_linear_attention(q, k, v, log_gate, None, segments_BT)
        y.sum().backward()
    assert 0 < largest.elements < length * length / 4
    with Largest() as largest:
        naive_linear_attention(q, k, v)
    assert largest.elements >= length * length  # the ruler itself works


def test_decays_per_feature_take_no_chunk_by_feature_tensor() -> None:
    """Training shapes: the largest tensor is that of the running sums, F * V / 32 a token, not 32 * F."""
    q, k = (torch.rand(1, 1024, 2, 128).requires_grad_() for _ in range(2))
    v, log_gate = torch.rand(1, 1024, 2, 64), -torch.rand(1, 1024, 2, 128)
    with Largest() as largest:
        num, den, _ = linear_sums(q, k, v, log_gate.requires_grad_())
        torch.autograd.backward([num, den], [torch.ones_like(num), torch.ones_like(den)])
    assert largest.elements <= 2 * q.numel()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_linear_sums_are_one_graph(gate: str, packed: bool) -> None:
    arguments = (*inputs(130), gates(130, 6, gate), None if packed else some_state("gqa3"))
    arguments = (*arguments, segments(130) if packed else None)
    compiled = torch.compile(linear_sums, backend="eager", fullgraph=True)
    for left, right in zip(flat(compiled(*arguments)), flat(linear_sums(*arguments)), strict=True):
        close(left, right)
