"""Rotation in Triton against its definition in fp64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize.mixers import Rope
from linearize_kernels import configs, rotary
from linearize_kernels.rotary.naive import naive_rotary
from tests.test_kernels_triton import DEVICE, both, check

CASES = [  # B, T, H, G, K, R, one row of angles for all of the batch
    (1, 1, 4, 2, 16, 16, True),
    (2, 37, 3, 1, 16, 16, False),
    (2, 64, 4, 2, 24, 24, True),
    (2, 33, 2, 2, 20, 8, False),
    (1, 65, 2, 1, 70, 36, True),
]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # outputs are NaN until they are written
    configs.overrides["rotate_heads"] = configs.Launch(16, 4, 1)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


def make(case: tuple[Any, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Heads before tokens in memory, as some attention layers have them; the halves' angles differ."""
    batch, length, heads, groups, width, rotated, one = case
    torch.manual_seed(length)
    tensors = {
        "q": torch.randn(batch, heads, length, width, device=DEVICE).transpose(1, 2),
        "k": torch.randn(batch, length, groups, width, device=DEVICE),
    }
    angle = torch.rand(1 if one else batch, length, rotated, device=DEVICE) * 6
    return tensors, {"cos": angle.cos(), "sin": angle.sin(), "scale": 0.3}


def turn(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, dtype: torch.dtype) -> list[Tensor]:
    cos, sin, scale = fixed["cos"], fixed["sin"], fixed["scale"]
    if how == "exact":
        return [naive_rotary(leaves["q"], cos, sin, scale), naive_rotary(leaves["k"], cos, sin)]
    return list(rotary(leaves["q"], leaves["k"], cos, sin, scale))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    tensors, fixed = make(case)
    check(both(turn, tensors, fixed, dtype), dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_asked_for_another_dtype(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    tensors, fixed = make(CASES[1])
    q, k = (x.bfloat16() for x in tensors.values())
    found = rotary(q, k, fixed["cos"].bfloat16(), fixed["sin"].bfloat16(), 2.0, torch.float32)
    assert [x.dtype for x in found] == [torch.float32] * 2
    exact = naive_rotary(q.double(), fixed["cos"].bfloat16().double(), fixed["sin"].bfloat16().double(), 2.0)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_as_a_rope_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    tensors, fixed = make(CASES[3])
    rope = Rope(fixed["cos"], fixed["sin"])
    for found, x in zip(rope.rotate_both(*tensors.values()), tensors.values(), strict=True):
        torch.testing.assert_close(found, rope.rotate(x), rtol=1e-6, atol=1e-6)


def test_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    tensors, fixed = make(CASES[1])
    found = []
    for backend in ("eager", "aot_eager"):
        leaves = {name: x.bfloat16().requires_grad_() for name, x in tensors.items()}
        outputs = torch.compile(turn, backend=backend, fullgraph=True)(leaves, fixed, "triton", torch.bfloat16)
        loss = sum(x.float().square().sum() for x in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, list(leaves.values()))])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)
