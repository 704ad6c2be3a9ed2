"""The chunkwise and the recurrent form against the quadratic definition, and that against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize_kernels import LinearState, linear_attention
from linearize_kernels.linear_attention.chunk import chunk_linear_attention
from linearize_kernels.linear_attention.naive import naive_linear_attention

HEADS = {  # H, J, G
    "equal": (4, 4, 4),
    "gqa3": (6, 6, 2),
    "gqa4": (4, 4, 1),
    "gqa3_shared_maps": (6, 2, 2),
    "gqa4_shared_maps": (4, 1, 1),
}
LENGTHS = [1, 63, 64, 65, 200]


def inputs(
    length: int, heads: str = "gqa3", dtype: torch.dtype = torch.float64, batch: int = 2, features: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    query_heads, key_heads, value_heads = HEADS[heads]
    q = torch.rand(batch, length, query_heads, features, generator=generator, dtype=torch.float64)
    k = torch.rand(batch, length, key_heads, features, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, length, value_heads, 7, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def segments(length: int) -> Tensor:
    """Row 0: documents of 1, 62, 2 and more tokens (ends at, before and behind chunk ends). Row 1: one document."""
    first = torch.bucketize(torch.arange(length), torch.tensor([1, 63, 65, 128]), right=True)
    return torch.stack([first, torch.zeros_like(first)])


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


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
    y, state = linear_attention(q, k, v)
    close(y, naive_linear_attention(q, k, v))
    groups = k.shape[2] // v.shape[2]
    close(state.s_BJFV, torch.einsum("btjf,btjv->bjfv", k, v.repeat_interleave(groups, 2)))
    close(state.z_BJF, k.sum(1))


@pytest.mark.parametrize("heads", HEADS)
def test_token_by_token_equals_naive(heads: str) -> None:
    q, k, v = inputs(65, heads)
    y, state = linear_attention(q[:, :1], k[:, :1], v[:, :1])
    found = [y]
    for t in range(1, 65):
        y, state = linear_attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
        found.append(y)
    close(torch.cat(found, 1), naive_linear_attention(q, k, v))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_documents_are_separate(heads: str, length: int) -> None:
    q, k, v = inputs(length, heads)
    segments_BT = segments(length)
    y, state = linear_attention(q, k, v, segments_BT=segments_BT)
    close(y, naive_linear_attention(q, k, v, segments_BT))
    for row in range(2):
        for document in segments_BT[row].unique():
            here = segments_BT[row] == document
            alone, end = linear_attention(q[row : row + 1, here], k[row : row + 1, here], v[row : row + 1, here])
            close(y[row : row + 1, here], alone)
        close(state.s_BJFV[row], end.s_BJFV[0])  # what goes on is the last document's
        close(state.z_BJF[row], end.z_BJF[0])


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 199), max_size=5), st.sampled_from(sorted(HEADS)))
def test_split_anywhere_equals_whole(cuts: set[int], heads: str) -> None:
    q, k, v = inputs(200, heads)
    whole, end = linear_attention(q, k, v)
    edges = [0, *sorted(cuts), 200]
    state, found = None, []
    for start, stop in zip(edges, edges[1:], strict=False):
        y, state = linear_attention(q[:, start:stop], k[:, start:stop], v[:, start:stop], state)
        found.append(y)
    assert state is not None
    close(torch.cat(found, 1), whole)
    close(state.s_BJFV, end.s_BJFV)
    close(state.z_BJF, end.z_BJF)


@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_fp32_and_output_has_the_dtype_of_the_values(length: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(length, dtype=dtype)
    y, state = linear_attention(q, k, v)
    again, state_after = linear_attention(q[:, :1], k[:, :1], v[:, :1], state)
    assert y.dtype == again.dtype == dtype
    assert {tensor.dtype for tensor in (*state, *state_after)} == {torch.float32}


@pytest.mark.parametrize("length", [1, 65, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_state_keeps_nothing_else_in_memory(length: int, packed: bool) -> None:
    q, k, v = inputs(length, dtype=torch.float32)
    _, state = linear_attention(q, k, v, segments_BT=segments(length) if packed else None)
    for tensor in state:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("heads", [(2, 2, 1), (2, 1, 1)])
@pytest.mark.parametrize("start", ["nothing", "state", "packed"])
def test_gradcheck(heads: tuple[int, int, int], start: str) -> None:
    torch.manual_seed(0)
    query_heads, key_heads, value_heads = heads
    make: dict[str, Any] = {"dtype": torch.float64}
    q, k = torch.rand(1, 5, query_heads, 2, **make) + 0.1, torch.rand(1, 5, key_heads, 2, **make) + 0.1
    v, s, z = torch.randn(1, 5, value_heads, 2, **make), torch.randn(1, key_heads, 2, 2, **make), None
    z = torch.rand(1, key_heads, 2, **make) + 0.1
    segments_BT = torch.tensor([[0, 0, 0, 1, 1]]) if start == "packed" else None
    tensors = [q, k, v, *([s, z] if start == "state" else [])]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        state = LinearState(*given[3:]) if start == "state" else None
        y, end = chunk_linear_attention(*given[:3], state, segments_BT, chunk=2)
        return y, *end

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        y, end = linear_attention(*(tensor[:, :1] for tensor in given[:3]), LinearState(*given[3:]))
        return y, *end

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])
    if start == "state":
        assert torch.autograd.gradcheck(step, tensors)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_naive(heads: str, packed: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(130, heads)]
    segments_BT = segments(130) if packed else None
    y, _ = linear_attention(*tensors, segments_BT=segments_BT)
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
    eager, ours = run(naive_linear_attention, dtype), run(linear_attention, dtype)
    for wanted, reference, found in zip(exact, eager, ours, strict=True):
        assert torch.isfinite(found).all()
        error, allowed = ((tensor.double() - wanted).abs().max() for tensor in (found, reference))
        assert error <= 2 * allowed + 1e-5


@pytest.mark.parametrize("length", [65, 130])
def test_keys_of_zero_do_not_exist(length: int) -> None:
    q, k, v = inputs(length)
    real = torch.rand(length, generator=torch.Generator().manual_seed(3)) > 0.3
    real[0], real[-1] = True, False
    y, state = linear_attention(q, k * real[:, None, None], v)
    expected, end = linear_attention(q[:, real], k[:, real], v[:, real])
    close(y[:, real], expected)
    close(state.s_BJFV, end.s_BJFV)
    close(state.z_BJF, end.z_BJF)
    nothing, _ = linear_attention(q, torch.zeros_like(k), v)
    assert torch.equal(nothing, torch.zeros_like(nothing))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("packed", [False, True])
def test_no_quadratic_tensor(packed: bool) -> None:
    length = 4096
    q, k, v = (tensor.requires_grad_() for tensor in inputs(length, "gqa4", torch.float32, batch=1))
    with Largest() as largest:
        y, _ = linear_attention(q, k, v, segments_BT=segments(length)[:1] if packed else None)
        y.sum().backward()
    assert 0 < largest.elements < length * length / 4
    with Largest() as largest:
        naive_linear_attention(q, k, v)
    assert largest.elements >= length * length  # the ruler itself works
