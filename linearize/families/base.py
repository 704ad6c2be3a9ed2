"""Where attention lives in a Hugging Face model family, and what it does, as data.

Shape legend in mixers/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from linearize.mixers.base import HeadShapes

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Queries, keys and values have a projection each."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"

    @property
    def names(self) -> tuple[str, ...]:
        return self.query, self.key, self.value

    def rows(self, shapes: HeadShapes) -> tuple[int, ...]:
        """Rows that each projection has in a layer of these shapes."""
        keys, values = shapes.key_heads * shapes.key_width, shapes.key_heads * shapes.value_width
        return shapes.query_heads * shapes.key_width, keys, values

    def heads(self, projected: Sequence[Tensor], shapes: HeadShapes) -> Three:
        """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] of what the projections return."""
        q, k, v = projected
        tokens = q.shape[:-1]
        return (
            q.view(*tokens, shapes.query_heads, shapes.key_width),
            k.view(*tokens, shapes.key_heads, shapes.key_width),
            v.view(*tokens, shapes.key_heads, shapes.value_width),
        )


@dataclass(frozen=True)
class Fused:
    """One projection makes all three.

    `blocks`: all queries, then all keys, then all values. `heads`: query, key and value of the first head, then of the
    second, and so on; such a family has as many key heads as query heads.
    """

    name: str
    layout: Literal["blocks", "heads"]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def rows(self, shapes: HeadShapes) -> tuple[int, ...]:
        return (sum(Split().rows(shapes)),)

    def heads(self, projected: Sequence[Tensor], shapes: HeadShapes) -> Three:
        (fused,) = projected
        if self.layout == "blocks":
            return Split().heads(fused.split(Split().rows(shapes), dim=-1), shapes)
        q, k, v = fused.unflatten(-1, (shapes.query_heads, -1)).chunk(3, dim=-1)
        return q, k, v


NormOver = Literal["head", "projection", "each head"]
NORMS: dict[NormOver, Callable[[nn.Module, Tensor], Tensor]] = {
    "head": lambda norm, x_BTHK: norm(x_BTHK),
    "projection": lambda norm, x_BTHK: norm(x_BTHK.flatten(2)).unflatten(-1, x_BTHK.shape[2:]),
    "each head": lambda norm, x_BTHK: norm(x_BTHK.transpose(1, 2)).transpose(1, 2),
}
"""One norm that all heads share; one over all of them at once; a module with one norm for each head."""


@dataclass(frozen=True)
class QueryKeyNorm:
    """Queries and keys are normalised between their projection and RoPE.

    `switch` is the configuration field that puts the norms in; None = they are always there.
    """

    query: str = "q_norm"
    key: str = "k_norm"
    over: NormOver = "head"
    switch: str | None = None


@dataclass(frozen=True)
class Window:
    """Layers whose softmax slides: `size` is the configuration field of the window, None in it for no window.

    `layers`: all of them, or those that the configuration's `layer_types` calls `sliding_attention`.
    """

    layers: Literal["all", "layer_types"]
    size: str = "sliding_window"


@dataclass(frozen=True)
class ModelFamily:
    """One `model_type` of transformers. Paths are attribute paths in the module tree.

    Attributes:
        model_type: `config.model_type` of the teacher.
        config_class: name of the configuration class in transformers.
        causal_lm: name of the language-model class in transformers.
        examples: well-known checkpoints on the Hub.
        special: what sets its attention apart, for readers.
        trunk: path of the decoder without the head; `forward` of that module gets the 2-D padding mask.
        layers: path of the list of decoder layers.
        attention: path of the attention module inside a layer.
        projections: the projections of queries, keys and values, and how heads lie in what they return.
        output: name of the output projection.
        linear: the class of all these projections; Conv1D of GPT-2 keeps its weight transposed.
        norm: on queries and keys; None = the family has none.
        idle: submodules of attention that do nothing outside training.
        key_heads: configuration field of their number; None = as many as query heads.
        positions: `rotary` (RoPE, handed to attention as `position_embeddings`), or `learned`: added to the
            embeddings, so that attention knows nothing of them.
        rope_layers: configuration field with one entry a layer, 0 where it does not rotate; None = all do.
        soft_cap: configuration field c of a cap c tanh(score / c) on attention scores; None in it for no cap.
        window: which layers slide; None = the family has no sliding window.
        cache: the argument in which attention gets the cache.
        hands_on: whether a layer hands arguments that it does not know on to its attention.
        reads_layer_types: the trunk picks masks or RoPE by `config.layer_types`, so that a student keeps its teacher's.
        mlp: the dense projections outside attention that the LoRA target `mlp` stands for; experts are not among them.
    """

    model_type: str
    config_class: str
    causal_lm: str
    examples: tuple[str, ...]
    special: str
    trunk: str = "model"
    layers: str = "model.layers"
    attention: str = "self_attn"
    projections: Split | Fused = Split()
    output: str = "o_proj"
    linear: Literal["Linear", "Conv1D"] = "Linear"
    norm: QueryKeyNorm | None = None
    idle: tuple[str, ...] = ()
    key_heads: str | None = "num_key_value_heads"
    positions: Literal["rotary", "learned"] = "rotary"
    rope_layers: str | None = None
    soft_cap: str | None = None
    window: Window | None = None
    cache: str = "past_key_values"
    hands_on: bool = True
    reads_layer_types: bool = False
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    @property
    def submodules(self) -> tuple[str, ...]:
        """The names of all projections of an attention module."""
        return *self.projections.names, self.output

    @property
    def pieces(self) -> tuple[str, ...]:
        """Everything of an attention module that this description accounts for; anything else is a misfit."""
        norms = () if self.norm is None else (self.norm.query, self.norm.key)
        return *self.submodules, *norms, *self.idle

    @property
    def checked(self) -> tuple[str, ...]:
        """What is read or checked before surgery, in words: modules, then numbers of the configuration."""
        window = None if self.window is None else self.window.size
        numbers = (self.key_heads, self.rope_layers, self.soft_cap, window)
        return *(name for name in self.pieces if name not in self.idle), *(name for name in numbers if name is not None)
