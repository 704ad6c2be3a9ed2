"""Plan first, then operate: `plan_surgery` looks and reports, `graft` is the only code that assigns into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from linearize.attention import StudentAttention, hand_padding_to_students, hand_to_attention
from linearize.config import Config
from linearize.errors import SurgeryError, UnknownFamilyError, unknown_name
from linearize.families import FAMILIES, NOT_TEXT, ModelFamily, family_of
from linearize.families.shapes import find_misfits, head_shapes, window_of
from linearize.mixers import HeadShapes, MixerConfig, build_mixer


class EveryNth(Config):
    """Keep softmax in layers 0, n, 2n, ...: the first of every n, the placement arXiv 2502.13145 found best."""

    every: int


KeepSoftmax = Literal["none"] | tuple[int, ...] | EveryNth


STUDENT_PREFIX = "linearized_"
"""In front of the teacher's `model_type` in the configuration of a student."""


def base_model_type(model: PreTrainedModel) -> str:
    """The teacher's `model_type`, also of a student."""
    return model.config.model_type.removeprefix(STUDENT_PREFIX)


@dataclass(frozen=True)
class Swap:
    """One layer whose softmax attention will be replaced."""

    layer: int
    path: str
    family: ModelFamily
    shapes: HeadShapes
    mixer: MixerConfig
    parameters: int  # that the mixer adds
    state_bytes: int  # of decoding state per sequence


class WeightStream(Protocol):
    """Brings the frozen weights of decoder layers to the device (`linearize.streaming`)."""

    def fetch(self, index: int, down: bool = False) -> None:
        """Have a layer's weights on the device, and the next one's on their way: that above, or that below."""

    def close(self) -> None:
        """Bring all of the model together in host memory."""


