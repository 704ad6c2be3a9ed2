"""The Triton walk (hedgehog_attention, gated_linear_attention, linear_sums) against the torch forms in fp64.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import Branch, LinearState, configs, gated_linear_attention, hedgehog_attention, linear_sums
from linearize_kernels.gated_linear_attention import MIN_LOG_GATE, launch, merge
from linearize_kernels.gated_linear_attention.naive import naive_linear_sums
from linearize_kernels.gated_linear_attention.triton_step import step_
from linearize_kernels.hedgehog_attention import Map, hedgehog_features

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("add_up_splits", "walk_forward", "add_up_splits_backwards", "walk_query_gradients", "walk_key_gradients")


@pytest.fixture(autouse=True)
def several_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short splits, so that short sequences have several; and outputs that are NaN until they are written."""
    monkeypatch.setattr(launch, "SPLIT_UNIT", 64)
    monkeypatch.setattr(launch, "MIN_SPLIT", 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


def test_empty_memory_is_poisoned() -> None:
    assert torch.randn(3, device=DEVICE).new_empty(4).isnan().all()


def segments(length: int) -> Tensor:
    first = torch.bucketize(torch.arange(length), torch.tensor([1, 3, 30, 63, 64, 130, 140]), right=True)
    return torch.stack([first, torch.zeros_like(first)]).to(DEVICE)


def both(operation: Any, tensors: dict[str, Tensor], fixed: dict[str, Any], dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs and gradients of all `tensors`: naive in fp64, naive in the dtype (eager torch), in Triton."""
    found = []
    weights: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        for how in ("exact", "eager", "triton"):
            patch.setenv("LINEARIZE_BACKEND", "triton" if how == "triton" else "torch")
            leaves = {}
            for name, x in tensors.items():
                rounded = x.to(dtype if name in ("q", "k", "v", "o") else torch.float32)
                leaves[name] = (rounded.double() if how == "exact" else rounded).requires_grad_()
            outputs = operation(leaves, fixed, how, dtype)
            weights = weights or [torch.randn_like(x) for x in outputs]
            loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
            found.append([x.double() for x in [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]])
    return found


def check(found: list[list[Tensor]], dtype: torch.dtype) -> None:
    """Every element's error is within twice the largest of eager torch in the same dtype, + 1e-5 of the largest."""
    for number, (exact, eager, ours) in enumerate(zip(*found, strict=True)):
        allowed = 2 * (eager - exact).abs().max() + 1e-5 * exact.abs().max().clamp_min(1)
        worst = (ours - exact).abs().max()
        assert torch.isfinite(ours).all(), f"tensor {number} is not finite"
        assert worst <= allowed, f"tensor {number}, {dtype}: error {worst:.2e}, allowed {allowed:.2e}"


def naive(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, state: LinearState | None, segments_BT: Tensor | None,
    dtype: torch.dtype, how: str, other: Branch | None = None, normalised: bool = True,
) -> list[Tensor]:  # fmt: skip
    """The definition; where it is `eager`, all of it in the dtype."""
    if how == "eager":
        q, k, v = (x.to(dtype) for x in (q, k, v))
        other = None if other is None else Branch(*(x.to(dtype) for x in other))
    if gate is not None and gate.ndim == 4:
        gate = gate.clamp_min(MIN_LOG_GATE)
    num, den, end = naive_linear_sums(q, k, v, gate, segments_BT, state)
    return [merge(num, den, other), *end] if normalised else [num, den, *end]


def sums(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, dtype: torch.dtype) -> list[Tensor]:
    state = LinearState(leaves["s"], leaves["z"]) if "s" in leaves else None
    arguments = (leaves["q"], leaves["k"], leaves["v"], leaves.get("gate"), state, fixed["segments"])
    if how != "triton":
        return naive(*arguments, dtype, how, normalised=fixed["normalised"])
    if fixed["normalised"]:
        y, end = gated_linear_attention(*arguments, epsilon=1e-10)
        return [y, *end]
    num, den, end = linear_sums(*arguments)
    return [num, den, *end]


SUMS = [  # T, H, J, G, F, V, gate, packed, state, normalised
    (1, 2, 2, 1, 16, 16, "none", False, False, True),
    (63, 4, 4, 2, 16, 16, "head", False, False, True),
    (64, 2, 2, 2, 20, 24, "feature", False, True, True),
    (65, 3, 3, 1, 16, 16, "head", False, True, False),
    (200, 4, 2, 2, 16, 16, "none", True, False, False),
    (200, 2, 1, 1, 20, 24, "feature", True, False, False),
    (200, 2, 2, 2, 16, 16, "head", True, True, True),
    (200, 4, 2, 1, 16, 16, "feature", True, True, True),
]


@pytest.mark.parametrize("case", SUMS, ids=str)
@pytest.mark.parametrize("chunk", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums(case: tuple[Any, ...], chunk: int, dtype: torch.dtype) -> None:
    length, heads, key_heads, groups, features, values, gate, packed, started, normalised = case
    if chunk == 64 and length < 100:
        pytest.skip("one chunk either way")
    configs.overrides.update({name: configs.Launch(chunk, 4, 1) for name in KERNELS})
    torch.manual_seed(length + heads)
    batch = 2 if packed else 1
    tensors = {
        "q": torch.rand(batch, length, heads, features),
        "k": torch.rand(batch, length, key_heads, features),
        "v": torch.randn(batch, length, groups, values),
    }
    if gate != "none":
        shape = (batch, length, key_heads, features)[: 3 if gate == "head" else 4]
        tensors["gate"] = -torch.rand(shape) * torch.where(torch.rand(shape) < 0.1, 4.0, 0.3)
    if started:
        tensors["s"] = torch.rand(batch, key_heads, features, values)
        tensors["z"] = torch.rand(batch, key_heads, features)
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    fixed = {"segments": segments(length) if packed else None, "normalised": normalised}
    check(both(sums, tensors, fixed, dtype), dtype)


def eager_features(x_BTGK: Tensor, weight_HKF: Tensor, bias_HF: Tensor | None, form: str, side: str) -> Tensor:
    """`hedgehog_features` in the dtype of x throughout."""
    x_BTHK = x_BTGK.repeat_interleave(weight_HKF.shape[0] // x_BTGK.shape[2], dim=2)
    u = torch.einsum("bthk,hkf->bthf", x_BTHK, weight_HKF.to(x_BTGK.dtype))
    u = u if bias_HF is None else u + bias_HF.to(x_BTGK.dtype)
    if form == "softmax":
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
    both = torch.cat([u, -u], -1)
    if form == "softmax_joint":
        return (2 * both).softmax(-1)
    return (both - both.amax(-1, keepdim=True).detach()).exp() if side == "query" else both.exp()


def hedgehog(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, dtype: torch.dtype) -> list[Tensor]:
    query_map, key_map = (Map(leaves[f"{side}_weight"], leaves.get(f"{side}_bias")) for side in ("q", "k"))
    state = LinearState(leaves["s"], leaves["z"]) if "s" in leaves else None
    other = Branch(leaves["o"], leaves["d"]) if "o" in leaves else None
    q, k, v, gate, segments_BT = (*(leaves[name] for name in "qkv"), leaves.get("gate"), fixed["segments"])
    if how == "triton":
        arguments = (q, k, v, query_map, key_map, fixed["map"], gate, state, segments_BT, fixed["mask"])
        y, end = hedgehog_attention(*arguments, other=other)
        return [y, *end]
    features = eager_features if how == "eager" else hedgehog_features
    q, k = (features(x, *maps, fixed["map"], side) for x, maps, side in ((q, query_map, "query"), (k, key_map, "key")))
    k = k if fixed["mask"] is None else k * fixed["mask"][:, :, None, None]
    return naive(q, k, v, gate, state, segments_BT, dtype, how, other)


HEDGEHOG = [  # T, H, G, K, F, V, bias, gate, other, packed, masked, state
    (100, 2, 1, 16, 16, 16, False, False, False, False, False, True),
    (200, 2, 2, 20, 12, 24, True, True, True, True, False, False),
    (130, 3, 1, 20, 12, 24, True, False, True, False, True, False),
]


def made(case: tuple[Any, ...], feature_map: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a case of `hedgehog`, and what is not differentiated."""
    length, heads, groups, width, features, values, bias, gated, other, packed, masked, started = case
    torch.manual_seed(length + heads)
    tensors = {
        "q": torch.randn(2, length, heads, width),
        "k": torch.randn(2, length, groups, width),
        "v": torch.randn(2, length, groups, values),
        "q_weight": torch.randn(heads, width, features) * width**-0.5,
        "k_weight": torch.randn(heads, width, features) * width**-0.5,
    }
    if bias:
        tensors |= {"q_bias": torch.randn(heads, features), "k_bias": torch.randn(heads, features)}
    if gated:
        tensors["gate"] = -torch.rand(2, length, heads) * 0.3
    if started:
        tensors |= {"s": torch.rand(2, heads, 2 * features, values), "z": torch.rand(2, heads, 2 * features)}
    if other:
        tensors |= {"o": torch.randn(2, length, heads, values), "d": 0.2 + torch.rand(2, length, heads)}
    mask = torch.rand(2, length, device=DEVICE) > 0.3 if masked else None
    fixed = {"map": feature_map, "segments": segments(length) if packed else None, "mask": mask}
    return {name: x.to(DEVICE) for name, x in tensors.items()}, fixed


@pytest.mark.parametrize("case", HEDGEHOG, ids=str)
@pytest.mark.parametrize("feature_map", ["softmax", "softmax in two passes", "softmax_joint", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hedgehog(case: tuple[Any, ...], feature_map: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if feature_map == "softmax in two passes":
        feature_map = "softmax"
        monkeypatch.setattr(launch, "ONE_SIGN_FROM", 16)
    configs.overrides.update({name: configs.Launch(32, 4, 1) for name in KERNELS})
    check(both(hedgehog, *made(case, feature_map), dtype), dtype)


@pytest.mark.parametrize("case", [(1, 4, 4, 2, 20, 24), (3, 4, 2, 1, 16, 40), (80, 4, 4, 4, 16, 16)], ids=str)
@pytest.mark.parametrize("gate", ["none", "head", "feature"])
def test_step(case: tuple[int, ...], gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token after a state, as the torch step does it; the state given stays as it was, unless in place."""
    batch, heads, key_heads, groups, features, values = case
    torch.manual_seed(0)
    shape = (batch, 1, key_heads, features)
    q, k = (torch.rand(batch, 1, count, features, device=DEVICE) for count in (heads, key_heads))
    v = torch.randn(batch, 1, groups, values, device=DEVICE)
    log_gate = None if gate == "none" else -6 * torch.rand(shape[: 3 if gate == "head" else 4], device=DEVICE)
    state = LinearState(torch.randn(*shape[:1], *shape[2:], values).to(DEVICE), torch.rand(shape).squeeze(1).to(DEVICE))
    kept = [x.clone() for x in state]
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        y, end = gated_linear_attention(q, k, v, log_gate, state, epsilon=1e-10)
        num, den, again = linear_sums(q, k, v, log_gate, state)
        found[backend] = [y, *end, num, den, *again]
    for left, right in zip(*found.values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    y = torch.empty_like(found["torch"][0])
    step_(q, k, v, log_gate, *state, y, 1e-10)
    for left, right in zip([y, *state], found["torch"][:3], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 90])
@pytest.mark.parametrize("gate", ["head", "feature"])
def test_a_gate_may_stand_for_several_heads(
    gate: str, length: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walked or, one token after a state, stepped: as with the gate repeated, gradients too."""
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    torch.manual_seed(0)
    q, k = (torch.rand(2, length, 4, 16, device=DEVICE) for _ in range(2))
    v = torch.randn(2, length, 2, 16, device=DEVICE)
    state = LinearState(torch.randn(2, 4, 16, 16, device=DEVICE), torch.rand(2, 4, 16, device=DEVICE))
    log_gate = -torch.rand((2, length, 2, 16)[: 3 if gate == "head" else 4], device=DEVICE)
    repeated = log_gate.repeat_interleave(2, dim=2)
    for found, expected in zip(
        (*linear_sums(q, k, v, log_gate, state)[:2], gated_linear_attention(q, k, v, log_gate, state)[0]),
        (*linear_sums(q, k, v, repeated, state)[:2], gated_linear_attention(q, k, v, repeated, state)[0]),
        strict=True,
    ):
        assert torch.equal(found, expected)
    gradients = []
    for given in (log_gate.requires_grad_(), repeated.requires_grad_()):
        num, den, _ = linear_sums(q, k, v, given, state)
        gradients.append(torch.autograd.grad(num.sum() + den.sum(), given)[0])
    torch.testing.assert_close(gradients[0], gradients[1].unflatten(2, (2, 2)).sum(3))
