"""Operations for torch's dispatcher: opaque to torch.compile, without a graph break, and cheap to call.

`torch.library.custom_op` checks every call's outputs for aliases, which costs more host time than the launches here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_library = torch.library.Library("linearize", "FRAGMENT")


def operation(
    name: str, fake: Callable[..., Any], mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as torch.ops.linearize.<name>; `fake` returns empty outputs of the right shapes.

    Outputs must not share memory with inputs.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema)
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"linearize::{name}", fake, lib=_library)
        found: Callable[..., Any] = getattr(torch.ops.linearize, name).default
        return found

    return register


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operation its gradient."""
    torch.library.register_autograd(f"linearize::{name}", backward, setup_context=setup_context, lib=_library)


def power(size: int) -> int:
    """What a tile of `size` columns is padded to."""
    return max(16, 1 << (size - 1).bit_length())
