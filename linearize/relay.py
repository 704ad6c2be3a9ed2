"""Hidden states from process to process where they share a teacher's layers: each layer of it runs once, somewhere.

Process r runs the decoder layers from its first student layer to that of process r + 1, trains the student layers among
them, and hands the hidden states on. Nothing comes back: no layer's gradient reaches another layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearize.distributed import Processes
from linearize.stages.base import PassEnds


class Relay:
    """This process's place in the row.

    Args:
        parts: the student layers of every process, neighbours.
        step: micro-batches of a step, at whose end all processes meet.
    """

    def __init__(self, parts: Sequence[Sequence[int]], processes: Processes, step: int) -> None:
        rank = processes.rank
        self._first = parts[rank][0] if rank else 0
        self._final = rank == processes.count - 1
        self._stop = parts[rank][-1] + 1 if self._final else parts[rank + 1][0]
        self._rank, self._step = rank, step
        self._sent: list[tuple[Tensor, Any]] = []

    @contextmanager
    def own_layers(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, a pass through these decoder layers runs this process's alone, and ends with PassEnds behind them.

        Layers keep their place in the model: families read their numbers. Only what their forward does is replaced.
        """
        replaced: dict[nn.Module, Any] = dict.fromkeys(layers[: self._first], _pass_by)
        if self._first:
            replaced[layers[self._first - 1]] = self._receive
        if self._stop < len(layers):
            replaced[layers[self._stop]] = _end if self._final else self._hand_on
        for layer, forward in replaced.items():
            layer.forward = forward
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def _receive(self, hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        received_BTD = torch.empty_like(hidden_BTD)
        dist.recv(received_BTD, src=self._rank - 1)
        return received_BTD

    def _hand_on(self, hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden_BTD = hidden_BTD.contiguous()
        self._sent = [(kept, sending) for kept, sending in self._sent if not sending.is_completed()]
        while len(self._sent) >= self._step:  # of the step before, so taken by now: gloo does not notice until it waits
            self._sent.pop(0)[1].wait()
        self._sent.append((hidden_BTD, dist.isend(hidden_BTD, dst=self._rank + 1)))  # kept until it has left
        raise PassEnds


def _pass_by(hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_BTD


def _end(*_: Any, **__: Any) -> Tensor:
    raise PassEnds
