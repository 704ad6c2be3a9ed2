"""Small grafts for tests of stages: with moved weights, with adapters, and with a mixer that equals its teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.adapters import lora_parameters
from linearize.attention import teacher_rows
from linearize.mixers import HeadInputs, HeadShapes, MixerConfig, MixerState, StudentMixer
from linearize.mixers.base import RowWeights
from linearize.mixers.hedgehog import HedgehogConfig
from linearize.modeling import STUDENT_CLASSES, student_config
from linearize.stages import Batch, Stage
from linearize.surgery import Graft, KeepSoftmax, graft, plan_surgery, with_frozen_teacher

MakeTeacher = Callable[..., PreTrainedModel]


def grafted_from(make_teacher: MakeTeacher, keep: KeepSoftmax = "none", **overrides: Any) -> Graft:
    """With mixers moved off their start; not so those of the frozen teacher, which nothing reads."""
    model = make_teacher(**overrides)
    grafted = graft(model, plan_surgery(model, HedgehogConfig(), keep))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in grafted.mixer_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.requires_grad_(False)
    return grafted


def with_moved_weights(grafted: Graft) -> Graft:
    """With a frozen teacher, and base weights that have left it: as after a stage that trained them."""
    grafted = with_frozen_teacher(grafted)
    ours = {*grafted.mixer_parameters(), *lora_parameters(grafted.model)}
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in grafted.model.named_parameters():
            if name not in ours:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return grafted


def stir(model: PreTrainedModel) -> None:
    """Give the adapters an effect; they start as no change."""
    torch.manual_seed(4)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)


def as_exported(grafted: Graft, mixer: MixerConfig) -> PreTrainedModel:
    """The student class with a graft's weights."""
    model = STUDENT_CLASSES["llama"][1](student_config(grafted.model.config, mixer, tuple(grafted.students)))
    model.load_state_dict(grafted.model.state_dict())
    return model.eval()


def run(stage: Stage, batch: Batch, model: PreTrainedModel) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One micro-batch as `fit` runs it: metrics, and every gradient in the model."""
    model.requires_grad_(False)
    for parameter in stage.trainable().values():
        parameter.requires_grad_(True)
    metrics = stage.train_micro_batch(batch, lambda loss: loss.backward())
    assert not any(value.requires_grad for value in metrics.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in metrics.items()}, gradients


class TwinConfig(MixerConfig):
    kind: Literal["twin"] = "twin"


class Twin(StudentMixer):
    """Mixes with the teacher's own attention matrix, plus `off`."""

    rows = "matrix"

    def __init__(self, config: TwinConfig, shapes: HeadShapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.off = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.off)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        return 0

    def row_weights(self, heads: HeadInputs) -> RowWeights:
        rows = teacher_rows(heads, self.shapes)
        return lambda start, stop: rows(start, stop) + self.off

    def forward(self, heads: HeadInputs, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        weight_BHTT = self.row_weights(heads)(0, heads.q_BTHK.shape[1])
        v_BTHV = heads.v_BTGV.repeat_interleave(heads.q_BTHK.shape[2] // heads.v_BTGV.shape[2], 2)
        return torch.einsum("bhij,bjhv->bihv", weight_BHTT, v_BTHV), ()
