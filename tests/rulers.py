"""What several test files measure with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def segments(length: int) -> Tensor:
    """Row 0: documents of 1, 2, 27, 33, 1 and more tokens: several ends in one chunk, one on its end. Row 1: one."""
    first = torch.bucketize(torch.arange(length), torch.tensor([1, 3, 30, 63, 64, 130, 140]), right=True)
    return torch.stack([first, torch.zeros_like(first)])


def cut(tensors: list[Tensor], where: slice | Tensor, rows: slice = slice(None)) -> list[Tensor]:
    return [tensor[rows][:, where] for tensor in tensors]


def both_close(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    close(left[0], right[0], tolerance)
    close(left[1], right[1], tolerance)
