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
    data: Annotated[str | None, typer.Option(help="Training text, as for convert.")] = None,
    text_field: TextFieldOption = None,
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

    job = Conversion(
        model,
        recipe,
        data=data,
        text_field=text_field,
        tokens=tokens,
        overrides=tuple(overrides or ()),
        device=device,
        quantize=quantize,
        targets=targets,
    )
    run(job, log_console)
