"""Micro-batches made ahead of their use, in a thread beside the training loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import torch

from linearize.stages.base import Batch


class Numbered(Protocol):
    """Micro-batches by number; asking twice gives the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class MadeAhead:
    """The same micro-batches by number; while one is used, a thread makes the next `ahead` of them.

    Cutting rows and pinning their memory then costs the loop nothing. Which micro-batch a number means does not change.
    Use as a context manager, or call `close`.

    Args:
        stride: from the number of one micro-batch that will be asked for to the next.
        finish: what to do to each, in the thread.
    """

    def __init__(
        self,
        batches: Numbered,
        device: torch.device,
        stride: int = 1,
        ahead: int = 2,
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._batches, self._stride, self._ahead, self._finish = batches, stride, ahead, finish
        self._made: dict[int, Future[Batch]] = {}
        self._pool = ThreadPoolExecutor(1, "batches", _begin_thread, (device,))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index`; what making it raised, if it failed."""
        last = index + self._ahead * self._stride
        wanted = {index, *range(index, min(last + 1, len(self)), self._stride)}
        for other in self._made.keys() - wanted:
            self._made.pop(other).cancel()
        for near in sorted(wanted - self._made.keys()):
            self._made[near] = self._pool.submit(self._make, near)
        return self._made.pop(index).result()

    def _make(self, number: int) -> Batch:
        batch = self._batches[number]
        return batch if self._finish is None else self._finish(batch)

    def __enter__(self) -> "MadeAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread, after the micro-batch it is at."""
        self._pool.shutdown(cancel_futures=True)


def _begin_thread(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinning in a new thread would open device 0
