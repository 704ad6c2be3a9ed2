"""Sliding-window sums and causal convolutions against their loops: values, gradients, packed and padded rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize_kernels import Sinks, causal_conv
from linearize_kernels.windowed_linear_attention.chunk import WindowSums, window_sums
from linearize_kernels.windowed_linear_attention.naive import naive_window_sums
from tests.rulers import Largest, close

WIDTH = {  # H, G
    "equal": (2, 2),
    "gqa3": (6, 2),
    "gqa4": (4, 1),
}
PLACES = {  # positions of the first row's queries; the second row's are 0, 1, 2, ...
    "whole": lambda length: torch.arange(length),
    "padded": lambda length: (torch.arange(length) - 7).clamp_min(-1),
    "packed": lambda length: torch.cat([torch.arange(5), torch.arange(length)])[:length],
    "continued": lambda length: torch.arange(length) + 50,
    "nothing": lambda length: torch.full((length,), -1),
}


def window_inputs(length: int, heads: str, place: str, window: int, sinks: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and, if there are any, the sinks' keys and values (one set a query if packed); positions."""
    query_heads, groups = WIDTH[heads]
    generator = torch.Generator().manual_seed(length + window)
    each = length if place == "packed" else 1
    shapes = [(2, length, query_heads, 5), *[(2, window - 1 + length, groups, width) for width in (5, 3)]]
    shapes += [(2, each, sinks, groups, width) for width in (5, 3)] if sinks else []
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return tensors, torch.stack([PLACES[place](length), torch.arange(length)])


def check_window(length: int, heads: str, place: str, window: int, sinks: int) -> None:
    tensors, position_BT = window_inputs(length, heads, place, window, sinks)
    seen = Sinks(*tensors[3:]) if sinks else None
    found = window_sums(*tensors[:3], position_BT, window, seen)
    expected = naive_window_sums(*tensors[:3], position_BT, window, seen)
    for left, right in zip(found, expected, strict=True):
        close(left, right)
    upstream = [torch.randn_like(tensor) for tensor in found]
    for left, right in zip(
        torch.autograd.grad(found, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        close(left, right, 1e-10)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [1, 3, 64, 100])
def test_window_equals_naive(window: int, sinks: int, place: str) -> None:
    check_window(70, "equal", place, window, sinks)


@pytest.mark.parametrize("heads", WIDTH)
@pytest.mark.parametrize("length", [1, 9, 64, 65])
@pytest.mark.parametrize("place", ["packed", "continued"])
def test_window_of_shared_heads_equals_naive(heads: str, length: int, place: str) -> None:
    check_window(length, heads, place, window=3, sinks=2)


def test_window_is_softmax_attention() -> None:
    tensors, position_BT = window_inputs(70, "gqa3", "whole", 9, 0)
    q, k, v = tensors
    num, den, _ = window_sums(q, k, v, position_BT, 9)
    k, v = (tensor[:, 8:].repeat_interleave(3, 2).transpose(1, 2) for tensor in (k, v))
    back = torch.arange(70)[:, None] - torch.arange(70)
    mask = (back >= 0) & (back < 9)
    y = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=1.0)
    close(num / den.unsqueeze(-1), y.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_window_is_never_nan(dtype: torch.dtype, sinks: int, scale: float) -> None:
    """Rows that see nothing, and scores whose exp would leave fp32."""
    tensors, position_BT = window_inputs(70, "gqa3", "padded", 8, sinks)
    tensors = [(tensor.detach() * scale).to(dtype).requires_grad_() for tensor in tensors]
    position_BT[1] = -1
    found = window_sums(*tensors[:3], position_BT, 8, Sinks(*tensors[3:]) if sinks else None)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    gradients = torch.autograd.grad(found, tensors, [torch.ones_like(tensor) for tensor in found])
    assert all(torch.isfinite(tensor).all() for tensor in (*found, *gradients))
    for tensor in found:
        assert torch.equal(tensor[1], torch.zeros_like(tensor[1]))
        assert torch.equal(tensor[0, :6], torch.zeros_like(tensor[0, :6]))


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 99), max_size=5), st.sampled_from([1, 3, 64]), st.sampled_from([0, 4]))
def test_window_split_anywhere_equals_whole(cuts: set[int], window: int, sinks: int) -> None:
    tensors, position_BT = window_inputs(100, "gqa3", "whole", window, sinks)
    q, k, v = tensors[:3]
    seen = Sinks(*tensors[3:]) if sinks else None
    edges = [0, *sorted(cuts), 100]
    found = []
    for start, stop in zip(edges, edges[1:], strict=False):
        keys = slice(start, stop + window - 1)
        found.append(window_sums(q[:, start:stop], k[:, keys], v[:, keys], position_BT[:, start:stop], window, seen))
    whole = window_sums(q, k, v, position_BT, window, seen)
    for left, right in zip(whole, WindowSums(*(torch.cat(x, 1) for x in zip(*found, strict=True))), strict=True):
        close(left, right)


@pytest.mark.parametrize("place", ["whole", "packed"])
def test_window_takes_linear_memory_and_one_graph(place: str) -> None:
    tensors, position_BT = window_inputs(4096, "gqa4", place, 64, 4)
    compiled = torch.compile(window_sums, backend="eager", fullgraph=True)
    with Largest() as largest:
        found = window_sums(*tensors[:3], position_BT, 64, Sinks(*tensors[3:]))
    assert largest.elements <= 2 * 4 * 4096 * 128  # B, H, T, and the keys of one chunk
    for left, right in zip(found, compiled(*tensors[:3], position_BT, 64, Sinks(*tensors[3:])), strict=True):
        close(left, right)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", WIDTH)
def test_convolution_equals_loop(heads: str, taps: int, place: str) -> None:
    """The tokens before a document are NaN: they reach neither outputs nor the filters' gradient."""
    query_heads, groups = WIDTH[heads]
    generator = torch.Generator().manual_seed(taps)
    x = torch.randn(2, taps - 1 + 12, groups, 3, generator=generator, dtype=torch.float64)
    filters = torch.randn(query_heads, 3, taps, generator=generator, dtype=torch.float64).requires_grad_()
    position_BT = torch.stack([PLACES[place](12), torch.arange(12)])
    x[1, : taps - 1] = float("nan")
    x.requires_grad_()
    y = causal_conv(x, filters, position_BT)
    expected = torch.zeros_like(y)
    for row in range(2):
        for t in range(12):
            for head in range(query_heads):
                for back in range(min(taps, int(position_BT[row, t]) + 1)):
                    value = x[row, taps - 1 + t - back, head * groups // query_heads]
                    expected[row, t, head] = expected[row, t, head] + filters[head, :, back] * value
    close(y, expected)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, filters], upstream)
    for left, right in zip(found, torch.autograd.grad(expected, [x, filters], upstream), strict=True):
        close(left, right)
    assert torch.isfinite(found[1]).all()


def test_convolution_is_one_graph() -> None:
    x, filters, position_BT = torch.randn(2, 15, 2, 3), torch.randn(6, 3, 4), torch.arange(12).expand(2, -1)
    compiled = torch.compile(causal_conv, backend="eager", fullgraph=True)
    close(compiled(x, filters, position_BT), causal_conv(x, filters, position_BT), 1e-6)
