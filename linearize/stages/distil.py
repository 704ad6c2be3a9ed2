"""Stage `distil`: the whole student learns to predict like its teacher, end to end.

The teacher is the same model with its softmax back and its adapters off: one copy of the weights. Where stages train
base weights, it is the frozen copy that was made before the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from linearize.adapters import LoraSettings, add_lora, lora_off
from linearize.config import Number
from linearize.errors import RecipeError
from linearize.families import ModelFamily
from linearize.losses import DistillationWeights, Heads, distillation_loss
from linearize.stages.base import Backward, Batch, OwnLayers, StageConfig, run_trunk
from linearize.stages.parts import Part, trained_parameters
from linearize.surgery import Graft

DEFAULT_PARTS: tuple[Part, ...] = ("mixer", "lora")


class DistilConfig(StageConfig):
    """Options of the distillation stage."""

    kind: Literal["distil"] = "distil"
    train: tuple[Part, ...] = Field(DEFAULT_PARTS, description="mixer, qkv, o, norms, lora, or all alone")
    kl: Number = Field(1.0, ge=0, description="weight of KL(teacher || student)")
    ce: Number = Field(0.0, ge=0, description="weight of the next-token cross-entropy")
    temperature: Number = Field(1.0, gt=0)
    lora: LoraSettings | None = Field(None, description="of the adapters; their defaults where `train` names lora")

    @model_validator(mode="before")
    @classmethod
    def _default_adapters(cls, values: Any) -> Any:
        """Adapters that train have settings; a dump of the configuration then says which."""
        if not isinstance(values, dict) or "lora" in values:
            return values
        train = values.get("train", DEFAULT_PARTS)
        return {**values, "lora": {}} if isinstance(train, (list, tuple)) and "lora" in train else values

    @model_validator(mode="after")
    def _something_to_do(self) -> "DistilConfig":
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0: there is nothing to learn from")
        if "lora" in self.train and self.lora is None:
            raise ValueError("train names lora, but lora is null; give its settings, or take lora out of train")
        if "lora" not in self.train and self.lora is not None:
            raise ValueError("lora has settings, but train does not name lora; add it to train, or make lora null")
        return self

    def check_family(self, family: ModelFamily) -> None:
        targets = () if self.lora is None else self.lora.targets
        parts = {"qkv": (family.query, family.key, family.value), "o": (family.output,)}
        for part, names in parts.items():
            both = [name for name in names if part in self.train and name in targets]
            if both:
                raise RecipeError(
                    f"{part} trains the weights of {', '.join(both)}, which lora adapts in the same stage; a "
                    "projection trains by its weights or by an adapter, not by both",
                    place="train",
                    remedy=f"Take {part} out of train, or {', '.join(both)} out of lora.targets.",
                )


class Distil:
    """Trains what `train` names, end to end."""

    name = "distil"

    def __init__(self, config: DistilConfig, graft: Graft) -> None:
        self.config, self.graft = config, graft
        self.weights = DistillationWeights(config.kl, config.ce, config.temperature)
        if config.lora is not None:
            add_lora(graft.model, config.lora)

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return trained_parameters(self.graft, self.config.train)

    def by_layer(self) -> Mapping[int, Mapping[str, nn.Parameter]]:
        return {}

    def take_layers(self, layers: Sequence[int], own_layers: OwnLayers) -> None:
        raise AssertionError("layers train together")

    def train_micro_batch(self, batch: Batch, backward: Backward) -> Mapping[str, Tensor]:
        with torch.no_grad(), lora_off(self.graft.model), self.graft.as_teacher() as teacher:
            teacher_BTD = run_trunk(teacher, batch)
        student_BTD = run_trunk(self.graft.model, batch)
        terms = distillation_loss(
            student_BTD.flatten(0, 1),
            teacher_BTD.flatten(0, 1),
            self._heads(),
            batch.input_ids_BT.roll(-1, dims=1).flatten(),
            batch.target_mask_BT.flatten(),
            self.weights,
        )
        backward(terms.loss)
        return {"loss": terms.loss.detach(), "kl": terms.kl, "ce": terms.cross_entropy}

    def _heads(self) -> Heads:
        """Of student and teacher over the vocabulary; one and the same while base weights are frozen."""
        student = self.graft.model.get_output_embeddings()
        teacher = self.graft.observed.model.get_output_embeddings()
        assert student is not None
        assert teacher is not None
        return Heads(student, teacher, tuple(p for p in student.parameters() if p.requires_grad))
