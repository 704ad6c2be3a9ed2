"""Stage `distil`: the whole student learns to predict like its teacher, end to end.

The teacher is the same model with its softmax back and its adapters off: one copy of the weights. Where stages train
base weights, it is the frozen copy that was made before the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from linearize.adapters import LoraSettings, adapters_off, add_lora, check_projections, inputs_uncast, lora_layers
from linearize.config import Number
from linearize.errors import RecipeError, RunError
from linearize.families import ModelFamily
from linearize.logits import head_of
from linearize.losses import DistillationWeights, Heads, distillation_loss
from linearize.spans import span
from linearize.stages.base import Backward, Batch, OwnLayers, StageConfig, run_trunk, softmax_mask
from linearize.stages.course import SteadyCourse
from linearize.stages.parts import Part, trained_parameters
from linearize.streaming import recompute
from linearize.surgery import Graft
from linearize.topk import TopK, top_k, topk_distillation_loss

DEFAULT_PARTS: tuple[Part, ...] = ("mixer", "lora")


class DistilConfig(StageConfig):
    """Options of the distillation stage."""

    kind: Literal["distil"] = "distil"
    train: tuple[Part, ...] = Field(DEFAULT_PARTS, description="mixer, qkv, o, norms, lora, or all alone")
    kl: Number = Field(1.0, ge=0, description="weight of KL(teacher || student)")
    ce: Number = Field(0.0, ge=0, description="weight of the next-token cross-entropy")
    temperature: Number = Field(1.0, gt=0)
    top_k: int | None = Field(
        None, ge=1, description="learn from the teacher's k likeliest tokens and the rest as one; null = from all"
    )
    checkpoint_activations: bool | Literal["auto"] = Field(
        "auto", description="compute decoder layers again in the backward pass; auto: where layers are streamed"
    )
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

    @property
    def changes(self) -> str:
        recomputed = "activations are recomputed, and the random state is looked at for it"
        return recomputed if self.checkpoint_activations is True else ""

    def check_family(self, family: ModelFamily) -> None:
        targets = () if self.lora is None else self.lora.names_in(family)
        adapted = {target.removeprefix(f"{family.attention}.") for target in targets}
        parts = {"qkv": family.projections.names, "o": (family.output,)}
        for part, names in parts.items():
            both = [name for name in names if part in self.train and name in adapted]
            if both:
                raise RecipeError(
                    f"{part} trains the weights of {', '.join(both)}, which lora adapts in the same stage; a "
                    "projection trains by its weights or by an adapter, not by both",
                    place="train",
                    remedy=f"Take {part} out of train, or {', '.join(both)} out of lora.targets.",
                )

    def check_graft(self, graft: Graft) -> None:
        """Refuse what this stage cannot do with a grafted model.

        Raises:
            RecipeError: adapters for projections that the model does not have.
            RunError: streamed layers whose activations are to be kept.
        """
        if self.lora is not None and not lora_layers(graft.model):
            check_projections(graft.model, self.lora)
        if graft.stream is not None and self.checkpoint_activations is False:
            raise RunError(
                "streamed layers are not on the device when their gradients are computed, unless they are recomputed",
                place="checkpoint_activations: false",
                remedy="Leave it out of the stage, or do not stream layers.",
            )


class Distil:
    """Trains what `train` names, end to end."""

    name = "distil"

    def __init__(self, config: DistilConfig, graft: Graft) -> None:
        self.config, self.graft, self.course = config, graft, SteadyCourse()
        self.weights = DistillationWeights(config.kl, config.ce, config.temperature)
        config.check_graft(graft)
        if config.lora is not None:
            add_lora(graft.model, config.lora)
        self._adapted = lora_layers(graft.model)

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return trained_parameters(self.graft, self.config.train)

    def by_layer(self) -> Mapping[int, Mapping[str, nn.Parameter]]:
        return {}

    def take_layers(self, layers: Sequence[int], own_layers: OwnLayers) -> None:
        raise AssertionError("layers train together")

    def train_micro_batch(self, batch: Batch, backward: Backward) -> Mapping[str, Tensor]:
        mask_B1TT = softmax_mask(self.graft.model, batch)
        if self.config.top_k is not None and batch.teacher is None:
            batch = replace(batch, teacher=self._targets(batch, mask_B1TT))
        teacher_BTD = self._teacher_hidden(batch, mask_B1TT) if batch.teacher is None else None
        next_L, mask_L = batch.input_ids_BT.roll(-1, dims=1).flatten(), batch.target_mask_BT.flatten()
        with inputs_uncast(self._adapted, batch.input_ids_BT.device):  # until what is recomputed has been
            with span("student"), self._recompute():
                student_LD = run_trunk(self.graft.model, batch, mask_B1TT).flatten(0, 1)
            with span("loss"):
                if teacher_BTD is not None:
                    goal_LD = teacher_BTD.flatten(0, 1)
                    terms = distillation_loss(student_LD, goal_LD, self._heads(), next_L, mask_L, self.weights)
                else:
                    assert batch.teacher is not None
                    goal = batch.teacher.flat()
                    terms = topk_distillation_loss(student_LD, goal, self._heads(), next_L, mask_L, self.weights)
            with span("backward"):
                backward(terms.loss)
        return {"loss": terms.loss.detach(), "kl": terms.kl, "ce": terms.cross_entropy}

    def _recompute(self) -> AbstractContextManager[None]:
        """The student's pass keeps what its backward pass needs, or only the layers' inputs."""
        stream, asked = self.graft.stream, self.config.checkpoint_activations
        if asked is True or (asked == "auto" and stream is not None):
            return recompute(self.graft.decoder_layers, stream)
        return nullcontext()

    def targets(self, batch: Batch) -> TopK:
        """What the teacher makes of a micro-batch, as far as `top_k` keeps it.

        Raises:
            RecipeError: the vocabulary is smaller.
        """
        return self._targets(batch, softmax_mask(self.graft.model, batch))

    @torch.no_grad()
    def _targets(self, batch: Batch, mask_B1TT: Tensor | None) -> TopK:
        vocabulary: int = self.graft.model.config.vocab_size
        k = self.config.top_k
        assert k is not None
        if k > vocabulary:
            raise RecipeError(f"{k} is more than the vocabulary of {vocabulary} has", place="top_k")
        return top_k(self._teacher_hidden(batch, mask_B1TT), self._heads().teacher, k, self.config.temperature)

    @torch.no_grad()
    def _teacher_hidden(self, batch: Batch, mask_B1TT: Tensor | None) -> Tensor:
        with span("teacher"), adapters_off(self._adapted), self.graft.as_teacher() as teacher:
            return run_trunk(teacher, batch, mask_B1TT)

    def _heads(self) -> Heads:
        """Of student and teacher over the vocabulary; one and the same while base weights are frozen."""
        trained = self.graft.model.get_output_embeddings().parameters()
        student, teacher = head_of(self.graft.model), head_of(self.graft.observed.model)
        return Heads(student, teacher, tuple(p for p in trained if p.requires_grad))
