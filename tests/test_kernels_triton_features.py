"""Features of queries and keys in one launch against their definition in fp64; on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import configs
from linearize_kernels.hedgehog_attention import FeatureMap, Map, features_of_both, hedgehog_features
from tests.test_kernels_triton import DEVICE

CASES = [  # B, T, H, query heads, key heads, K, F, bias, masked
    (1, 1, 4, 4, 2, 16, 8, False, False),
    (2, 37, 4, 4, 4, 20, 10, True, True),
    (2, 63, 3, 3, 1, 16, 16, False, True),
    (1, 64, 2, 2, 1, 24, 40, True, False),
    (1, 17, 2, 2, 2, 90, 16, False, False),
]
MAPS: list[FeatureMap] = ["softmax", "softmax_joint", "exp"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # outputs are NaN until they are written
    configs.overrides["write_features"] = configs.Launch(16, 4, 1)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


def make(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Map, Map, Tensor | None]:
    """Heads before tokens in memory, as attention layers have them."""
    batch, length, heads, query_heads, key_heads, width, features, bias, masked = case
    torch.manual_seed(length)
    q, k = (
        torch.randn(batch, count, length, width, device=DEVICE).to(dtype).transpose(1, 2)
        for count in (query_heads, key_heads)
    )
    maps = [
        Map(
            torch.randn(heads, width, features, device=DEVICE),
            torch.randn(heads, features, device=DEVICE) if bias else None,
        )
        for _ in range(2)
    ]
    mask = torch.rand(batch, length, device=DEVICE) < 0.7 if masked else None
    return q, k, maps[0], maps[1], mask


def exactly(x: Tensor, weights: Map, feature_map: FeatureMap, query: bool) -> Tensor:
    bias = None if weights.bias_HF is None else weights.bias_HF.double()
    return hedgehog_features(x.double(), weights.weight_HKF.double(), bias, feature_map, "query" if query else "key")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features(case: tuple[int, ...], feature_map: FeatureMap, dtype: torch.dtype) -> None:
    q, k, query_map, key_map, mask = make(case, dtype)
    found_q, found_k = features_of_both(q, k, query_map, key_map, feature_map, mask, torch.float32)
    exact_k = exactly(k, key_map, feature_map, query=False)
    if mask is not None:
        exact_k = exact_k * mask[:, :, None, None]
    assert found_q.dtype == found_k.dtype == torch.float32
    torch.testing.assert_close(found_q.double(), exactly(q, query_map, feature_map, query=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found_k.double(), exact_k, rtol=1e-4, atol=1e-6)
    for rounded, found in zip(
        features_of_both(q, k, query_map, key_map, feature_map, mask, torch.bfloat16), (found_q, found_k), strict=True
    ):
        torch.testing.assert_close(rounded.float(), found, rtol=2**-7, atol=1e-12)


def test_where_they_are_differentiated_torch_computes_them() -> None:
    q, k, query_map, key_map, mask = make(CASES[1], torch.float32)
    query_map = Map(query_map.weight_HKF.requires_grad_(), query_map.bias_HF)
    found_q, _ = features_of_both(q, k, query_map, key_map, "softmax", mask, torch.bfloat16)
    assert found_q.requires_grad
    assert found_q.dtype == torch.float32
