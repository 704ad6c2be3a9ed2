"""How many bytes of tensors live at one time: what CUDA's allocator would count, on any device, `meta` included."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.spans import PREFIX

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
        at_peak: of each span (`spans.py`, "" outside) the bytes that were live at its own peak, by the span that made
            them.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), device_type: str | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device_type = device_type
        self.at_peak: dict[str, dict[str, int]] = {}
        self._spans: list[str] = [""]
        self._by_span: Counter[str] = Counter()
        self._sizes: dict[int, tuple[int, str]] = {}
        for tensor in tensors:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "profiler::_record_function_enter_new":
            self._spans.append(args[0].removeprefix(PREFIX) if args[0].startswith(PREFIX) else self._spans[-1])
        elif name.startswith("profiler::_record_function_exit"):
            self._spans.pop()
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = func(*args, **(kwargs or {}))
        for output in tree_leaves(found):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in inputs:
                self._follow(output)
        return found

    def _follow(self, tensor: Tensor) -> None:
        if self._device_type is not None and tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        span = self._spans[-1]
        self._sizes[key] = size, span
        self._by_span[span] += size
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.live > sum(self.at_peak.get(span, {"": 0}).values()):
            self.at_peak[span] = dict(self._by_span)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, span = self._sizes.pop(key)
        self.live -= size
        self._by_span[span] -= size
