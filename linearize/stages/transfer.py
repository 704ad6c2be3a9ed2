"""Stage `transfer`: every student layer learns to answer like its teacher layer, given the teacher's own input.

One forward pass of the teacher; as each layer finishes, its student is run on the same input, the loss goes backward at
once, and that layer's activations are gone before the next layer starts (arXiv 2402.04347, 2410.10254).

Shape legend in mixers/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from linearize.attention import Observer, StudentAttention, full_precision, teacher_rows
from linearize.config import Number
from linearize.losses import attention_cross_entropy, hidden_distance, matrix_distance, output_mse, relative_error
from linearize.mixers import HeadInputs, StudentMixer
from linearize.spans import span
from linearize.stages.base import Backward, Batch, OwnLayers, PassEnds, StageConfig, run_trunk, softmax_mask
from linearize.stages.curriculum import TransferCourse, error_name, parameters_by_layer
from linearize.stages.forcing import StudentForcing
from linearize.stages.parts import Part, trained_parameters
from linearize.stages.watch import WatchConfig
from linearize.surgery import Graft

ObjectiveName = Literal["mse", "relative_mse", "attention_ce", "matrix", "hidden"]
Rows = Literal["normalised", "matrix", "none"]


@dataclass(frozen=True)
class LayerAnswers:
    """What a teacher layer and its student make of an input.

    Attributes:
        teacher: the layer in teacher mode; where base weights train, of the frozen copy.
        student: the layer that trains; where they do not, the same one.
        teacher_heads, student_heads: what their projections made of the input; the teacher's of its own, where its
            student's is drifted and the target is not.
        teacher_BTHV, student_BTHV: mixed values before the output projection.
        error: relative error of the student's.
    """

    teacher: StudentAttention
    student: StudentAttention
    teacher_heads: HeadInputs
    student_heads: HeadInputs
    teacher_BTHV: Tensor
    student_BTHV: Tensor
    error: Tensor


def _mse(layer: LayerAnswers) -> Tensor:
    return output_mse(layer.student_BTHV, layer.teacher_BTHV)


def _relative_mse(layer: LayerAnswers) -> Tensor:
    return layer.error


def _hidden(layer: LayerAnswers) -> Tensor:
    with torch.no_grad():
        teacher_BTD = layer.teacher.teacher_answer(layer.teacher_BTHV)
    return hidden_distance(layer.student.answer(layer.student_BTHV), teacher_BTD)


def _compare_rows(distance: Callable[..., Tensor]) -> Callable[[LayerAnswers], Tensor]:
    def compare(layer: LayerAnswers) -> Tensor:
        with full_precision(layer.teacher_BTHV.device):
            teacher = teacher_rows(layer.teacher_heads, layer.teacher.shapes)
            student = layer.student.mixer.row_weights(layer.student_heads)
            return distance(teacher, student, layer.teacher_BTHV.shape[1])

    return compare


class Objective(NamedTuple):
    """A term of the loss, and the mixers that have it, by what their `row_weights` give."""

    term: Callable[[LayerAnswers], Tensor]
    rows: frozenset[Rows] = frozenset({"normalised", "matrix", "none"})
    rule: str = ""


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "mse": Objective(_mse),
    "relative_mse": Objective(_relative_mse),
    "attention_ce": Objective(
        _compare_rows(attention_cross_entropy),
        frozenset({"normalised"}),
        "compares rows of attention weights that sum to 1",
    ),
    "matrix": Objective(
        _compare_rows(matrix_distance),
        frozenset({"normalised", "matrix"}),
        "compares the matrices that values are mixed with",
    ),
    "hidden": Objective(_hidden),
}


class TransferConfig(StageConfig):
    """Options of the transfer stage."""

    kind: Literal["transfer"] = "transfer"
    train: tuple[Part, ...] = Field(("mixer",), description="mixer, qkv, and o with the hidden objective")
    objective: dict[ObjectiveName, Number] = Field(
        {"relative_mse": 1.0}, description="weights of the terms, summed over layers"
    )
    student_forcing: StudentForcing | None = Field(None, description="inputs from student layers; null = off")
    watch: WatchConfig | None = Field(None, description="{every, stop, retry}: of each layer's error; null = off")

    @field_validator("train")
    @classmethod
    def _within_the_layer(cls, train: tuple[Part, ...]) -> tuple[Part, ...]:
        outside = [part for part in train if part not in ("mixer", "qkv", "o")]
        if outside:
            raise ValueError(
                f"transfer compares attention layers one by one and cannot train {', '.join(outside)}; it trains "
                "mixer, qkv and o, a distil stage the rest"
            )
        return train

    @field_validator("objective")
    @classmethod
    def _some_weight(cls, objective: dict[ObjectiveName, float]) -> dict[ObjectiveName, float]:
        if not any(weight > 0 for weight in objective.values()) or min(objective.values()) < 0:
            raise ValueError("needs at least one positive weight and no negative one")
        return objective

    @model_validator(mode="after")
    def _output_is_seen(self) -> "TransferConfig":
        if "o" in self.train and not self.objective.get("hidden"):
            raise ValueError(
                "train names o, but only the objective `hidden` sees what lies behind the output projection; give "
                "`hidden` a positive weight, or take o out of train"
            )
        return self

    @property
    def layers_train_alone(self) -> bool:
        """Not where layers see each other's answers, nor where one process judges them all."""
        return self.student_forcing is None and self.watch is None

    @property
    def changes(self) -> str:
        return "" if self.layers_train_alone else "student_forcing and watch change which layers do what"

    def misfits(self, mixer: type[StudentMixer]) -> dict[str, str]:
        fitting = [name for name, objective in OBJECTIVES.items() if mixer.rows in objective.rows]
        asked = [name for name, weight in self.objective.items() if weight > 0]
        wrong = [f"{name} {OBJECTIVES[name].rule}" for name in asked if name not in fitting]
        if not wrong:
            return {}
        return {"objective": f"{'; '.join(wrong)}; this mixer has none. It can have: {', '.join(fitting)}"}


