"""The public functions. They forward to the modules that do the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import linearize.modeling  # noqa: F401 - registers the classes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from linearize.measuring import Converted
    from linearize.recipe import Recipe

# What a function needs is imported when it is called: `import linearize` is what loading a student needs, no more.

__all__ = ["convert", "load_recipe", "load_student"]


# More parameters than the style allows: they are the options of `linearize convert`, one for one.
def convert(
    model: str,
    *,
    recipe: str = "hedgehog",
    out: str | Path = "out/student",
    data: str | Sequence[str] | None = None,
    text_field: str | None = None,
    heldout: str | None = None,
    tokens: int | str | None = None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quantize: str | None = None,
    targets: str | Path | None = None,
    compile: bool = False,
    graphs: bool = True,
    profile: bool = False,
    stream_layers: bool = False,
    keep: int = 2,
    save_every: float = 120.0,
    split: str | None = None,
    track: Sequence[str] = (),
    quiet: bool = False,
) -> "Converted":
    """Convert a teacher into a linear-attention student and measure both.

    Args:
        model: a known name (`smollm2`, `llama`, `mistral`), a Hub id, a folder or a `.gguf` file; `owner/name@revision`
            is one branch, tag or commit of a model on the Hub.
        recipe: a shipped recipe's name or the path of a YAML file.
        out: where the student and its run go.
        data: training text: parquet, jsonl, txt, a folder or a Hub data set; None takes the recipe's default. A list
            mixes several, each as `SOURCE` or `SOURCE=WEIGHT`.
        text_field: the column that holds the text.
        heldout: text to measure on; None keeps some of the training text aside.
        tokens: total training tokens, such as `"150k"`; None takes the recipe's budgets.
        overrides: settings such as `"stages.0.tokens=2M"`.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`; None takes a GPU when there is one.
        resume: go on with an interrupted run in `out`.
        overwrite: delete a former run in `out`.
        quantize: load the teacher's weights in `"4bit"` or `"8bit"` (needs bitsandbytes).
        targets: folder of cached teacher targets, for stages with `top_k`; see `linearize cache-targets`.
        compile: compile the mixers for training; faster on many GPUs.
        graphs: on a GPU, replay micro-batches from CUDA graphs where each is the same work.
        profile: trace a few steps of each stage into `out/run/profile`.
        stream_layers: keep frozen layers in host memory, on the GPU only while they compute.
        keep: how many checkpoints stay.
        save_every: seconds between checkpoints, at most.
        split: how the processes of `accelerate launch` or torchrun share the work: `"data"`, `"layers"` or `"fsdp"`.
        track: of `"tensorboard"`, `"wandb"` and `"trackio"`; offline unless the environment says otherwise.
        quiet: print nothing.

    Raises:
        LinearizeError: (a ValueError) for all that the caller can mend.
    """
    from rich.console import Console

    from linearize.job import Conversion
    from linearize.pipeline import convert as run_conversion

    job = Conversion(
        model=model,
        recipe=recipe,
        out=out,
        data=data,
        text_field=text_field,
        heldout=heldout,
        tokens=tokens,
        overrides=tuple(overrides),
        device=device,
        resume=resume,
        overwrite=overwrite,
        quantize=quantize,
        targets=targets,
        compile=compile,
        graphs=graphs,
        profile=profile,
        stream_layers=stream_layers,
        keep=keep,
        save_every=save_every,
        split=split,
        track=tuple(track),
    )
    return run_conversion(job, Console(stderr=True, quiet=quiet))


def load_recipe(recipe: str, overrides: Sequence[str] = (), tokens: int | str | None = None) -> "Recipe":
    """Read and check a recipe by name or path; see `linearize.recipe.load_recipe`.

    Raises:
        RecipeError: with file, line, key and the nearest known name.
    """
    from linearize.recipe import load_recipe as load

    return load(recipe, overrides, tokens)


def load_student(folder: str | Path, dtype: "torch.dtype | str" = "auto", device: str = "cpu") -> "PreTrainedModel":
    """Load a student, refusing weights that do not fit its config; see `linearize.export.load_student`.

    Raises:
        RunError: for a folder that holds no student, and for missing, unexpected or misshapen weights.
    """
    from linearize.export import load_student as load

    return load(folder, dtype, device)
