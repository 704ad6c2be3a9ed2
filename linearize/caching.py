"""Cached teacher targets of a conversion: which stages read them, and what ties them to their teacher and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel

from linearize.errors import RecipeError
from linearize.packed import softmax_by_document, with_starts
from linearize.recipe import Recipe
from linearize.stages import Batch, Stage, StageConfig
from linearize.stages.distil import Distil, DistilConfig
from linearize.target_cache import (
    TargetKey,
    check_targets_of,
    open_targets,
    packing_of,
    teacher_digest,
    write_targets,
)
from linearize.topk import TopK
from linearize.train import Batches


@dataclass(frozen=True)
class Targets:
    """The caches of one conversion, a folder for each stage that has `top_k`.

    Attributes:
        folder: that holds them.
        teacher: digest of the weights.
        text: fingerprint of the corpus.
        mixed_precision: in which the teacher runs.
    """

    folder: Path
    recipe: Recipe
    teacher: str
    text: str
    mixed_precision: Literal["no", "bf16"]

    def check(self) -> None:
        """See before the first stage that the caches of all stages are this teacher's, text's and recipe's.

        Raises:
            RunError: one is missing, or of something else. Whether it is whole is seen when it is read.
        """
        for index, config in enumerate(self.recipe.stages):
            key = self._key(config, index)
            if key is not None:
                check_targets_of(self._place(index), key)

    def read(self, stage: Stage, index: int, batches: Batches) -> Batches:
        """The stage's micro-batches with their targets; as they are where the stage asks the teacher itself.

        Raises:
            RunError: there is no whole cache of this teacher, text and packing.
        """
        key = self._key(stage.config, index)
        return batches if key is None else open_targets(self._place(index), key, batches)

    def write(self, stage: Stage, index: int, batches: Batches, console: Console) -> None:
        """Write what is missing of the stage's cache, if it has one; say what was done.

        Raises:
            RunError: the folder holds another cache, or cannot be written.
        """
        key = self._key(stage.config, index)
        if key is None:
            return
        assert isinstance(stage, Distil)
        device = stage.graft.model.device
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

        def answer(batch: Batch) -> TopK:
            with mixed:
                return stage.targets((with_starts(batch) if by_document else batch).to(device))

        place = self._place(index)
        with (
            console.status("Running the teacher") as status,
            softmax_by_document(stage.graft, self.mixed_precision) as by_document,
        ):
            count = write_targets(
                place, key, batches, answer, lambda done, of: status.update(f"Teacher targets: {done:,} of {of:,}")
            )
        size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        tokens = stage.config.steps * stage.config.batch * stage.config.length
        console.print(
            f"stages.{index}: wrote {count:,} of {key.micro_batches:,} micro-batches; {place} holds {size:,} bytes, "
            f"{size / tokens:.0f} a token.",
            highlight=False,
        )

    def _place(self, index: int) -> Path:
        return self.folder / f"stage{index}"

    def _key(self, config: StageConfig, index: int) -> TargetKey | None:
        if not isinstance(config, DistilConfig) or config.top_k is None:
            return None
        first_token = sum(earlier.tokens for earlier in self.recipe.stages[:index])
        return TargetKey(
            teacher=self.teacher,
            text=self.text,
            packing=packing_of(config, first_token, self.recipe.seed + index),
            micro_batches=config.steps * config.accumulation,
            top_k=config.top_k,
            temperature=config.temperature,
            precision=self.mixed_precision,
        )


def check_targets(recipe: Recipe) -> None:
    """Refuse a recipe that no cache of targets would serve.

    Raises:
        RecipeError: none of its stages has `top_k`.
    """
    if not any(isinstance(stage, DistilConfig) and stage.top_k for stage in recipe.stages):
        raise RecipeError(
            "no stage learns from cached targets", place="--targets", remedy="Give one `--set stages.N.top_k=64`."
        )


def targets_of(
    model: PreTrainedModel, recipe: Recipe, text: str, folder: str | Path, mixed_precision: Literal["no", "bf16"]
) -> Targets:
    """The caches of a conversion; to be called with the teacher as it was loaded, before any surgery."""
    return Targets(Path(folder), recipe, teacher_digest(model), text, mixed_precision)
