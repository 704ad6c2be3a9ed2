"""Operations for torch's dispatcher: opaque to torch.compile, without a graph break, and cheap to call.

`torch.library.custom_op` checks every call's outputs for aliases, which costs more host time than the launches here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("linearize", "FRAGMENT")


def operation(
    name: str, fake: Callable[..., Any], mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as torch.ops.linearize.<name>; `fake` returns empty outputs of the right shapes.

    Outputs must not share memory with inputs. Calls that nobody differentiates or traces go to the function itself:
    the dispatcher takes longer than a small kernel.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema)
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"linearize::{name}", fake, lib=_library)
        found: Callable[..., Any] = getattr(torch.ops.linearize, name).default

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (found if torch.compiler.is_compiling() or _observed(arguments) else function)(*arguments)

        return call

    return register


def _observed(arguments: tuple[Any, ...]) -> bool:
    """Whether a gradient is wanted, or a mode or a kind of tensor of somebody else's has to see the call."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    wanted = torch.is_grad_enabled()
    for x in arguments:  # noqa: SIM110  on every call's path, and a generator takes longer
        if isinstance(x, Tensor) and ((wanted and x.requires_grad) or type(x) not in PLAIN):
            return True
    return False


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operation its gradient."""
    torch.library.register_autograd(f"linearize::{name}", backward, setup_context=setup_context, lib=_library)


def power(size: int) -> int:
    """What a tile of `size` columns is padded to."""
    return max(16, 1 << (size - 1).bit_length())
