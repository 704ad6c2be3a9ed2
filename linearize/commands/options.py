"""Options and consoles that several commands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from linearize.errors import RunError

_FOLLOWS = os.environ.get("RANK", "0") != "0"  # one of several processes speaks for all, unless it fails alone
out_console = Console(quiet=_FOLLOWS)
log_console = Console(stderr=True, quiet=_FOLLOWS)
loud_console = Console(stderr=True)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A known name (smollm2, llama, mistral), a Hub id, a folder or a .gguf. NAME@REVISION: a branch, tag or "
        "commit of a model on the Hub.",
    ),
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe ([bold]linearize recipes list[/bold]) or a YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one recipe value, such as stages.0.tokens=2M; may be repeated."),
]
TokensOption = Annotated[
    str | None,
    typer.Option(help="Total training tokens, such as 150k or 8M, split over the stages as the recipe does."),
]
QuantizeOption = Annotated[
    str | None, typer.Option(help="Load the teacher's weights in 4bit or 8bit; needs bitsandbytes.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU is taken when there is one.")]
TextFieldOption = Annotated[str | None, typer.Option(help="The column of the text in parquet, jsonl or a data set.")]


def check_teacher_options(teacher: str | None, no_teacher: bool) -> None:
    """Refuse a teacher that is named and left out.

    Raises:
        RunError: both are asked for.
    """
    if teacher is not None and no_teacher:
        raise RunError("contradicts --no-teacher", place="--teacher", remedy="Leave one of them out.")
