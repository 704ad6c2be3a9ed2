"""Stage `distil`: the whole student learns to predict like its teacher, through LoRA and its mixers.

The teacher is the same model with its softmax back and its adapters off: one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from linearize.adapters import LoraSettings, add_lora, lora_layers, lora_off, lora_parameters
from linearize.config import Number
from linearize.losses import DistillationWeights, distillation_loss
from linearize.stages.base import Backward, Batch, StageConfig, run_trunk
from linearize.surgery import Graft


class DistilConfig(StageConfig):
    """Options of the distillation stage."""

    kind: Literal["distil"] = "distil"
    kl: Number = Field(1.0, ge=0, description="weight of KL(teacher || student)")
    ce: Number = Field(0.0, ge=0, description="weight of the next-token cross-entropy")
    temperature: Number = Field(1.0, gt=0)
    lora: LoraSettings | None = LoraSettings()
    train_mixers: bool = Field(True, description="train the mixers beside the adapters")

    @model_validator(mode="after")
    def _something_to_do(self) -> "DistilConfig":
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0: there is nothing to learn from")
        if self.lora is None and not self.train_mixers:
            raise ValueError("lora is null and train_mixers is false: there is nothing to train")
        return self


class Distil:
    """Trains LoRA adapters, and the mixers if asked, end to end."""

    name = "distil"

    def __init__(self, config: DistilConfig, graft: Graft) -> None:
        self.config, self.graft = config, graft
        self.weights = DistillationWeights(config.kl, config.ce, config.temperature)
        if config.lora is not None:
            add_lora(graft.model, config.lora)
            for layer in lora_layers(graft.model):
                cast(nn.Module, layer).train()  # its dropout; the rest of the model stays in eval mode

    def trainable(self) -> Mapping[str, nn.Parameter]:
        mixers = self.graft.mixer_parameters() if self.config.train_mixers else {}
        return {**mixers, **(lora_parameters(self.graft.model) if self.config.lora is not None else {})}

    def train_micro_batch(self, batch: Batch, backward: Backward) -> Mapping[str, Tensor]:
        with torch.no_grad(), lora_off(self.graft.model), self.graft.as_teacher():
            teacher_BTD = run_trunk(self.graft, batch)
        student_BTD = run_trunk(self.graft, batch)
        head = self.graft.model.get_output_embeddings()
        assert head is not None
        terms = distillation_loss(
            student_BTD.flatten(0, 1),
            teacher_BTD.flatten(0, 1),
            head,
            batch.input_ids_BT.roll(-1, dims=1).flatten(),
            batch.target_mask_BT.flatten(),
            self.weights,
        )
        backward(terms.loss)
        return {"loss": terms.loss.detach(), "kl": terms.kl, "ce": terms.cross_entropy}
