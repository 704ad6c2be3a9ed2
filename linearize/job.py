"""A conversion as it is asked for, the command line that repeats it, and what is refused before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from linearize.caching import check_targets
from linearize.data import check_documents, check_sources
from linearize.distributed import Split
from linearize.errors import RunError
from linearize.recipe import Recipe
from linearize.stages import refuse_base_training
from linearize.trackers import check_trackers
from linearize.train import check_budget


@dataclass(frozen=True)
class Conversion:
    """What to convert, how, and where to: the options of `linearize convert`."""

    model: str
    recipe: str = "hedgehog"
    out: str | Path = "out/student"
    data: str | Sequence[str] | None = None  # each SOURCE or SOURCE=WEIGHT
    text_field: str | None = None
    heldout: str | None = None
    tokens: int | str | None = None
    overrides: Sequence[str] = ()
    device: str | None = None
    resume: bool = False
    overwrite: bool = False
    quantize: str | None = None  # the teacher's weights: 4bit or 8bit
    targets: str | Path | None = None  # folder of cached teacher targets
    compile: bool = False  # the mixers, for training: faster on a GPU that waits for its launches
    graphs: bool = True  # on a GPU, micro-batches are replayed from CUDA graphs
    profile: bool = False  # a few steps of each stage, to run/profile
    stream_layers: bool = False  # frozen weights of a decoder layer are on the device only while it computes
    keep: int = 2  # checkpoints
    save_every: float = 120.0  # seconds, at most, between checkpoints
    split: str | None = None  # over processes: see SPLITS
    track: Sequence[str] = ()  # see TRACKERS

    def command(self) -> str:
        """The command line that repeats this conversion."""
        words = ["linearize", "convert", "--model", self.model, "--recipe", self.recipe]
        for source in [self.data] if isinstance(self.data, str) else self.data or ():
            words += ["--data", source]
        options = {"--text-field": self.text_field, "--heldout": self.heldout, "--tokens": self.tokens}
        for name, value in options.items():
            words += [] if value is None else [name, str(value)]
        for override in self.overrides:
            words += ["--set", override]
        words += [] if self.quantize is None else ["--quantize", self.quantize]
        words += [] if self.targets is None else ["--targets", str(self.targets)]
        words += [] if self.split is None else ["--split", self.split]
        words += ["--compile"] if self.compile else []
        words += [] if self.graphs else ["--no-graphs"]
        words += ["--stream-layers"] if self.stream_layers else []
        return shlex.join([*words, "--out", str(self.out)])


def check_job(job: Conversion, recipe: Recipe, split: Split) -> None:
    """Refuse a conversion whose parts contradict each other, before anything is loaded.

    Raises:
        RunError: a stage's budget is no step; a tracker is not there; layers cannot be streamed, or quantised.
        RecipeError: no stage reads the targets, or one trains what `quantize` rounds.
        DataError: local text that is not there, or whose beginning cannot be read.
    """
    check_budgets(recipe)
    check_text(job, recipe)
    if job.targets is not None:
        check_targets(recipe)
    if job.quantize is not None:
        refuse_base_training(recipe.stages)
        _check_quantised(split)
    check_trackers(job.track)
    if job.stream_layers:
        check_stream(recipe, split, quantized=job.quantize is not None)


def check_text(job: Conversion, recipe: Recipe) -> None:
    """Refuse local text that is not there, or whose first document cannot be read.

    Raises:
        DataError: naming it.
    """
    check_sources(job.data, job.text_field, recipe.data)
    if job.heldout is not None:
        check_documents(job.heldout, job.text_field)


def check_budgets(recipe: Recipe) -> None:
    """Refuse stages that would take no step.

    Raises:
        RunError: with the stage's number.
    """
    for index, stage in enumerate(recipe.stages):
        check_budget(stage, index)


def _check_quantised(split: Split) -> None:
    """Refuse to shard quantised weights."""
    if split == "fsdp":
        raise RunError(
            "quantised weights cannot be sharded over processes",
            place="--quantize",
            remedy="Leave it out, or use `--split data`.",
        )


def check_stream(recipe: Recipe, split: Split, *, quantized: bool) -> None:
    """Refuse to stream layers that train, that are quantised, or that processes shard.

    Raises:
        RunError: with the rule.
    """
    if recipe.needs_frozen_teacher:
        raise RunError(
            f"recipe {recipe.name} trains base weights; layers that train stay on the device",
            place="--stream-layers",
            remedy="Leave it out, or choose a recipe whose stages train mixers and adapters only.",
        )
    if quantized:
        raise RunError(
            "quantised weights stay where they were quantised",
            place="--stream-layers",
            remedy="Leave it out, or leave out --quantize.",
        )
    if split == "fsdp":
        raise RunError(
            "processes that shard the layers do not keep them in host memory too",
            place="--stream-layers",
            remedy="Leave it out, or use `--split data`.",
        )
