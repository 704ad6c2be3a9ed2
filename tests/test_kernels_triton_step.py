"""Decoding steps in one Triton launch against the torch forms in fp64, token by token.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import Branch, LinearState, hedgehog_attention
from linearize_kernels.bound import Bound
from linearize_kernels.hedgehog_attention import Map, triton_step
from tests.test_kernels_triton import DEVICE, check, eager_features, naive


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Outputs are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that start."""
    names: list[str] = []
    start = Bound.__call__

    def count(self: Bound, *arguments: Any) -> None:
        names.append(self.kernel.fn.__name__)
        start(self, *arguments)

    monkeypatch.setattr(Bound, "__call__", count)
    return names


def tokens(x: Tensor | None, t: int) -> Tensor | None:
    return None if x is None else x[:, t : t + 1]


HEDGEHOG = [  # B, T, H, G, K, F, V, bias, gate, other, masked
    (1, 4, 4, 2, 16, 16, 16, False, None, False, False),
    (2, 3, 4, 2, 20, 12, 40, True, "head", True, False),
    (2, 4, 3, 1, 20, 24, 24, True, "token", False, True),
    (1, 1, 2, 2, 16, 8, 72, False, "head", False, True),
]


@pytest.mark.parametrize("case", HEDGEHOG, ids=str)
@pytest.mark.parametrize("feature_map", ["softmax", "softmax_joint", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hedgehog(
    case: tuple[Any, ...], feature_map: Any, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token in one launch; outputs and end state as the definition has them on all tokens at once."""
    batch, length, heads, groups, width, features, values, bias, gated, branch, masked = case
    torch.manual_seed(batch + heads)
    if values > 64:
        monkeypatch.setattr(triton_step, "PROGRAMS", 1)  # as where there are many heads
    sizes = ((heads, width), (groups, width), (groups, values))
    q, k, v = (torch.randn(batch, length, *size).to(DEVICE, dtype) for size in sizes)
    weights = [(torch.randn(heads, width, features) * width**-0.5).to(DEVICE) for _ in range(2)]
    biases = [torch.randn(heads, features, device=DEVICE) if bias else None for _ in range(2)]
    gate = -6 * torch.rand(batch, length, 1 if gated == "token" else heads, device=DEVICE) if gated else None
    gate = None if gate is None else gate.expand(-1, -1, heads)
    mask = torch.rand(batch, length, device=DEVICE) > 0.4 if masked else None
    other = (
        torch.randn(batch, length, heads, values).to(DEVICE, dtype),
        torch.rand(batch, length, heads, device=DEVICE),
    )
    start = LinearState(torch.rand(batch, heads, 2 * features, values), torch.rand(batch, heads, 2 * features))
    start = LinearState(*(x.to(DEVICE) for x in start))
    kept = [x.clone() for x in start]

    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    state, found = start, []
    for t in range(length):
        one = Branch(*(x[:, t : t + 1] for x in other)) if branch else None
        heads_t = (x[:, t : t + 1] for x in (q, k, v))
        maps = (Map(weights[0], biases[0]), Map(weights[1], biases[1]))
        y, state = hedgehog_attention(
            *heads_t, *maps, feature_map, tokens(gate, t), state, None, tokens(mask, t), other=one
        )
        found.append(y)
    assert launched == ["hedgehog_step"] * length
    assert found[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))

    results = []
    for how, cast in (("exact", torch.float64), ("eager", dtype)):
        rounded = [x.to(cast) for x in (q, k, v)]
        a, b = (
            eager_features(x, weight, each, feature_map, side)
            for x, weight, each, side in zip(rounded[:2], weights, biases, ("query", "key"), strict=True)
        )
        b = b if mask is None else b * mask[:, :, None, None]
        begin = LinearState(*(x.to(cast) for x in start)) if how == "exact" else start
        beside = Branch(*(x.to(cast) for x in other)) if branch else None
        results.append([x.double() for x in naive(a, b, rounded[2], gate, begin, None, dtype, how, beside)])
    check([*results, [x.double() for x in (torch.cat(found, 1), *state)]], dtype)


def test_one_token_that_is_differentiated_takes_the_other_path(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2, 16, device=DEVICE) for _ in range(3))
    maps = [Map(torch.randn(2, 16, 16, device=DEVICE).requires_grad_()) for _ in range(2)]
    state = LinearState(torch.rand(1, 2, 32, 16, device=DEVICE), torch.rand(1, 2, 32, device=DEVICE))
    y, end = hedgehog_attention(q, k, v, *maps, state=state)
    assert "hedgehog_step" not in launched
    assert all((x != 0).any() for x in torch.autograd.grad(y.sum() + end.s_BJFV.sum(), [m.weight_HKF for m in maps]))
    with torch.no_grad():
        again, _ = hedgehog_attention(q, k, v, *maps, state=state)
    assert launched[-1] == "hedgehog_step"
    torch.testing.assert_close(again, y.detach(), rtol=1e-5, atol=1e-5)
