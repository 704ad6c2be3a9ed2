"""Decoding state of student layers, on transformers' own linear-attention cache layer.

Any growing `Cache` works: a student layer that meets an empty layer of another kind puts its own in its place, so
`generate`, beams and caches made by hand need no special class.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticLayer

from linearize.mixers.base import MixerState

NO_STATIC_CACHE = (
    "a linear-attention student cannot decode with a static cache, and needs none: its state does not grow; "
    "leave out cache_implementation='static', or use a DynamicCache"
)


class StudentCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """The state of one student layer: a few batch-first tensors of fixed size, and how many tokens they have read."""

    is_compileable = False  # the token count is a Python integer
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.state: MixerState | None = None
        self.seen_tokens = 0

    def write(self, state: MixerState, tokens: int) -> None:
        """Replace the state after `tokens` more tokens."""
        self.state = state
        self.seen_tokens += tokens
        self.is_initialized = True
        self.device, self.dtype = state[0].device, state[0].dtype  # type: ignore[assignment]

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a layer that keeps every key: softmax layers beside this one need the full mask."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1  # the name of get_max_length before transformers 5.20; remove when 5.20 is the oldest supported

    def reset(self) -> None:
        self.state, self.seen_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            self.state = tuple(tensor[indices.to(tensor.device)] for tensor in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = tuple(tensor.repeat_interleave(repeats, dim=0) for tensor in self.state)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("the state of a linear-attention student cannot be rolled back, as guessing ahead needs")

    def offload(self) -> None:
        """Nothing to do: the state is small and stays on its device."""

    def prefetch(self) -> None:
        """Nothing to do: the state never left."""

    def lazy_initialization(self, *_args: object) -> None:
        raise RuntimeError("a student layer keeps a mixer state, not keys and values")

    def update(self, *_args: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("a student layer keeps a mixer state, not keys and values")


def student_layer(cache: Cache, layer_idx: int) -> StudentCacheLayer:
    """The student's cache layer, put in the place of an empty layer when the cache was made for the teacher.

    Raises:
        RuntimeError: when that layer already holds keys and values: they cannot become a linear-attention state; and
            for a static cache, whose unused entries the softmax layers beside this one would then attend to
            (transformers masks them only where every layer can be compiled).
    """
    while len(cache.layers) <= layer_idx:  # a cache made without a config grows lazily
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, StudentCacheLayer):
        return layer
    if isinstance(layer, StaticLayer):
        raise RuntimeError(NO_STATIC_CACHE)
    if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() != 0:
        raise RuntimeError(
            f"layer {layer_idx} of this cache holds keys and values of softmax attention; a linear-attention "
            "student cannot continue from them: start from an empty cache"
        )
    ours = StudentCacheLayer()
    cache.layers[layer_idx] = ours
    return ours
