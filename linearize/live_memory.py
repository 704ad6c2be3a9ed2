"""How many bytes of tensors live at one time: what CUDA's allocator would count, on any device, `meta` included."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
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

    def __enter__(self) -> "LiveMemory":
        # FSDP2 frees and refills what it gathers by resizing its storages, which no dispatch mode is told of
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            self._follow_resized(storage)
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment,method-assign]
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

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
        self._add(key, storage.nbytes())
        weakref.finalize(storage, self._forget, key)

    def _follow_resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            self._forget(storage._cdata)
            self._add(storage._cdata, storage.nbytes())

    def _add(self, key: int, nbytes: int) -> None:
        size, span = -(-nbytes // BLOCK) * BLOCK, self._spans[-1]
        self._sizes[key] = size, span
        self._by_span[span] += size
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.live > sum(self.at_peak.get(span, {"": 0}).values()):
            self.at_peak[span] = dict(self._by_span)

    def _forget(self, key: int) -> None:
        size, span = self._sizes.pop(key)
        self.live -= size
        self._by_span[span] -= size
