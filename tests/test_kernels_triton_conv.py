"""Causal convolutions in Triton against their definition in fp64.

On a machine without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from linearize_kernels import causal_convs, configs
from linearize_kernels.causal_conv.naive import naive_causal_conv
from tests.test_kernels_triton import DEVICE, both, check

KERNELS = ("convolve", "convolve_gradients")
NAMES = "qkv"


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Several tiles a row; and outputs that are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    configs.overrides.update({name: configs.Launch(16, 4, 1) for name in KERNELS})
    yield
    torch.use_deterministic_algorithms(False)
    configs.overrides.clear()


class Case(NamedTuple):
    length: int
    taps: int
    inputs: tuple[tuple[int, int, int], ...]  # X, H, channels of each
    places: str  # where the tokens stand: whole, packed, continued, padded, or nothing but padding in the first row
    tails: bool = False
    shifts: bool = False
    silu: bool = False


CASES = [
    Case(1, 4, ((2, 2, 16), (1, 2, 16)), "whole"),
    Case(1, 4, ((2, 2, 16), (1, 2, 16), (1, 1, 24)), "continued", tails=True, shifts=True, silu=True),
    Case(2, 4, ((2, 2, 16), (1, 1, 16)), "padded", tails=True),
    Case(5, 4, ((2, 2, 16),), "padded"),
    Case(3, 4, ((2, 2, 16),), "nothing", tails=True),
    Case(37, 4, ((3, 3, 20), (1, 3, 20)), "packed"),
    Case(37, 4, ((3, 3, 20), (1, 3, 20)), "packed", shifts=True, silu=True),
    Case(33, 2, ((2, 4, 70),), "continued", tails=True),
    Case(21, 3, ((2, 2, 5), (1, 1, 5), (1, 1, 70)), "padded", tails=True, shifts=True, silu=True),
    Case(21, 4, ((1, 2, 16), (1, 1, 16)), "padded", silu=True),
    Case(32, 4, ((1, 1, 16), (1, 1, 16), (1, 1, 16)), "padded", tails=True),
    Case(19, 1, ((2, 4, 16), (2, 2, 16)), "whole"),
]


def timeline(case: Case) -> tuple[Tensor, Tensor | None]:
    """Positions of two rows, and their padding."""
    place = torch.arange(case.length)
    if case.places == "packed":
        return torch.stack([torch.cat([place[:1], place[:2], place])[: case.length], place]).to(DEVICE), None
    seen = torch.tensor([[50], [2]] if case.tails else [[0], [0]])  # the second row's tail begins before its document
    if case.places in ("whole", "continued"):
        return (place + seen).to(DEVICE), None
    padding = torch.tensor([case.length if case.places == "nothing" else case.length // 2 + 1, 0])
    since = place - padding[:, None]
    return torch.where(since < 0, -1, since + seen).to(DEVICE), padding.to(DEVICE)


def make(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors by name; heads before tokens in memory, as attention layers have them. Tails are fp32."""
    torch.manual_seed(case.length + case.taps)
    tensors = {}
    for name, (groups, heads, width) in zip(NAMES, case.inputs, strict=False):
        tensors[name] = torch.randn(2, groups, case.length, width).transpose(1, 2)
        tensors[f"{name}_taps"] = torch.randn(heads, width, case.taps)
        if case.shifts:
            tensors[f"{name}_shift"] = torch.randn(heads, width)
        if case.tails:
            tensors[f"{name}_tail"] = torch.randn(2, case.taps - 1, groups, width).to(dtype).float()
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def convolve(leaves: dict[str, Tensor], fixed: dict[str, Any], how: str, _: torch.dtype) -> list[Tensor]:
    """Outputs and new tails."""
    names = [name for name in NAMES if name in leaves]
    position_BT, padding_B, activation = fixed["position"], fixed["padding"], fixed["activation"]
    if how == "exact":
        rest = [(leaves.get(f"{name}_tail"), padding_B, leaves.get(f"{name}_shift"), activation) for name in names]
        found = [
            naive_causal_conv(leaves[name], leaves[f"{name}_taps"], position_BT, *more)
            for name, more in zip(names, rest, strict=True)
        ]
        return [y for y, _ in found] + [end for _, end in found if end.numel()]
    xs, taps = [leaves[name] for name in names], [leaves[f"{name}_taps"] for name in names]
    tails, shifts = ([leaves[f"{name}_{x}"] for name in names if f"{name}_{x}" in leaves] for x in ("tail", "shift"))
    more = {"shifts": shifts or None, "activation": activation, "dtype": fixed["dtype"]}
    ys, ends = causal_convs(xs, taps, position_BT, tails or None, padding_B, **more)
    return ys + [end for end in ends if end.numel()]


