"""One greedy decoding step whose tensors stay where they are, for teacher and student alike, so that a CUDA graph can
hold it.

Shape legend: B batch, G key/value heads, N places of a cache, K and V widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from linearize.cache import StudentCacheLayer

WARM_STEPS = 3
"""Steps before the first that counts: kernels are built and tuned in them."""

PIECE = 4096
"""Tokens of context read at once before decoding: whole prompts would need more memory than the steps do."""


class RoomyLayer(CacheLayerMixin):
    """Keys and values of a softmax layer in memory taken once.

    A DynamicCache copies the whole past at every step; a StaticCache hides its unused places with a mask, for which
    attention leaves its fastest kernels and repeats keys and values for every query head. Here attention gets exactly
    the keys there are, and no mask: the strongest form of a teacher that decodes.
    """

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places, self.seen = places, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, groups, _, width = key_states.shape
        self.keys = key_states.new_empty(batch, groups, self.places, width)
        self.values = value_states.new_empty(batch, groups, self.places, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, G, T, K] and [B, G, T, V] behind what was seen, and return all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        stop = self.seen + key_states.shape[2]
        self.keys[:, :, self.seen : stop] = key_states
        self.values[:, :, self.seen : stop] = value_states
        self.seen = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1  # the name of get_max_length before transformers 5.20; remove when 5.20 is the oldest supported

    def token_bytes(self) -> int:
        """Of one token's keys and values, over the batch."""
        assert self.keys is not None
        assert self.values is not None
        return (self.keys.nbytes + self.values.nbytes) // self.places


def roomy_cache(model: PreTrainedModel, places: int) -> Cache:
    """An empty cache; student layers put their own layer in the place of theirs."""
    return Cache(layers=[RoomyLayer(places) for _ in range(model.config.num_hidden_layers)])


def state_bytes(cache: Cache) -> int:
    """Of all that the model keeps of the tokens it has read."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StudentCacheLayer):
            total += sum(tensor.nbytes for tensor in layer.state or ())
        elif isinstance(layer, RoomyLayer):
            total += layer.seen * layer.token_bytes()
    return total


@contextmanager
def rewind(cache: Cache) -> Iterator[None]:
    """Afterwards the cache stands where it stood."""
    students = [
        (layer, layer.state, layer.seen_tokens) for layer in cache.layers if isinstance(layer, StudentCacheLayer)
    ]
    rooms = [(layer, layer.seen) for layer in cache.layers if isinstance(layer, RoomyLayer)]
    try:
        yield
    finally:
        for student, state, seen in students:
            student.state, student.seen_tokens = state, seen
        for room, seen in rooms:
            room.seen = seen


@torch.no_grad()
def read_context(model: PreTrainedModel, cache: Cache, ids_BT: Tensor, piece: int = PIECE) -> None:
    """Fill the cache, piece by piece."""
    for ids_BP in ids_BT.split(piece, dim=1):
        model.base_model(ids_BP, past_key_values=cache, use_cache=True)


class Step:
    """Reads one token a row and writes the next in its place; called again it goes on.

    `replayable` makes it a step that a graph may hold: student states are copied back to where they were read, and
    softmax layers return to the place they started from, so that every replay adds a token to the same context.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, ids_B1: Tensor, *, replayable: bool) -> None:
        self.model, self.cache, self.token_B1, self.replayable = model, cache, ids_B1.clone(), replayable
        self.start: int = cache.get_seq_length()
        self.position_B1 = torch.full_like(ids_B1, self.start)

    @torch.no_grad()
    def __call__(self) -> None:
        held = [(layer, layer.state) for layer in self.cache.layers if isinstance(layer, StudentCacheLayer)]
        output = self.model(
            input_ids=self.token_B1,
            position_ids=self.position_B1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token_B1.copy_(output.logits[:, -1:].argmax(-1))
        self.position_B1.add_(1)
        if not self.replayable:
            return
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for layer, state in held:
            assert layer.state is not None
            assert state is not None
            for old, new in zip(state, layer.state, strict=True):
                if old is not new and old.numel():
                    olds, news = pairs.setdefault(old.dtype, ([], []))
                    olds.append(old)
                    news.append(new)
            layer.state, layer.seen_tokens = state, self.start
        for olds, news in pairs.values():
            torch._foreach_copy_(olds, news)  # one launch for all layers
        for roomy in self.cache.layers:
            if isinstance(roomy, RoomyLayer):
                roomy.seen = self.start


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """The step as a CUDA graph.

    Raises:
        RuntimeError: something in the step waits for the host.
    """
    assert step.replayable
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
