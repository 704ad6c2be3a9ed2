"""Frozen weights of decoder layers in host memory; on the device are those of the layer that computes and the next one.

A layer's weights lie in one pinned buffer and come in one copy on a stream of their own, while the layer before
computes. The backward pass needs them once more: a layer is recomputed there (`recompute`), which fetches it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linearize.surgery import WeightStream, decoder_layers

ALIGNMENT = 256
"""Bytes at whose multiples a weight begins within its buffer, as the allocator of CUDA has it."""


class _Host:
    """The frozen weights of one layer: their parameters, one host buffer, and where each lies in it."""

    def __init__(self, layer: nn.Module, pin: bool) -> None:
        self.parameters = [p for p in layer.parameters() if not p.requires_grad]
        ends, end = [], 0
        for parameter in self.parameters:
            ends.append(end)
            end += -(-parameter.numel() * parameter.element_size() // ALIGNMENT) * ALIGNMENT
        self.places, self.size = ends, end
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        self.shapes = [(p.dtype, p.shape) for p in self.parameters]
        for parameter, view in zip(self.parameters, self.views(self.buffer), strict=True):
            view.copy_(parameter.data)
        self.point_to(self.buffer)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The weights within a copy of the buffer."""
        return [
            buffer[place : place + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for place, (dtype, shape) in zip(self.places, self.shapes, strict=True)
        ]

    def point_to(self, buffer: Tensor) -> None:
        """Make the parameters these weights; graphs that hold the parameters follow."""
        for parameter, view in zip(self.parameters, self.views(buffer), strict=True):
            parameter.data = view


class _Slot:
    """Room for one layer on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.filled = torch.cuda.Event() if device.type == "cuda" else None


class LayerStream:
    """Streams the frozen weights of a model's decoder layers. Parameters that train are left where they are.

    Args:
        model: all of whose other weights and buffers go to `device`.
        layers: its decoder layers.
        device: where layers compute.

    Attributes:
        copies: layers that were copied to the device so far.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device, self.copies = device, 0
        self._hosts = [_Host(layer, pin=on_gpu) for layer in layers]
        self._slots = [_Slot(max(host.size for host in self._hosts), device) for _ in range(min(2, len(layers)))]
        self._side = torch.cuda.Stream(device) if on_gpu else None
        self._last = -1
        streamed = {id(parameter) for host in self._hosts for parameter in host.parameters}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in streamed:
                    parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before, index)) for index, layer in enumerate(layers)
        ]

    @property
    def slot_bytes(self) -> int:
        """Of the device's memory that streamed layers take."""
        return sum(slot.buffer.numel() for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Of the host's memory, page-locked where the device is a GPU."""
        return sum(host.size for host in self._hosts)

    def fetch(self, index: int, down: bool = False) -> None:
        """Have layer `index` on the device for what is launched from now on, and begin to copy the one after it.

        That is the one below where a backward pass goes `down`. At most two layers are there; what was launched with
        the one that gives way is waited for, on the device.
        """
        self._last = index
        slot = self._fill(index, keep=index)
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        following = index - 1 if down else (index + 1) % len(self._hosts)
        if following >= 0 and len(self._slots) > 1:
            self._fill(following, keep=index)

    def close(self) -> None:
        """Give the device's memory back: the weights stay in the host's."""
        for handle in self._handles:
            handle.remove()
        for slot in self._slots:
            self._empty(slot)
        self._slots.clear()

    def _before(self, index: int, *_: Any) -> None:
        """Before a layer's forward, and in older transformers before it is recomputed, where it has been fetched."""
        if index != self._last:
            self.fetch(index)

    def _fill(self, index: int, keep: int) -> _Slot:
        """The slot that holds layer `index`, after a copy into one that does not hold `keep` where none does."""
        for slot in self._slots:
            if slot.layer == index:
                return slot
        slot = next(slot for slot in self._slots if slot.layer is None or slot.layer != keep)
        self._empty(slot)
        host = self._hosts[index]
        if self._side is None or slot.filled is None:
            slot.buffer[: host.size].copy_(host.buffer)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self.device))  # it may still read what lies there
            with torch.cuda.stream(self._side):
                slot.buffer[: host.size].copy_(host.buffer, non_blocking=True)
            slot.filled.record(self._side)
        slot.layer, self.copies = index, self.copies + 1
        host.point_to(slot.buffer)
        return slot

    def _empty(self, slot: _Slot) -> None:
        if slot.layer is not None:
            host = self._hosts[slot.layer]
            host.point_to(host.buffer)
        slot.layer = None


def stream_layers(model: PreTrainedModel, device: torch.device) -> LayerStream:
    """Stream a frozen model's decoder layers to `device`, from before surgery on; all else moves there."""
    return LayerStream(model, list(decoder_layers(model)), device)


@contextmanager
def recompute(layers: Sequence[nn.Module], stream: WeightStream | None = None) -> Iterator[None]:
    """Inside, forward passes keep only the input of each decoder layer; the backward pass computes the rest again.

    It is transformers' own gradient checkpointing, which wants its layers in train mode: nothing in a decoder layer but
    its attention's and its adapters' dropout heeds that, and those are modules with a mode of their own.
    """
    before = [layer.training for layer in layers]
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = partial(_run_twice, index, stream)  # type: ignore[assignment]
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.gradient_checkpointing = False  # type: ignore[assignment]
            layer.training = training
            del layer._gradient_checkpointing_func


def _run_twice(index: int, stream: WeightStream | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a layer's forward now and again in the backward pass, for which its weights are fetched once more."""
    runs = 0

    def run(*given: Any) -> Any:
        nonlocal runs
        runs += 1
        if stream is not None and runs > 1:
            stream.fetch(index, down=True)
        return function(*given)

    return checkpoint(run, *arguments, use_reentrant=False)
