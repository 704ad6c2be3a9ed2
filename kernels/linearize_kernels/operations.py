"""Operations for torch's dispatcher: opaque to torch.compile, without a graph break, and cheap to call.

`torch.library.custom_op` checks every call's outputs for aliases, which costs more host time than the launches here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))
"""Kinds of arguments behind which nobody else's code stands."""

_library = torch.library.Library("linearize", "FRAGMENT")
_functions: dict[str, Callable[..., Any]] = {}
_differentiable: dict[str, Callable[..., Any]] = {}


def operation(
    name: str,
    fake: Callable[..., Any],
    mutates_args: Sequence[str] = (),
    alone: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as torch.ops.linearize.<name>; `fake` returns empty outputs of the right shapes.

    Outputs must not share memory with inputs. Calls that nobody traces go past the dispatcher, which takes longer than
    a small kernel; those that nobody differentiates either, to `alone` where it is given: it may return None for what
    only the backward pass reads.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema)
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"linearize::{name}", fake, lib=_library)
        _functions[name] = function
        dispatched: Callable[..., Any] = getattr(torch.ops.linearize, name).default

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or _traced(arguments):
                return dispatched(*arguments)
            if _differentiated(arguments):
                return _differentiable.get(name, dispatched)(*arguments)
            return (alone or function)(*arguments)

        return call

    return register


def _traced(arguments: tuple[Any, ...]) -> bool:
    """Whether a mode or a kind of argument of somebody else's has to see the call."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not PLAIN.issuperset(map(type, arguments))


def _differentiated(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operation its gradient, in torch's dispatcher and past it.

    The dispatcher looks up the default of every argument on each call, in time that grows with their number squared.
    """
    torch.library.register_autograd(f"linearize::{name}", backward, setup_context=setup_context, lib=_library)
    function = _functions[name]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return backward(ctx, *upstream)

    _differentiable[name] = Differentiable.apply


def power(size: int) -> int:
    """What a tile of `size` columns is padded to."""
    return max(16, 1 << (size - 1).bit_length())
