"""State space duality in Triton against its loop in fp64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels.ssd import ssd
from linearize_kernels.ssd.naive import naive_ssd
from tests.test_kernels_triton import DEVICE, both, check, segments, several_splits

__all__ = ["several_splits"]


def run(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, dtype: torch.dtype) -> list[Tensor]:
    given = [leaves[name] for name in ("q", "k", "v")]
    rest = [leaves["decay"], leaves.get("write"), leaves.get("s"), fixed["segments"]]
    if how == "triton":
        return list(ssd(*given, *rest))
    cast = torch.float64 if how == "exact" else dtype
    o, end = naive_ssd(*(x.to(cast) for x in given), *(None if x is None else x.to(cast) for x in rest[:3]), rest[3])
    return [o, end]


CASES = [  # T, H, G, K, V, write, state, packed
    (1, 2, 1, 16, 16, True, True, False),
    (130, 4, 2, 20, 24, True, True, False),
    (150, 4, 2, 16, 16, False, False, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    length, heads, groups, width, values, write, started, packed = case
    torch.manual_seed(length)
    tensors = {
        "q": torch.randn(2, length, heads, width),
        "k": torch.randn(2, length, groups, width),
        "v": torch.randn(2, length, groups, values),
        "decay": -torch.rand(2, length, heads) * 0.3,
    }
    if write:
        tensors["write"] = torch.rand(2, length, heads)
    if started:
        tensors["s"] = torch.randn(2, heads, width, values)
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    check(both(run, tensors, {"segments": segments(length) if packed else None}, dtype), dtype)


def test_ssd_forgets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decay of -inf, in a walk and in a step: what came before is gone, and gradients are finite."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16, device=DEVICE) for _ in range(3))
    decay = -torch.rand(1, 70, 2, device=DEVICE)
    decay[:, 40] = float("-inf")
    leaves = [x.requires_grad_() for x in (q, k, v, decay)]
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    o, state = ssd(*leaves)
    alone, _ = ssd(q[:, 40:], k[:, 40:], v[:, 40:], decay[:, 40:])
    assert (o[:, 40:] - alone).abs().max() <= 1e-5 * alone.abs().max()  # other chunks, other roundings
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(o.square().sum() + state.sum(), leaves))
    with torch.no_grad():
        last, _ = ssd(q[:, :1], k[:, :1], v[:, :1], torch.full_like(decay[:, :1], float("-inf")), None, state)
        again, _ = ssd(q[:, :1], k[:, :1], v[:, :1], decay[:, :1])
    torch.testing.assert_close(last, again, rtol=1e-5, atol=1e-6)
