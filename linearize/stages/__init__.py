"""Training stages. One file each; this table is the only place that lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from linearize.adapters import LoraSettings, lora_layers, lora_parameters
from linearize.errors import LinearizeError, RecipeError
from linearize.families import family_of
from linearize.reach import last_position
from linearize.stages.base import Batch, Stage, StageConfig
from linearize.stages.distil import Distil, DistilConfig
from linearize.stages.transfer import Transfer, TransferConfig
from linearize.surgery import Graft, Swap, base_model_type

__all__ = [
    "STAGES",
    "Batch",
    "Stage",
    "StageConfig",
    "build_stage",
    "check_graft",
    "check_sizes",
    "check_stages",
    "refuse_base_training",
    "student_parameters",
]


class StageEntry(NamedTuple):
    """A stage's configuration class and the class that carries it out."""

    config: type[StageConfig]
    stage: Callable[..., Stage]


STAGES: dict[str, StageEntry] = {
    "transfer": StageEntry(TransferConfig, Transfer),
    "distil": StageEntry(DistilConfig, Distil),
}


def check_stages(stages: Sequence[StageConfig], plan: Sequence[Swap]) -> None:
    """Refuse stages that a planned surgery's family does not allow: before the first one is run.

    Raises:
        RecipeError: with the stage's number.
    """
    for index, config in enumerate(stages):
        for family in {swap.family.model_type: swap.family for swap in plan}.values():
            try:
                config.check_family(family)
            except RecipeError as error:
                place = f"stages.{index}.{error.place}"
                raise RecipeError(error.problem, place=place, remedy=error.remedy) from None


def check_sizes(stages: Sequence[StageConfig], model: PreTrainedModel) -> None:
    """Refuse what a model is too small for: rows beyond a table of positions, more targets than it has tokens.

    Raises:
        RecipeError: with the stage's number.
    """
    last = last_position(model.config)
    vocabulary: int = model.config.vocab_size
    for index, config in enumerate(stages):
        if last is not None and config.length > last:
            raise RecipeError(
                f"{config.length:,} tokens a row; the model has learned {last:,} positions and can read no more",
                place=f"stages.{index}.length",
                remedy=f"`--set stages.{index}.length={last}`, or less.",
            )
        if isinstance(config, DistilConfig) and config.top_k is not None and config.top_k > vocabulary:
            raise RecipeError(
                f"{config.top_k} is more than the vocabulary of {vocabulary} has", place=f"stages.{index}.top_k"
            )


def check_graft(stages: Sequence[StageConfig], graft: Graft) -> None:
    """Refuse what stages cannot do with a grafted model: before the first one trains, for a run cannot go on with
    another recipe.

    Raises:
        LinearizeError: with the stage's number.
    """
    family = family_of(base_model_type(graft.model))
    adapters: LoraSettings | None = None
    for index, config in enumerate(stages):
        if not isinstance(config, DistilConfig):
            continue
        try:
            config.check_graft(graft)
        except LinearizeError as error:
            raise type(error)(error.problem, place=f"stages.{index}.{error.place}", remedy=error.remedy) from None
        if config.lora is None:
            continue
        settings = config.lora.spelled_out(family)
        if adapters not in (None, settings):
            raise RecipeError(
                f"an earlier stage has other adapters: {adapters}",
                place=f"stages.{index}.lora",
                remedy="Stages share their adapters: give every stage the same lora, or null.",
            )
        adapters = settings


def refuse_base_training(stages: Sequence[StageConfig]) -> None:
    """Refuse stages that train weights of a quantised teacher: rounded to a grid, no step of an optimiser moves them.

    Raises:
        RecipeError: with the stage's number.
    """
    for index, config in enumerate(stages):
        if config.trains_base:
            raise RecipeError(
                f"{', '.join(config.train)} would train weights of the teacher, which --quantize rounds",
                place=f"stages.{index}.train",
                remedy="Train mixer and lora only, or leave --quantize out.",
            )


def build_stage(config: StageConfig, graft: Graft) -> Stage:
    """The stage that `config` describes, on a grafted model.

    Weights that it trains become fp32. Adapters drop out only in a stage that trains them; all else stays in eval mode.
    """
    assert graft.teacher is not None or not config.trains_base, "base weights train: see with_frozen_teacher"
    stage = STAGES[config.kind].stage(config, graft)
    graft.raise_to_fp32(stage.trainable().values())
    for layer in lora_layers(graft.model):
        cast(nn.Module, layer).train(not {"lora", "all"}.isdisjoint(config.train))
    return stage


def student_parameters(grafted: Graft, stages: Iterable[Stage]) -> dict[str, nn.Parameter]:
    """All in which a student differs from its teacher once these stages have begun: what checkpoints hold."""
    found = {**grafted.mixer_parameters(), **lora_parameters(grafted.model)}
    for stage in stages:
        found |= stage.trainable()
    return found
