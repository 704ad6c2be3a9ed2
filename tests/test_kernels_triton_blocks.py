"""Hedgehog attention where the running states go through memory, against the torch form in fp64, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from linearize_kernels import Branch, LinearState, configs, hedgehog_attention
from linearize_kernels.gated_linear_attention import launch_blocks
from linearize_kernels.hedgehog_attention import Map

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS = {
    "a block is a chunk": configs.Launch(32, 4, 4, block=32),
    "two chunks a block": configs.Launch(32, 4, 1, block=64),
    "three chunks a program": configs.Launch(16, 4, 1, block=32, run=3),
}
CASES = [  # T, H, G, K, F, V, bias, gate, other, packed, masked, state
    (100, 2, 1, 16, 16, 16, False, False, False, False, False, True),
    (200, 2, 2, 20, 12, 24, True, True, True, True, False, False),
    (200, 2, 1, 16, 16, 16, False, True, False, False, False, True),
    (330, 1, 1, 20, 12, 24, True, False, True, False, True, False),
]


@pytest.fixture(autouse=True)
def several_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short splits, and outputs that are NaN until they are written."""
    monkeypatch.setattr(launch_blocks, "MIN_SPLIT", 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("how", list(OUTPUTS))
@pytest.mark.parametrize("feature_map", ["softmax", "exp"])
def test_blocks(case: tuple[Any, ...], how: str, feature_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    length, heads, groups, width, features, values, bias, gated, other, packed, masked, started = case
    torch.manual_seed(length + heads)

    def new(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=DEVICE)

    inputs = [new(2, length, count, size) for count, size in ((heads, width), (groups, width), (groups, values))]
    maps = [Map(new(heads, width, features) * width**-0.5, new(heads, features) if bias else None) for _ in range(2)]
    gate = -0.3 * torch.rand(2, length, heads, device=DEVICE) if gated else None
    state = (
        LinearState(new(2, heads, 2 * features, values).abs(), new(2, heads, 2 * features).abs()) if started else None
    )
    place = torch.arange(length, device=DEVICE)
    documents = torch.stack(
        [torch.bucketize(place, torch.tensor([1, 3, 30, 63, 64, 130, 140], device=DEVICE)), 0 * place]
    )
    mask = torch.rand(2, length, device=DEVICE) > 0.3 if masked else None
    beside = Branch(new(2, length, heads, values), 0.2 + new(2, length, heads).abs()) if other else None
    arguments = (*inputs, *maps, feature_map, gate, state, documents if packed else None, mask)
    monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
    exact, end = hedgehog_attention(*arguments, other=beside)
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    configs.overrides.update({"block_outputs": OUTPUTS[how], "block_states": configs.Launch(16, 4, 1)})
    found, own_end = hedgehog_attention(*arguments, other=beside)
    for left, right in zip((found, *own_end), (exact, *end), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
