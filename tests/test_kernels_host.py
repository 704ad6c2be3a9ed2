"""What saves the host's time must not change what is computed: operations past torch's dispatcher, kernels past
Triton's own start, and outputs that nobody reads.

Kernels run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from linearize_kernels import Branch, LinearState, hedgehog_attention, linear_sums, rotary
from linearize_kernels.bound import Bound
from linearize_kernels.gated_linear_attention import launch
from linearize_kernels.hedgehog_attention import Map
from linearize_kernels.operations import differentiate, operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Passing(TorchDispatchMode):
    """Somebody else's mode: operations have to go through the dispatcher, where it sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@operation("scaled_for_tests", lambda x, factor: (x.new_empty(x.shape), x.new_empty(x.shape)))
def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x * 0 + factor


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.factor = inputs[1]
    ctx.mark_non_differentiable(output[1])


differentiate("scaled_for_tests", lambda ctx, dy, _: (dy * ctx.factor, None), _save)


@operation("halved_for_tests", lambda x: (x.new_empty(x.shape), x), alone=lambda x: (x / 2, None))
def halved(x: Tensor) -> tuple[Tensor, Tensor]:
    return x / 2, x + 0


def test_operations_run_in_the_dispatcher_only_for_others() -> None:
    x = torch.randn(5, requires_grad=True)
    y, constant = scaled(x, 3.0)
    assert type(y.grad_fn).__name__ == "DifferentiableBackward"
    assert not constant.requires_grad
    with Passing() as mode:
        dispatched, _ = scaled(x, 3.0)
    assert "linearize.scaled_for_tests.default" in mode.seen
    assert "Generated" in type(dispatched.grad_fn).__name__
    for out in (y, dispatched):
        torch.testing.assert_close(out, 3 * x)
        torch.testing.assert_close(*torch.autograd.grad(out.sum(), x), torch.full((5,), 3.0))
    with torch.no_grad():
        assert scaled(x, 3.0)[0].grad_fn is None
    assert scaled(x.detach(), 3.0)[0].grad_fn is None


def test_only_undifferentiated_calls_run_alone() -> None:
    x = torch.randn(5)
    assert halved(x)[1] is None
    with Passing():
        assert halved(x)[1] is not None
    with torch.no_grad():
        assert halved(x.requires_grad_())[1] is None


class Recorder:
    """As much of a compiled kernel as a launch reads; Triton's own code starts it where it is subscripted."""

    function, packed_metadata = 7, (4, 1, 0)
    name, src = "recorder", None
    launch_metadata, __getitem__ = CompiledKernel.launch_metadata, CompiledKernel.__getitem__

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def _init_handles(self) -> None: ...

    def run(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class Kernel:
    """A kernel whose compilation gives a recorder."""

    arg_names = ("x", "y", "scale", "length", "WIDTH")

    def __init__(self) -> None:
        self.compiled, self.calls = Recorder(), 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Recorder]:
        def start(*_: Any, **__: Any) -> Recorder:
            self.calls += 1
            return self.compiled

        return start


class Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 11 + device


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Bound:
    monkeypatch.setattr(driver, "_active", Driver())
    return Bound(Kernel(), (3, 2), (64,), {"WIDTH": 16, "num_warps": 4}, torch.device("cpu"))


