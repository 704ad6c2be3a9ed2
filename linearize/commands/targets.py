"""`linearize cache-targets`: run the teacher once, ahead of the distillations that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.commands.options import (
    DeviceOption,
    ModelOption,
    QuantizeOption,
    RecipeOption,
    SetOption,
    TextFieldOption,
    TokensOption,
    log_console,
)


def cache_targets(
    model: ModelOption,
    targets: Annotated[Path, typer.Option("--targets", help="Where they go; what is there already is kept.")],
    recipe: RecipeOption = "hedgehog",
    data: Annotated[
        list[str] | None, typer.Option(help="Training text, as for convert; may be repeated as SOURCE=WEIGHT.")
    ] = None,
    text_field: TextFieldOption = None,
    heldout: Annotated[
        str | None,
        typer.Option(help="Text to measure on, as for convert: none is kept aside from the training text then."),
    ] = None,
    drop_overlap: Annotated[
        float | None, typer.Option(help="Drop documents that share more than this with held-out text, as for convert.")
    ] = None,
    tokens: TokensOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Write the teacher's likeliest tokens for every stage that has top_k, such as with --set stages.1.top_k=64.

    Give the options that convert will get; with --targets it then trains without running the teacher.
    """
    from linearize.job import Conversion
    from linearize.pipeline import cache_targets as run

    dropping = () if drop_overlap is None else (f"drop_overlap={drop_overlap}",)
    job = Conversion(
        model,
        recipe,
        data=tuple(data or ()),
        text_field=text_field,
        heldout=heldout,
        tokens=tokens,
        overrides=(*(overrides or ()), *dropping),
        device=device,
        quantize=quantize,
        targets=targets,
    )
    run(job, log_console)
