"""Plan first, then operate: `plan_surgery` looks and reports, `graft` is the only code that assigns into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from linearize.attention import StudentAttention, hand_padding_to_students
from linearize.config import Config
from linearize.errors import SurgeryError
from linearize.families import ModelFamily, family_of
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


@dataclass(frozen=True)
class Graft:
    """A model with student layers.

    Attributes:
        model: the student; its base weights are the teacher's own, until a stage trains them.
        students: its student layers by number.
        teacher: a frozen graft of its own weights, where stages train base weights (`with_frozen_teacher`); None where
            `model` is the teacher when its students attend with softmax.
        raised: base weights that are fp32 for training, with the dtype they came in.
    """

    model: PreTrainedModel
    students: dict[int, StudentAttention]
    teacher: "Graft | None" = None
    raised: dict[nn.Parameter, torch.dtype] = field(default_factory=dict)

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

    def layers(self) -> list[nn.Module]:
        """All decoder layers of the model, by number."""
        return list(self.model.get_submodule(family_of(base_model_type(self.model)).layers).children())

    def mixer_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that surgery added, by their names in the model."""
        ours = {id(parameter) for student in self.students.values() for parameter in student.mixer.parameters()}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in ours}


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The decoder without the language-model head."""
    return model.get_submodule(family_of(base_model_type(model)).trunk)


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


def head_shapes(attention: nn.Module, family: ModelFamily, config: object) -> HeadShapes:
    """Sizes read off the projections themselves: head_dim may differ from hidden / heads."""
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    key_heads: int = config.num_key_value_heads  # type: ignore[attr-defined]
    query, value = attention.get_submodule(family.query), attention.get_submodule(family.value)
    return HeadShapes(
        width=query.in_features,  # type: ignore[arg-type]
        query_heads=heads,
        key_heads=key_heads,
        key_width=query.out_features // heads,  # type: ignore[operator, arg-type]
        value_width=value.out_features // key_heads,  # type: ignore[operator, arg-type]
        scaling=attention.scaling,  # type: ignore[arg-type]
    )


def find_misfits(attention: nn.Module, family: ModelFamily, config: object) -> list[str]:
    """Every reason why a mixer cannot take this module's place; empty when it can."""
    names = {name for name, _ in attention.named_children()}
    missing = [name for name in (family.query, family.key, family.value, family.output) if name not in names]
    if missing:
        return [f"no projection {', '.join(missing)} (found: {', '.join(sorted(names)) or 'none'})"]
    misfits = [f"parameter {name} outside the projections" for name, _ in attention.named_parameters(recurse=False)]
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    key_heads: int = config.num_key_value_heads  # type: ignore[attr-defined]
    if heads % key_heads:
        misfits.append(f"{heads} query heads do not divide into {key_heads} key/value heads")
    for name, parts in ((family.query, heads), (family.key, key_heads), (family.value, key_heads)):
        rows: int = attention.get_submodule(name).out_features  # type: ignore[assignment]
        if rows % parts:
            misfits.append(f"{name} has {rows} rows, which {parts} heads do not divide")
    if family.window is not None:
        window = config.__dict__.get(family.window)
        if window is not None:
            misfits.append(f"attention already slides over a window of {window} tokens")
    return misfits


def plan_surgery(model: PreTrainedModel, mixer: MixerConfig, keep_softmax: KeepSoftmax = "none") -> tuple[Swap, ...]:
    """What `graft` would do. Changes nothing.

    Args:
        model: a causal language model of a known family, not grafted yet.
        mixer: the student mixer for every replaced layer.
        keep_softmax: the layers that stay as they are.

    Raises:
        SurgeryError: listing every misfit of every layer; or when nothing would be replaced.
    """
    family = family_of(base_model_type(model))
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    keep = layers_to_keep(keep_softmax, len(layers))
    swaps: list[Swap] = []
    misfits: list[str] = []
    for index, layer in enumerate(layers):
        if index in keep:
            continue
        attention = layer.get_submodule(family.attention)
        found = (
            ["already a student layer"]
            if isinstance(attention, StudentAttention)
            else (find_misfits(attention, family, model.config))
        )
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
    return tuple(swaps)


def graft(model: PreTrainedModel, plan: tuple[Swap, ...]) -> Graft:
    """Carry out a plan: put a StudentAttention, in student mode, in the place of each planned attention module.

    Mixers are made in fp32 on the device of the layer. An empty plan changes no output.
    """
    students: dict[int, StudentAttention] = {}
    for swap in plan:
        attention = model.get_submodule(swap.path)
        device = attention.get_submodule(swap.family.output).weight.device
        with torch.device(device):  # type: ignore[arg-type]
            mixer = build_mixer(swap.mixer, swap.shapes)
        student = StudentAttention(attention, mixer.float(), swap.family, swap.shapes)
        model.set_submodule(swap.path, student)
        students[swap.layer] = student
    if plan:
        trunk = model.get_submodule(plan[0].family.trunk)
        trunk.register_forward_pre_hook(hand_padding_to_students, with_kwargs=True)
    return Graft(model, students)