def aligned(size: int = 8) -> Tensor:
    x = torch.zeros(size + 16)
    return x[(-x.data_ptr() // 4) % 4 :][:size]


def test_starts_as_triton_does(bound: Bound) -> None:
    x, y = aligned(), aligned()
    bound((x, y), 0.5)
    assert bound.kernel.calls == 1
    bound((x, y), 0.5)
    compiled = bound.kernel.compiled
    compiled[bound.full_grid](x, y, 0.5, 64, 16)
    ours, theirs = compiled.launches
    addresses = tuple(tensor.data_ptr() for tensor in (x, y))
    assert ours == (3, 2, 1, 11, 7, (4, 1, 0), None, None, None, *addresses, 0.5, 64, 16)
    assert ours[:6] == theirs[:6]
    assert theirs[9:] == (x, y, 0.5, 64, 16)
    assert bound.kernel.calls == 1


def test_profilers_hear_of_every_launch(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = aligned(), aligned()
    bound((x, y), 0.5)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    bound((x, y), 0.5)
    (arguments,) = bound.kernel.compiled.launches
    assert arguments[6].get()["name"] == "recorder"
    assert arguments[7] is knobs.runtime.launch_enter_hook


def test_another_way_of_starting_is_left_to_triton(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Recorder, "packed_metadata")
    x, y = aligned(), aligned()
    bound((x, y), 0.5)
    monkeypatch.setattr(Recorder, "packed_metadata", None, raising=False)
    bound((x, y), 0.5)
    assert bound.kernel.compiled.launches[0][9] is x


def test_triton_judges_other_devices_and_alignments(bound: Bound) -> None:
    x, y = aligned(), aligned()
    bound((x, y), 0.5)
    bound((x[1:], y), 0.5)
    assert bound.kernel.calls == 2, "compiled for addresses that are multiples of 16"
    bound.devices = {0}  # x and y are elsewhere
    bound((x, y), 0.5)
    (arguments,) = bound.kernel.compiled.launches
    assert arguments[9] is x


def inputs(**more: Any) -> dict[str, Any]:
    """For Hedgehog attention."""
    generator = torch.Generator().manual_seed(0)

    def new(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(DEVICE)

    heads = {"q_BTHK": new(1, 100, 2, 16), "k_BTGK": new(1, 100, 1, 16), "v_BTGV": new(1, 100, 1, 24)}
    maps = {"query_map": Map(new(2, 16, 16)), "key_map": Map(new(2, 16, 16))}
    if more.pop("started", False):
        more["state"] = LinearState(new(1, 2, 32, 24), new(1, 2, 32).abs())
    if more.pop("branch", False):
        more["other"] = Branch(new(1, 100, 2, 24), new(1, 100, 2).abs())
    return heads | maps | more


ALL = {"started": True, "branch": True}


@pytest.mark.parametrize(("case", "splits", "passes"), [({}, 1, 1), (ALL, 2, 1), ({}, 2, 2), (ALL, 1, 2)], ids=str)
def test_what_nobody_reads_changes_nothing(
    case: dict[str, Any], splits: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: with gradients, without, without an end state, and in the dispatcher."""
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    monkeypatch.setattr(launch, "ONE_SIGN_FROM", 128 if passes == 1 else 16)
    if splits == 2:
        monkeypatch.setattr(launch, "SPLIT_UNIT", 64)
        monkeypatch.setattr(launch, "MIN_SPLIT", 64)
    given = inputs(**case)
    plain, end = hedgehog_attention(**given)
    bare, _ = hedgehog_attention(**given, last=True)
    assert torch.equal(bare, plain)
    given["q_BTHK"].requires_grad_()
    gradients = []
    for how in (nullcontext(), Passing()):
        with how:
            y, after = hedgehog_attention(**given)
        assert torch.equal(y, plain)
        assert all(torch.equal(left, right) for left, right in zip(after, end, strict=True))
        gradients.append(torch.autograd.grad(y.square().sum(), given["q_BTHK"])[0])
    assert torch.equal(*gradients)


def test_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    q, k, v = (x.abs() for x in list(inputs().values())[:3])
    expected = linear_sums(q.clone().requires_grad_(), k, v)
    found = linear_sums(q, k, v)
    for left, right in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert torch.equal(left, right)


def test_rotary_takes_angles_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "triton")
    q, k, _ = list(inputs().values())[:3]
    angles = torch.rand(1, 100, 16, device=DEVICE)
    cos = angles.cos().requires_grad_()
    turned = rotary(q, k, cos, angles.sin())
    assert not any(x.requires_grad for x in turned)
    for left, right in zip(turned, rotary(q, k, cos.detach(), angles.sin()), strict=True):
        assert torch.equal(left, right)