def fixed_of(case: Case, dtype: torch.dtype | None = None) -> dict[str, Any]:
    position_BT, padding_B = timeline(case)
    activation = "silu" if case.silu else "none"
    return {"position": position_BT, "padding": padding_B, "activation": activation, "dtype": dtype}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(case: Case, dtype: torch.dtype) -> None:
    check(both(convolve, make(case, dtype), fixed_of(case), dtype), dtype)


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_outputs_in_bf16(case: Case) -> None:
    found = both(convolve, make(case, torch.bfloat16), fixed_of(case, torch.bfloat16), torch.bfloat16)
    check(found, torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_positions_from_zero_need_not_be_given(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    case = Case(37, 4, ((3, 3, 20), (1, 3, 20)), "whole", shifts=True, silu=True)
    leaves = {name: x.requires_grad_() for name, x in make(case, torch.float32).items()}
    fixed = fixed_of(case)
    found = []
    for position_BT in (fixed["position"], None):
        ys = convolve(leaves, fixed | {"position": position_BT}, backend, torch.float32)
        upstream = [torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y) for y in ys]
        found.append([*ys, *torch.autograd.grad(ys, list(leaves.values()), upstream)])
    for given, left_out in zip(*found, strict=True):
        assert torch.equal(given, left_out)


@pytest.mark.parametrize("number", [2, 3, 4, 8, 9])
def test_nan_before_a_document_is_not_read(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, tails that begin before the document: outputs and all gradients are the same, bit by bit."""
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    case = CASES[number]
    fixed, clean = fixed_of(case), make(case, torch.float32)
    poisoned = {name: x.clone() for name, x in clean.items()}
    for name in NAMES[: len(case.inputs)]:
        poisoned[name][fixed["position"] < 0] = float("nan")
        if case.tails:
            poisoned[f"{name}_tail"][1, : case.taps - 1 - 2] = float("nan")
            poisoned[f"{name}_tail"][0, : case.taps - 1 if case.places == "nothing" else 0] = float("nan")
    found = []
    for tensors in (clean, poisoned):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        ys = convolve(leaves, fixed, "triton", torch.float32)[: len(case.inputs)]
        loss = sum(y.square().sum() for y in ys)
        found.append([*ys, *torch.autograd.grad(loss, list(leaves.values()))])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kept", [[0], [4], [1, 5]], ids=str)
def test_some_outputs_are_not_differentiated(kept: list[int]) -> None:
    case = CASES[10]

    def some(*arguments: Any) -> list[Tensor]:
        found = [x if place in kept else x.detach() for place, x in enumerate(convolve(*arguments))]
        return [*found, torch.stack([x.sum() for x in arguments[0].values()])]  # so that every tensor has a gradient

    check(both(some, make(case, torch.float32), fixed_of(case), torch.float32), torch.float32)


def test_convolutions_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    case = CASES[8]
    fixed = fixed_of(case)
    compiled = torch.compile(convolve, backend="eager", fullgraph=True)
    found = []
    for function in (convolve, compiled):
        leaves = {name: x.requires_grad_() for name, x in make(case, torch.float32).items()}
        outputs = function(leaves, fixed, "triton", torch.float32)
        loss = sum(x.square().sum() for x in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, list(leaves.values()))])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def test_fake_kernels_tell_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    case = CASES[8]
    leaves = {name: x.requires_grad_() for name, x in make(case, torch.bfloat16).items()}
    compiled = torch.compile(convolve, backend="aot_eager", fullgraph=True)
    outputs = compiled(leaves, fixed_of(case), "triton", torch.bfloat16)
    gradients = torch.autograd.grad(sum(x.float().square().sum() for x in outputs), list(leaves.values()))
    assert [x.shape for x in gradients] == [x.shape for x in leaves.values()]
    assert all(torch.isfinite(x).all() for x in gradients)


def test_more_taps_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    case = Case(9, 6, ((1, 1, 8),), "whole")
    found = convolve(make(case, torch.float32), fixed_of(case), "triton", torch.float32)
    expected = convolve(
        {n: x.double() for n, x in make(case, torch.float32).items()}, fixed_of(case), "exact", torch.float64
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)
