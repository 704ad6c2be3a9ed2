"""StudentAttention: the teacher's projections and a mixer, in the call shape of Hugging Face attention.

Shape legend in mixers/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from linearize.cache import NO_STATIC_CACHE, student_layer
from linearize.families import ModelFamily
from linearize.families.base import NORMS
from linearize.mixers import HeadInputs, HeadShapes, MixerState, Rope, StudentMixer
from linearize.mixers.timeline import positions

Mix = Callable[[HeadInputs, MixerState | None], tuple[Tensor, MixerState]]

Observer = Callable[["StudentAttention", HeadInputs, Tensor], Tensor | None]
"""Called in teacher mode with the heads and the teacher's mixed values [B, T, H, V] before the output projection.

What it returns, [B, T, D], goes on to the layers above in place of the layer's answer; None leaves that as it is.
"""


class Given(NamedTuple):
    """What Hugging Face hands to an attention module, as far as a student reads it."""

    x_BTD: Tensor
    position_embeddings: tuple[Tensor, Tensor] | None
    padding_mask_BT: Tensor | None
    segments_BT: Tensor | None
    cache: Cache | None


class StudentAttention(nn.Module):
    """Takes a teacher's attention module's place; shares its projections, so checkpoint keys stay the teacher's.

    The teacher's module itself is kept, unregistered: in teacher mode it runs as it always did, on the same weights.
    An adapter that replaces a projection here (LoRA) is not seen by it.
    """

    def __init__(self, attention: nn.Module, mixer: StudentMixer, family: ModelFamily, shapes: HeadShapes) -> None:
        super().__init__()
        for name, child in attention.named_children():
            if name not in family.idle:
                self.add_module(name, child)
        self.mixer = mixer
        self.family, self.shapes = family, shapes
        found = family.norm is not None and family.norm.query in dict(attention.named_children())
        self._norm = family.norm if found else None  # `find_misfits` saw that it is there where it must be
        self.layer_idx: int = attention.layer_idx  # type: ignore[assignment]
        self.mode: Literal["student", "teacher"] = "student"
        self.observer: Observer | None = None
        self.handed: tuple[Tensor | None, Tensor | None] = (None, None)  # of layers that do not hand on arguments
        self._compiled: Mix | None = None
        self.train(attention.training)
        for idle in (attention, *(attention.get_submodule(name) for name in family.idle)):
            idle.training = False  # a teacher does not drop out; train() of the model no longer reaches it
        self._softmax = (attention,)  # a tuple hides it from nn.Module: its parameters are registered once

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as student or as teacher; the teacher gets HF's `arguments` as they came."""
        if not self.family.hands_on:
            padding_mask_BT, segments_BT = self.handed
        cache: Cache | None = arguments.get(self.family.cache)
        given = Given(hidden_states, arguments.get("position_embeddings"), padding_mask_BT, segments_BT, cache)
        if self.mode == "teacher":
            return self._attend_as_teacher(given, arguments)
        heads = self._heads(given, self._projected(hidden_states))
        layer = None if cache is None else student_layer(cache, self.layer_idx)
        mixed_BTHV, state = self.mix(heads, None if layer is None else layer.state)
        if layer is not None:
            layer.write(state, hidden_states.shape[1])
        return self.answer(mixed_BTHV), None

    def mix(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """The mixer in its own precision: autocast would round feature maps and running sums to bf16."""
        trains = state is None and torch.is_grad_enabled()  # decoding and evaluation see many shapes
        mixer: Mix = self._compiled if self._compiled is not None and trains else self.mixer
        device = heads.v_BTGV.device  # a context of autocast takes longer than many a launch
        with full_precision(device) if torch.is_autocast_enabled(device.type) else nullcontext():
            return mixer(heads, state)

    def compile_mixer(self) -> None:
        """Compile the mixer for training; the module tree and the keys of its weights stay as they are."""
        self._compiled = torch.compile(self.mixer.forward)

    def project(self, heads: HeadInputs) -> HeadInputs:
        """The heads that the projections of this very layer make of the same input `x_BTD`."""
        q_BTHK, k_BTGK, v_BTGV = self._split(self._projected(heads.x_BTD))
        return replace(heads, q_BTHK=q_BTHK, k_BTGK=k_BTGK, v_BTGV=v_BTGV)

    def answer(self, mixed_BTHV: Tensor) -> Tensor:
        """The layer's output [B, T, D]: mixed values through the output projection."""
        answer_BTD: Tensor = self._child(self.family.output)(mixed_BTHV.flatten(2))
        return answer_BTD

    def teacher_answer(self, mixed_BTHV: Tensor) -> Tensor:
        """The same through the output projection of the teacher's own module, which no adapter replaces."""
        answer_BTD: Tensor = self._softmax[0].get_submodule(self.family.output)(mixed_BTHV.flatten(2))
        return answer_BTD

    def _attend_as_teacher(self, given: Given, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run the teacher's own module; with an observer, show it the heads and the mixed values of this very run."""
        (softmax,) = self._softmax
        if self.observer is None:
            return softmax(given.x_BTD, **arguments)
        with _captured(softmax, self._projections(), self.family.output) as seen:
            result = softmax(given.x_BTD, **arguments)
        heads = self._heads(given, [seen[name] for name in self._projections()])
        mixed_BTHV = seen[self.family.output].unflatten(-1, (self.shapes.query_heads, self.shapes.value_width))
        instead_BTD = self.observer(self, heads, mixed_BTHV)
        return result if instead_BTD is None else (instead_BTD, *result[1:])

    def _projections(self) -> tuple[str, ...]:
        return self.family.projections.names

    def _projected(self, x_BTD: Tensor) -> list[Tensor]:
        return [self._child(name)(x_BTD) for name in self.family.projections.names]

    def _child(self, name: str) -> nn.Module:
        """Looked up on every call, as adapters and quantisation replace them; `get_submodule` walks paths, slowly."""
        child = self._modules[name]
        assert child is not None, name
        return child

    def _heads(self, given: Given, projections: list[Tensor]) -> HeadInputs:
        q_BTHK, k_BTGK, v_BTGV = self._split(projections)
        rope = given.position_embeddings if self.shapes.rotates else None
        mask_BT = given.padding_mask_BT
        return HeadInputs(
            x_BTD=given.x_BTD,
            q_BTHK=q_BTHK,
            k_BTGK=k_BTGK,
            v_BTGV=v_BTGV,
            rope=None if rope is None else Rope(*rope),
            mask_BT=None if mask_BT is None else mask_BT[:, -given.x_BTD.shape[1] :],
            segments_BT=given.segments_BT,
            last=given.cache is None,
        )

    def _split(self, projections: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the projections return, as heads; queries and keys normalised where the teacher does."""
        q_BTHK, k_BTGK, v_BTGV = self.family.projections.heads(projections, self.shapes)
        norm = self._norm
        if norm is not None:
            apply = NORMS[norm.over]
            q_BTHK = apply(self._child(norm.query), q_BTHK)
            k_BTGK = apply(self._child(norm.key), k_BTGK)
        return q_BTHK, k_BTGK, v_BTGV


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _captured(attention: nn.Module, inputs: tuple[str, ...], output: str) -> Iterator[dict[str, Tensor]]:
    """What the projections `inputs` return and what the projection `output` receives, during one forward."""
    seen: dict[str, Tensor] = {}

    def keep_result(name: str) -> Callable[..., None]:
        return lambda _module, _arguments, result: seen.__setitem__(name, result)

    def keep_argument(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[output] = arguments[0]

    handles = [attention.get_submodule(name).register_forward_hook(keep_result(name)) for name in inputs]
    handles.append(attention.get_submodule(output).register_forward_pre_hook(keep_argument))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hand_padding_to_students(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of the decoder: the one place where padding and packing reach student layers.

    Hugging Face turns the 2-D padding mask into a 4-D one, in a form that depends on the attention kernel. Student
    layers get the 2-D mask itself, and the document number of each token of packed rows (`segments_BT`), found from
    restarting `position_ids` by transformers' own rule (no mask, no cache). Softmax layers ignore both.

    Raises:
        ValueError: for a 4-D mask, which a linear-attention student cannot follow.
    """
    given = {**dict(zip(_parameters(type(trunk)), args, strict=False)), **kwargs}  # type: ignore[arg-type]
    mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    config, use_cache = trunk.config, given.get("use_cache")
    assert isinstance(config, PreTrainedConfig)
    cached = given.get("past_key_values") is not None or (config.use_cache if use_cache is None else use_cache)
    segments = given.get("segments_BT")
    if isinstance(mask, dict):  # `generate` made them
        raise RuntimeError(NO_STATIC_CACHE)
    if "segments_BT" in given and mask is not None and mask.ndim == 4:  # says the same, to softmax layers
        return (), {**given, "padding_mask_BT": None, "segments_BT": segments}
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions; a linear-attention student takes the 2-D padding mask "
            "[batch, tokens] only"
        )
    if segments is None and position_ids is not None and mask is None and not cached:
        segments = find_packed_sequence_indices(position_ids)
    return (), {**given, "padding_mask_BT": _padding(mask), "segments_BT": segments}


@cache
def _parameters(trunk: type[nn.Module]) -> tuple[str, ...]:
    """Of its `forward`, by position; reading a signature takes longer than a layer's Python."""
    return tuple(signature(trunk.forward).parameters)[1:]  # without self


def _padding(mask_BT: Tensor | None) -> Tensor | None:
    """A mask of real tokens; None where inference may ask the host, as transformers does, and all of them are."""
    if mask_BT is None or (not (torch.is_grad_enabled() or is_tracing(mask_BT)) and mask_BT.all()):
        return None
    return mask_BT.bool()


def hand_to_attention(path: str, layer: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a decoder layer that does not hand on arguments which it does not know.

    On the layer, not on the trunk: gradient checkpointing calls the layer again, with the same arguments.
    """
    student = layer.get_submodule(path)
    assert isinstance(student, StudentAttention)
    student.handed = kwargs["padding_mask_BT"], kwargs["segments_BT"]


def teacher_rows(heads: HeadInputs, shapes: HeadShapes) -> Callable[[int, int], Tensor]:
    """The teacher's softmax attention weights [B, H, stop - start, T] by query rows, recomputed in fp32."""
    groups = heads.q_BTHK.shape[2] // heads.k_BTGK.shape[2]
    q_BTHK, k_BTHK = heads.q_BTHK, heads.k_BTGK
    if heads.rope is not None:
        q_BTHK, k_BTHK = heads.rope.rotate(q_BTHK), heads.rope.rotate(k_BTHK)
    q_BTHK, k_BTHK = q_BTHK.float(), k_BTHK.float().repeat_interleave(groups, dim=2)
    position_BT = positions(heads)

    def rows(start: int, stop: int) -> Tensor:
        score_BHRT = torch.einsum("bihk,bjhk->bhij", q_BTHK[:, start:stop], k_BTHK) * shapes.scaling
        if shapes.soft_cap is not None:
            score_BHRT = (score_BHRT / shapes.soft_cap).tanh() * shapes.soft_cap
        seen = heads.seen(start, stop)
        if shapes.window is not None:
            near_BRT = position_BT[:, start:stop, None] - position_BT[:, None] < shapes.window
            seen = seen & near_BRT[:, None]
        return score_BHRT.masked_fill(~seen, float("-inf")).softmax(-1)

    return rows
