"""Micro-batches as CUDA graphs: recorded once, then replayed, so that a small model does not wait for Python.

A micro-batch is thousands of launches, and asking for one takes the host longer than a small model takes the GPU to do
it. All micro-batches of a stage are the same work on other numbers, so they are one graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from linearize.errors import RunError
from linearize.families import has_experts, rotations
from linearize.quantized import is_quantized
from linearize.stages.base import Batch, StageConfig
from linearize.surgery import Graft, sliding_layers

log = logging.getLogger(__name__)

Form = tuple[torch.Size | None, ...]
"""Shapes of a micro-batch's tensors; None for one that it does without."""

Work = Callable[[Batch], Mapping[str, Tensor]]
"""Adds the gradients of a batch on the device to its parameters' `.grad`; returns scalar metrics."""

RUNS_BEFORE = 2
"""Micro-batches that run as they are before one is recorded: kernels get compiled, and libraries choose theirs."""

ROOM = 1.5
"""Free memory that recording wants, in units of what a micro-batch takes: a graph keeps its own between its runs, and
what runs beside it, such as an evaluation, needs memory too."""

MASKED = 4096
"""Tokens up to which rows of one document get a mask like others, to be the same work, where softmax needs masks at all
(packed.py). Longer rows are launched as they come: a mask is T x T, and softmax's fastest kernels take none. On an H100
a graph of a SmolLM2-sized teacher, masked, took 14.6 ms for 4K tokens and 38.1 for 8K; launched without a mask it took
19.3 and 20.5.
"""

WATCHING = {"dynamic", "longrope"}
"""Rotary angles that depend on how far the positions go: transformers fetches the farthest one from the GPU (longrope:
in its older releases).
"""


def obstacle(config: StageConfig, graft: Graft) -> str:
    """Why a stage's micro-batches cannot be recorded; empty where they can."""
    model = graft.observed.model
    obstacles = {
        "layers are streamed": graft.stream is not None,
        "quantised weights are unpacked in ways of their own": is_quantized(model),
        "experts get as many tokens as the router says": has_experts(model.config),
        "transformers looks at positions on the host to mask them": model.config._attn_implementation != "sdpa"
        or bool(sliding_layers(model)),
        "transformers looks at positions on the host to turn them": bool(WATCHING & rotations(model.config)),
    }
    return config.changes or next((words for words, so in obstacles.items() if so), "")


class MicroBatches(Protocol):
    """Runs one micro-batch after another."""

    def begin_step(self) -> None:
        """The gradients of the step before are no longer needed."""
        ...

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        """Run a batch from the host; its metrics."""
        ...

    def close(self) -> None:
        """Give back what is held between micro-batches."""
        ...


class Launched:
    """Micro-batches launched operation by operation."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work, self._device = work, device

    def begin_step(self) -> None:
        pass

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        return self._work(batch.to(self._device))

    def close(self) -> None:
        pass


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch  # its inputs, read at every replay
    names: tuple[str, ...]
    metrics_N: Tensor


class Replayed:
    """Micro-batches replayed from a CUDA graph, once a few of the same shape have been launched.

    The numbers are those of `Launched`: the same kernels run in the same order, and random numbers follow the state of
    the generator; only where softmax needs masks, rows of one document get one too, up to a length, and other kernels
    of softmax round otherwise. Gradients add up in tensors that stay, since a graph knows addresses only.

    Args:
        work: looks at no number on the host, and does the same for all batches of one shape.
        parameters: what trains.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._work, self._parameters, self._device = work, parameters, device
        self._learning: list[nn.Parameter] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._launched: Counter[Form] = Counter()
        self._recordings: dict[Form, _Recording] = {}
        # one stream for all that is launched and recorded: autograd adds gradients up on the stream of their first use
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._full = False

    def begin_step(self) -> None:
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            alone = batch.segments_BT is None and batch.starts_S is None
            long = alone and batch.input_ids_BT.shape[1] > MASKED
            metrics = self._launch(batch) if long else self._replay_or_launch(_masked(batch) if alone else batch)
        before.wait_stream(self._stream)
        return metrics

    def close(self) -> None:
        self._recordings.clear()
        self._gradients.clear()
        torch._C._cuda_clearCublasWorkspaces()  # those of our stream: nobody else would use or free them

    def _replay_or_launch(self, batch: Batch) -> Mapping[str, Tensor]:
        """Replay it, where one of its shape was recorded or can be by now."""
        form = tuple(None if tensor is None else tensor.shape for tensor in _tensors(batch))
        if form not in self._recordings and self._launched[form] >= RUNS_BEFORE and self._has_room():
            self._recordings[form] = self._record(batch)
        if form in self._recordings:
            return _replay(self._recordings[form], batch)
        self._launched[form] += 1
        return self._launch(batch)

    def _launch(self, batch: Batch) -> Mapping[str, Tensor]:
        metrics = self._work(batch.to(self._device))
        self._learning = [parameter for parameter in self._parameters if parameter.grad is not None]
        return metrics

    def _has_room(self) -> bool:
        """Whether the graph's memory fits beside what else needs some; asked once, for it does not get better."""
        if not self._full:
            taken = torch.cuda.memory_allocated(self._device)
            needed = torch.cuda.max_memory_allocated(self._device) - taken
            free = torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device) - taken
            self._full = free < ROOM * needed
            if self._full:
                log.info("no CUDA graph: a micro-batch takes %.1f GiB, %.1f are free", needed / 2**30, free / 2**30)
        return not self._full

    def _record(self, batch: Batch) -> _Recording:
        """Record what `_work` does with a batch of this shape; nothing is computed yet."""
        for parameter in self._learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._gradients[parameter] = parameter.grad
        inputs = batch.to(self._device)
        graph = torch.cuda.CUDAGraph()
        # only this thread's mistakes end the recording: another one pins the memory of the next batches
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                metrics = self._work(inputs)
                metrics_N = torch.stack([value.float() for value in metrics.values()])
        except RuntimeError as error:  # CUDA is not to be trusted in this process any more
            # the end of a recording that failed fails too, and says only that it did
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise RunError(
                f"a micro-batch cannot be recorded as a CUDA graph: {str(cause).splitlines()[0]}.",
                remedy="Go on with the same command, `--resume` and `--no-graphs`.",
            ) from error
        log.info("recorded a CUDA graph of micro-batches %s", list(inputs.input_ids_BT.shape))
        return _Recording(graph, inputs, tuple(metrics), metrics_N)


def _replay(recording: _Recording, batch: Batch) -> Mapping[str, Tensor]:
    for place, values in zip(_tensors(recording.batch), _tensors(batch), strict=True):
        if place is not None and values is not None:
            place.copy_(values, non_blocking=True)
    recording.graph.replay()
    return dict(zip(recording.names, recording.metrics_N.clone().unbind(), strict=True))


def _masked(batch: Batch) -> Batch:
    """The batch with document numbers, where every row is one document too: one shape, and one way to mask, for all."""
    ids_BT = batch.input_ids_BT
    return replace(batch, segments_BT=torch.zeros_like(ids_BT, pin_memory=ids_BT.is_pinned()))


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return (
        batch.input_ids_BT,
        batch.position_ids_BT,
        batch.segments_BT,
        batch.target_mask_BT,
        batch.starts_S,
        *(batch.teacher or ()),
    )