@dataclass(frozen=True)
class Graft:
    """A model with student layers.

    Attributes:
        model: the student; its base weights are the teacher's own, until a stage trains them.
        students: its student layers by number.
        teacher: a frozen graft of its own weights, where stages train base weights (`with_frozen_teacher`); None where
            `model` is the teacher when its students attend with softmax.
        raised: base weights that are fp32 for training, with the dtype they came in.
        stream: brings the frozen weights of decoder layers to the device; None where all are there.
    """

    model: PreTrainedModel
    students: dict[int, StudentAttention]
    teacher: "Graft | None" = None
    raised: dict[nn.Parameter, torch.dtype] = field(default_factory=dict)
    stream: WeightStream | None = None

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """All of them, student or not."""
        return list(decoder_layers(self.model))

    def hold(self, layer: int) -> None:
        """Have a layer's weights on the device, for who uses its parts without running it."""
        if self.stream is not None:
            self.stream.fetch(layer)

    def leave_device(self) -> None:
        """Bring a model whose layers are streamed together in host memory; any other stays where it is."""
        if self.stream is not None:
            self.stream.close()
            nn.Module.to(self.model, "cpu")

    @property
    def observed(self) -> "Graft":
        """The graft whose student layers attend as teacher inside `as_teacher`."""
        return self.teacher or self

    @contextmanager
    def as_teacher(self) -> Iterator[PreTrainedModel]:
        """Inside, the model that is yielded attends with the teacher's softmax.

        It is the grafted model itself, whose adapters are the caller's to switch off; or the frozen teacher.
        """
        students = self.observed.students.values()
        before = [student.mode for student in students]
        for student in students:
            student.mode = "teacher"
        try:
            yield self.observed.model
        finally:
            for student, mode in zip(students, before, strict=True):
                student.mode = mode

    def compile_mixers(self) -> None:
        """Compile every mixer for training; evaluation, decoding and checkpoints know nothing of it."""
        for student in self.students.values():
            student.compile_mixer()

    def raise_to_fp32(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make weights that will be trained fp32, in place: bf16 is too coarse for the steps AdamW takes."""
        for parameter in parameters:
            if parameter.dtype.itemsize < 4:
                self.raised[parameter] = parameter.dtype
                parameter.data = parameter.data.float()

    def restore_dtypes(self) -> None:
        """Round what `raise_to_fp32` raised to the dtype it came in."""
        for parameter, dtype in self.raised.items():
            parameter.data = parameter.data.to(dtype)
        self.raised.clear()

    def mixer_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that surgery added, by their names in the model."""
        ours = {id(parameter) for student in self.students.values() for parameter in student.mixer.parameters()}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in ours}


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The decoder without the language-model head."""
    return model.get_submodule(family_of(base_model_type(model)).trunk)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder, in order."""
    layers = model.get_submodule(family_of(base_model_type(model)).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def home_device(model: PreTrainedModel) -> torch.device:
    """Where a model computes; layers that are streamed lie elsewhere in between."""
    device = model.get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    return device


def with_frozen_teacher(grafted: Graft) -> Graft:
    """The graft with a frozen copy of itself as its teacher, for stages that train base weights.

    To be made right after `graft`, while the base weights still are the teacher's. It costs the memory of the weights
    once more; `linearize plan` says how much.
    """
    assert not grafted.raised
    model = copy.deepcopy(grafted.model).requires_grad_(False).eval()
    students = {module.layer_idx: module for module in model.modules() if isinstance(module, StudentAttention)}
    assert students.keys() == grafted.students.keys()
    return replace(grafted, teacher=Graft(model, students))


def layers_to_keep(keep: KeepSoftmax, layers: int) -> frozenset[int]:
    """The layer numbers that stay softmax.

    Raises:
        SurgeryError: for a layer number that the model does not have, or `every` below 2.
    """
    if keep == "none":
        return frozenset()
    if isinstance(keep, EveryNth):
        if keep.every < 2:
            raise SurgeryError(
                f"every: {keep.every} would keep every layer softmax",
                place="keep_softmax",
                remedy="Use 2 or more, or a list.",
            )
        return frozenset(range(0, layers, keep.every))
    assert isinstance(keep, tuple)
    wrong = [index for index in keep if not 0 <= index < layers]
    if wrong:
        raise SurgeryError(f"layers {wrong} do not exist; the model has layers 0 to {layers - 1}", place="keep_softmax")
    return frozenset(keep)


def sliding_layers(model: PreTrainedModel) -> dict[int, int]:
    """The layers whose softmax slides already, and their windows."""
    family = family_of(base_model_type(model))
    layers: int = model.config.num_hidden_layers
    windows = {layer: window_of(family, model.config, layer) for layer in range(layers)}
    return {layer: window for layer, window in windows.items() if window is not None}


def plan_surgery(
    model: PreTrainedModel,
    mixer: MixerConfig,
    keep_softmax: KeepSoftmax = "none",
    replace_sliding: bool = False,
) -> tuple[Swap, ...]:
    """What `graft` would do. Changes nothing.

    Args:
        model: a causal language model of a known family, not grafted yet.
        mixer: the student mixer for every replaced layer.
        keep_softmax: the layers that stay as they are.
        replace_sliding: also replace layers whose softmax slides over a window already; they stay otherwise.

    Raises:
        SurgeryError: listing every misfit of every layer; when all layers slide and so none would be replaced; for a
            student.
    """
    family = _family_in(model)
    if any(isinstance(module, StudentAttention) for module in model.modules()):
        raise SurgeryError(
            "the model is a student already",
            place=f"surgery on {family.model_type}",
            remedy="Convert its teacher: `model` in its metrics.json.",
        )
    layers = decoder_layers(model)
    keep = layers_to_keep(keep_softmax, len(layers))
    sliding = {} if replace_sliding else sliding_layers(model)
    swaps: list[Swap] = []
    misfits: list[str] = []
    for index, layer in enumerate(layers):
        if index in keep or index in sliding:
            continue
        attention = layer.get_submodule(family.attention)
        found = find_misfits(attention, family, model.config)
        misfits += [f"layer {index}: {reason}" for reason in found]
        if not found:
            shapes = head_shapes(attention, family, model.config)
            with torch.device("meta"):
                built = build_mixer(mixer, shapes)
            parameters = sum(parameter.numel() for parameter in built.parameters())
            path = f"{family.layers}.{index}.{family.attention}"
            swaps.append(Swap(index, path, family, shapes, mixer, parameters, built.state_bytes(model.dtype)))
    if misfits:
        raise SurgeryError(
            f"{len(misfits)} misfit(s): " + "; ".join(misfits),
            place=f"surgery on {family.model_type}",
            remedy="Nothing was changed. Keep such layers softmax with keep_softmax, or use another model.",
        )
    if not swaps and not keep.issuperset(range(len(layers))):
        raise SurgeryError(
            f"every layer that could be replaced slides over a window of {max(sliding.values()):,} tokens already, and "
            "such layers stay as they are",
            place=f"surgery on {family.model_type}",
            remedy="`replace_sliding: true` in the recipe replaces them too.",
        )
    return tuple(swaps)


def _family_in(model: PreTrainedModel) -> ModelFamily:
    """The family of a model that can be operated on.

    Raises:
        SurgeryError: for an encoder, which attends to what is not there yet; for an unknown family.
    """
    config = model.config
    crossed = config.to_dict().get("add_cross_attention", False)
    if config.is_encoder_decoder or crossed:
        raise SurgeryError(
            f"'{config.model_type}' attends to the states of an encoder; a decoder alone can be converted",
            place=f"surgery on {config.model_type}",
            remedy="Use a decoder-only language model.",
        )
    model_type = base_model_type(model)
    if model_type in FAMILIES or model_type in NOT_TEXT:
        return family_of(model_type)
    raise _unknown(model, model_type)


def _unknown(model: PreTrainedModel, model_type: str) -> UnknownFamilyError:
    """Says what is not understood, with a description found by looking into the model."""
    from linearize.families.inspection import propose  # here, so that it does not travel with checkpoints

    found = propose(model)
    unknown = ", ".join(found.unknown) or "nothing that its modules show"
    return UnknownFamilyError(
        f"{unknown_name('model family', model_type, FAMILIES)} Not understood in this one: {unknown}.",
        place="config.model_type",
        remedy="`linearize plan` prints a description found by looking into the model; it goes into one file in "
        "linearize/families/, and `linearize plan --audit` then checks it.",
        proposal=found.text,
    )


def graft(model: PreTrainedModel, plan: tuple[Swap, ...]) -> Graft:
    """Carry out a plan: put a StudentAttention, in student mode, in the place of each planned attention module.

    Mixers are made in fp32 where the model computes. An empty plan changes no output.
    """
    students: dict[int, StudentAttention] = {}
    for swap in plan:
        attention = model.get_submodule(swap.path)
        with torch.device(home_device(model)):
            mixer = build_mixer(swap.mixer, swap.shapes)
        student = StudentAttention(attention, mixer.float(), swap.family, swap.shapes)
        model.set_submodule(swap.path, student)
        students[swap.layer] = student
    if plan:
        trunk = model.get_submodule(plan[0].family.trunk)
        trunk.register_forward_pre_hook(hand_padding_to_students, with_kwargs=True)
    for swap in plan:
        if not swap.family.hands_on:
            layer = model.get_submodule(f"{swap.family.layers}.{swap.layer}")
            layer.register_forward_pre_hook(partial(hand_to_attention, swap.family.attention), with_kwargs=True)
    return Graft(model, students)
