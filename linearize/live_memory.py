"""How many bytes of tensors live at one time: what CUDA's allocator would count, on any device, `meta` included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""CUDA's allocator rounds every request up to a multiple of this."""


class LiveMemory(TorchDispatchMode):
    """Follows every storage that operations make inside the block, until it is freed.

    Storages that were there before count only if they are given. Work space within one operation is not seen.

    Args:
        tensors: what lives already.
        device_type: only storages of this kind of device count; None = all.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), device_type: str | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = func(*args, **(kwargs or {}))
        for output in tree_leaves(found):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in inputs:
                self._follow(output)
        return found

    def restart(self) -> None:
        """Begin a new peak at what lives now."""
        self.peak = self.live

    def _follow(self, tensor: Tensor) -> None:
        if self._device_type is not None and tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
