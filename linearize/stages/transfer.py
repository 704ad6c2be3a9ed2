"""Stage `transfer`: every student layer learns to answer like its teacher layer, given the teacher's own input.

One forward pass of the teacher; as each layer finishes, its student is run on the same heads, the loss goes backward at
once, and that layer's activations are gone before the next layer starts (arXiv 2402.04347, 2410.10254).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from linearize.attention import StudentAttention, full_precision, teacher_rows
from linearize.config import Number
from linearize.losses import attention_cross_entropy, output_mse, relative_error
from linearize.mixers import HeadInputs
from linearize.stages.base import Backward, Batch, StageConfig, run_trunk
from linearize.surgery import Graft


class TransferConfig(StageConfig):
    """Options of the transfer stage."""

    kind: Literal["transfer"] = "transfer"
    objective: dict[Literal["mse", "relative_mse", "attention_ce"], Number] = Field(
        {"relative_mse": 1.0}, description="weights of the terms, summed over layers"
    )

    @field_validator("objective")
    @classmethod
    def _some_weight(cls, objective: dict[str, float]) -> dict[str, float]:
        if not any(weight > 0 for weight in objective.values()) or min(objective.values()) < 0:
            raise ValueError("needs at least one positive weight and no negative one")
        return objective


class Transfer:
    """Trains the mixers alone, layer by layer; the loss is the mean over layers."""

    name = "transfer"

    def __init__(self, config: TransferConfig, graft: Graft) -> None:
        self.config, self.graft = config, graft

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return self.graft.mixer_parameters()

    def train_micro_batch(self, batch: Batch, backward: Backward) -> Mapping[str, Tensor]:
        losses: list[Tensor] = []
        errors: dict[str, Tensor] = {}
        layers = len(self.graft.students)

        def observe(student: StudentAttention, heads: HeadInputs, teacher_BTHV: Tensor) -> None:
            with torch.enable_grad():
                loss, error = self._layer_loss(student, heads, teacher_BTHV)
                backward(loss / layers)
            losses.append(loss.detach())
            errors[f"error/layer_{student.layer_idx:02d}"] = error.detach()

        students = self.graft.students.values()
        try:
            for student in students:
                student.observer = observe
            with torch.no_grad(), self.graft.as_teacher():
                run_trunk(self.graft, batch)
        finally:
            for student in students:
                student.observer = None
        mean_error = torch.stack(list(errors.values())).mean()
        return {"loss": torch.stack(losses).mean(), "error": mean_error, **errors}

    def _layer_loss(self, student: StudentAttention, heads: HeadInputs, teacher_BTHV: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's objective, and its relative error for the log."""
        weights = self.config.objective
        loss = torch.zeros((), device=teacher_BTHV.device)
        mixed_BTHV, _ = student.mix(heads)
        error = relative_error(mixed_BTHV, teacher_BTHV)
        if weights.get("mse"):
            loss = loss + weights["mse"] * output_mse(mixed_BTHV, teacher_BTHV)
        if weights.get("relative_mse"):
            loss = loss + weights["relative_mse"] * error
        if weights.get("attention_ce"):
            with full_precision(teacher_BTHV.device):
                teacher = teacher_rows(heads, student.shapes.scaling)
                rows = attention_cross_entropy(teacher, student.mixer.row_weights(heads), teacher_BTHV.shape[1])
            loss = loss + weights["attention_ce"] * rows
        return loss, error