class Goal(NamedTuple):
    """What a student layer is compared with: a teacher layer's heads, and its mixed values."""

    heads: HeadInputs
    mixed_BTHV: Tensor


def _all_layers(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    return nullcontext()


class Transfer:
    """Trains student layers one by one; the loss is the mean over the layers that still train."""

    name = "transfer"

    def __init__(self, config: TransferConfig, graft: Graft) -> None:
        self.config, self.graft = config, graft
        self.taken = frozenset(graft.students)
        self.own_layers: OwnLayers = _all_layers
        self.course = TransferCourse(config, parameters_by_layer(graft, self.trainable()))

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return trained_parameters(self.graft, self.config.train)

    def by_layer(self) -> Mapping[int, Mapping[str, nn.Parameter]]:
        return self.course.layers

    def take_layers(self, layers: Sequence[int], own_layers: OwnLayers) -> None:
        self.taken, self.own_layers = frozenset(layers), own_layers

    def train_micro_batch(self, batch: Batch, backward: Backward) -> Mapping[str, Tensor]:
        losses: list[Tensor] = []
        errors: dict[str, Tensor] = {}  # of each layer, by the name of its metric
        layers = len(self.graft.students)
        forced, clean = self.course.draw_forced(), self._clean_goals(batch)

        def observe(teacher: StudentAttention, heads: HeadInputs, teacher_BTHV: Tensor) -> Tensor | None:
            layer = teacher.layer_idx
            if layer in self.course.frozen:
                return self._student_answer(layer, heads) if layer in forced else None
            with torch.enable_grad():
                with span("student"):
                    answers = self._answers(teacher, heads, clean.get(layer, Goal(heads, teacher_BTHV)))
                with span("loss"):
                    loss = self._loss(answers)
                with span("backward"):
                    backward(loss / layers)
            losses.append(loss.detach())
            errors[error_name(layer)] = answers.error.detach()
            return answers.student.answer(answers.student_BTHV.detach()) if layer in forced else None

        self._run_teacher(batch, observe)
        error_N = torch.stack(list(errors.values()))
        by_layer = dict(zip(errors, error_N.unbind(), strict=True))
        # a part of the mean over all layers where processes share them, the mean over those that still train elsewhere
        count = layers if len(self.taken) < layers else len(errors)
        return {"loss": torch.stack(losses).sum() / count, "error": error_N.sum() / count, **by_layer}

    def _run_teacher(self, batch: Batch, observe: Observer) -> None:
        """One forward of the teacher, without gradients; `observe` is called in every student layer's place."""
        observed = [student for layer, student in self.graft.observed.students.items() if layer in self.taken]
        try:
            for teacher in observed:
                teacher.observer = observe
            own_layers = self.own_layers(self.graft.observed.decoder_layers)
            with suppress(PassEnds), own_layers, span("teacher"), torch.no_grad(), self.graft.as_teacher() as model:
                run_trunk(model, batch, softmax_mask(model, batch))
        finally:
            for teacher in observed:
                teacher.observer = None

    def _clean_goals(self, batch: Batch) -> dict[int, "Goal"]:
        """What each layer is to answer on the teacher's own input, where that is not the input it will see."""
        forcing, goals = self.config.student_forcing, dict[int, Goal]()
        if forcing is None or forcing.target != "clean" or self.course.share == 0:
            return goals

        def keep(teacher: StudentAttention, heads: HeadInputs, teacher_BTHV: Tensor) -> None:
            goals[teacher.layer_idx] = Goal(heads, teacher_BTHV)

        self._run_teacher(batch, keep)
        return goals

    def _student_answer(self, layer: int, heads: HeadInputs) -> Tensor:
        """[B, T, D] of a student layer that trains no more."""
        student = self.graft.students[layer]
        mixed_BTHV, _ = student.mix(heads if self.graft.teacher is None else student.project(heads))
        return student.answer(mixed_BTHV)

    def _answers(self, teacher: StudentAttention, heads: HeadInputs, goal: "Goal") -> LayerAnswers:
        """The student layer on the layer's input, through its own projections where they may differ."""
        student = self.graft.students[teacher.layer_idx]
        own = heads if student is teacher else student.project(heads)
        student_BTHV, _ = student.mix(own)
        error = relative_error(student_BTHV, goal.mixed_BTHV)
        return LayerAnswers(teacher, student, goal.heads, own, goal.mixed_BTHV, student_BTHV, error)

    def _loss(self, answers: LayerAnswers) -> Tensor:
        """The layer's objective."""
        first, *others = [
            weight * OBJECTIVES[name].term(answers) for name, weight in self.config.objective.items() if weight
        ]
        return sum(others, start=first)
