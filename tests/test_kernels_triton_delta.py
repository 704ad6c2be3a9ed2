"""The Triton gated delta rule against the definition in fp64, with eager torch's error as the measure.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import configs
from linearize_kernels.gated_delta import gated_delta_rule
from linearize_kernels.gated_delta.chunk import chunk_gated_delta_rule
from linearize_kernels.gated_delta.naive import naive_gated_delta_rule
from linearize_kernels.gated_delta.triton_step import step_
from tests.rulers import segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "log_decay", "beta", "state")
KERNELS = ("solve_chunks", "walk_states", "read_states", "gather_gradients", "walk_gradients", "chunk_gradients")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Outputs are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


def launches(chunk: int, values: int = 0) -> None:
    configs.overrides.update({f"delta_{name}": configs.Launch(chunk, 4, 1, values) for name in ("chunk", *KERNELS)})


def inputs(
    batch: int, length: int, heads: int, state_heads: int, width: int, values: int, started: bool = False
) -> dict[str, Tensor]:
    """Keys of length 1 that are alike, so that much is corrected; some decays are strong."""
    torch.manual_seed(length + heads)
    shape = (batch, length, state_heads)
    strong = torch.where(torch.rand(shape) < 0.1, 4.0, 0.1)
    tensors = {
        "q": torch.randn(batch, length, heads, width),
        "k": torch.nn.functional.normalize(torch.randn(*shape, width) + 0.5, dim=-1),
        "v": torch.randn(*shape, values),
        "log_decay": -torch.rand(shape) * strong,
        "beta": torch.rand(shape),
    }
    if started:
        tensors["state"] = torch.randn(batch, state_heads, width, values)
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def check(
    tensors: dict[str, Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, packed: bool = False
) -> dict[str, Tensor]:
    """Outputs, end state and every gradient: each element's error against fp64 is within twice the largest of the
    chunkwise form in torch, + 1e-5 of the largest. In bfloat16 that form multiplies in bfloat16, as autocast has it.
    Returns the gradients.
    """
    segments_BT = segments(tensors["q"].shape[1]).to(DEVICE) if packed else None
    found: dict[str, list[Tensor]] = {}
    weights: list[Tensor] = []
    for how, operation in (
        ("exact", naive_gated_delta_rule), ("eager", chunk_gated_delta_rule), ("triton", gated_delta_rule)
    ):  # fmt: skip
        monkeypatch.setenv("LINEARIZE_BACKEND", "triton" if how == "triton" else "torch")
        leaves = {name: x.to(dtype) if name in "qkv" else x for name, x in tensors.items()}
        leaves = {name: (x.double() if how == "exact" else x).detach().requires_grad_() for name, x in leaves.items()}
        low = how == "eager" and dtype == torch.bfloat16
        with torch.autocast(DEVICE, dtype) if low else nullcontext():
            outputs = operation(*(leaves.get(name) for name in NAMES), segments_BT)
        weights = weights or [torch.randn_like(x) for x in outputs]
        loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
        found[how] = [x.double() for x in [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]]
    for name, exact, eager, ours in zip(("o", "end", *leaves), *found.values(), strict=True):
        allowed = 2 * (eager - exact).abs().max() + 1e-5 * exact.abs().max().clamp_min(1)
        worst = (ours - exact).abs().max()
        assert torch.isfinite(ours).all(), f"{name} is not finite"
        assert worst <= allowed, f"{name}, {dtype}: error {worst:.2e}, allowed {allowed:.2e}"
    return dict(zip(leaves, found["triton"][2:], strict=True))


CASES = [  # B, T, H, J, K, V, packed, started
    (8, 1, 2, 2, 16, 16, False, True),  # many: the largest of two numbers says little about an error
    (1, 63, 4, 4, 20, 24, False, False),
    (1, 65, 3, 1, 16, 16, False, True),
    (2, 200, 4, 2, 24, 20, False, True),
    (2, 200, 2, 1, 16, 32, True, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(
    case: tuple[Any, ...], chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    *sizes, packed, started = case
    launches(chunk, 16)
    check(inputs(*sizes, started=started), dtype, monkeypatch, packed)


@pytest.mark.parametrize("decay", [-torch.inf, -20.0])
@pytest.mark.parametrize("same_key", [False, True])
def test_extremes(decay: float, same_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key for all tokens, and writes that replace or reflect, make the worst systems there are."""
    launches(64)
    tensors = inputs(1, 130, 2, 1, 16, 16, started=True)
    if same_key:
        tensors["k"] = tensors["k"][:, :1].expand_as(tensors["k"])
    tensors["log_decay"][:, ::7] = decay
    tensors["log_decay"][:, 20:40] = 0.0
    tensors["beta"][:, 1::3] = 1.0
    tensors["beta"][:, 2::3] = 1.9
    gradients = check(tensors, torch.float32, monkeypatch)
    if decay == -torch.inf:  # not even what rounding leaves: it would meet the infinite slope of what made the decay
        assert (gradients["log_decay"][:, ::7][tensors["log_decay"][:, ::7] == decay] == 0).all()


def test_padding_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens without key, strength and decay, among others: the rest is as without them."""
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    tensors = inputs(1, 100, 2, 1, 16, 16, started=True)
    real = torch.arange(100, device=DEVICE) % 3 > 0
    for name in ("k", "beta", "log_decay"):
        tensors[name][:, ~real] = 0
    o, end = gated_delta_rule(*tensors.values())
    cut = {name: x if name == "state" else x[:, real] for name, x in tensors.items()}
    expected, state = gated_delta_rule(*cut.values())
    torch.testing.assert_close(o[:, real], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-4)


def test_strides_and_missing_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads before tokens in memory, odd last strides; a loss that reads only the end state, or only o."""
    tensors = inputs(2, 70, 2, 1, 16, 16)
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        q, k, v, log_decay, beta = leaves.values()
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        v = v.transpose(2, 3).contiguous().transpose(2, 3).transpose(0, 3).contiguous().transpose(0, 3)
        for number in (0, 1):
            loss = gated_delta_rule(q, k, v, log_decay, beta)[number].square().sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
            found.append([torch.zeros(()) if x is None else x for x in gradients])
    for eager, ours in zip(found[:2], found[2:], strict=True):
        for left, right in zip(eager, ours, strict=True):
            left, right = torch.broadcast_tensors(left.to(DEVICE), right.to(DEVICE))
            torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", [(1, 4, 2, 20, 24), (3, 2, 1, 16, 40), (140, 2, 2, 16, 40)], ids=str)
@pytest.mark.parametrize("decay", [-0.5, -torch.inf])
def test_step(case: tuple[int, ...], decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token after a state against the definition; the state given stays as it was, unless in place."""
    batch, *sizes = case
    tensors = inputs(batch, 1, *sizes, started=True)
    tensors["log_decay"][:] = decay
    kept = tensors["state"].clone()
    expected = naive_gated_delta_rule(*(x.double() for x in tensors.values()))
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    with torch.no_grad():
        found = gated_delta_rule(*tensors.values())
    assert torch.equal(tensors["state"], kept)
    o = torch.full_like(found[0], torch.nan)
    step_(*tensors.values(), o)
    for left, right in zip([*found, o, tensors["state"]], expected * 2, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


def test_token_by_token_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    tensors = inputs(1, 6, 2, 1, 16, 16)
    whole, end = gated_delta_rule(*tensors.values())
    state, found = torch.zeros_like(end), []
    for t in range(6):
        o, state = gated_delta_rule(*(x[:, t : t + 1] for x in tensors.values()), state)
        found.append(o)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-4)
