"""The command line: parse, call, print. No logic."""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler
from rich.markup import escape

from linearize import __version__
from linearize.commands import recipes, report, speed
from linearize.commands.options import (
    DeviceOption,
    ModelOption,
    RecipeOption,
    SetOption,
    TextFieldOption,
    TokensOption,
    log_console,
    out_console,
)
from linearize.errors import LinearizeError, RunInterrupted

USER_ERROR, INTERRUPTED = 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Convert pretrained Hugging Face transformers into linear-attention students.\n\n"
    "Start with: [bold]linearize convert --model smollm2 --recipe hedgehog --tokens 150k --out out/student[/bold]",
)
app.add_typer(recipes.app, name="recipes")


@app.command()
def convert(
    model: ModelOption,
    recipe: RecipeOption = "hedgehog",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the student goes; a new folder.")] = Path(
        "out/student"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help="Training text: .parquet, .jsonl, .txt, a folder, or a Hub data set id. Default: the recipe's data "
            "set, or Python's own documentation when the Hub is out of reach."
        ),
    ] = None,
    text_field: TextFieldOption = None,
    heldout: Annotated[
        str | None, typer.Option(help="Text to measure on. Default: a part of the training text, kept aside.")
    ] = None,
    tokens: TokensOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a former run in --out first.")] = False,
    compile_mixers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the mixers for training; faster on many GPUs.")
    ] = False,
) -> None:
    """Convert a teacher into a student, train it, write it, and measure both.

    The result is an ordinary Hugging Face folder. Ctrl-C saves; the same command with --resume goes on.
    """
    from linearize.pipeline import Conversion
    from linearize.pipeline import convert as run_conversion
    from linearize.tables import conversion_report

    job = Conversion(
        model,
        recipe,
        out,
        data,
        text_field,
        heldout,
        tokens,
        tuple(overrides or ()),
        device,
        resume,
        overwrite,
        compile_mixers,
    )
    out_console.print(conversion_report(run_conversion(job, log_console)))


@app.command()
def plan(
    model: ModelOption,
    recipe: RecipeOption = "hedgehog",
    tokens: TokensOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Compare the untrained student with its teacher, layer by layer.")
    ] = False,
    text: Annotated[
        str | None, typer.Option(help="Text for --audit; default: a passage that comes with linearize.")
    ] = None,
) -> None:
    """Show what a conversion would replace and what it would cost here, measured on one batch. Writes nothing.

    With --audit, exit 1 when a layer's attention cannot be recomputed from the heads that the student sees.
    """
    from linearize.planning import plan_conversion
    from linearize.recipe import load_recipe
    from linearize.tables import plan_report

    checked = load_recipe(recipe, overrides or (), tokens)
    found = plan_conversion(model, checked, device, audited=audit or text is not None, text=text)
    out_console.print(plan_report(found))
    raise typer.Exit(1 if found.audit is not None and found.audit.misread else 0)


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="The student's folder or Hub id.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts; several are answered as one batch.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    beams: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    device: DeviceOption = None,
) -> None:
    """Let a student write."""
    from linearize.evals.samples import Sampling, generate_from_folder

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, beams=beams, seed=seed)
    for prompt, text in zip(prompts, generate_from_folder(path, prompts, sampling, chat, device), strict=True):
        out_console.print(f"[dim]{escape(prompt)}[/dim]" if not chat else "", end="", highlight=False)
        out_console.print(text, markup=False, highlight=False)


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(help="The student's folder.")],
    text: Annotated[str, typer.Option("--text", help="Text to measure on: .txt, .jsonl, .parquet or a folder.")],
    lengths: Annotated[str, typer.Option(help="Window lengths, separated by commas.")] = "512,1024",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens read per source and length.")] = 8192,
    teacher: Annotated[
        str | None, typer.Option(help="What --model takes. Default: the teacher named in the student's metrics.json.")
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure the student alone.")] = False,
    text_field: TextFieldOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    device: DeviceOption = None,
) -> None:
    """Perplexity of a student and its teacher on a text, by window length."""
    from linearize.evaluate import evaluate_folder, parse_lengths, teacher_of
    from linearize.run_folder import write_json
    from linearize.tables import perplexity_report

    name = None if no_teacher else (teacher or teacher_of(path))
    rows = evaluate_folder(
        path, text, parse_lengths(lengths), max_tokens=max_tokens, teacher=name, text_field=text_field, device=device
    )
    if json_file is not None:
        write_json(json_file, rows)
    out_console.print(perplexity_report(rows))


@app.command()
def doctor(
    path: Annotated[str, typer.Argument(help="A student's folder, or any causal language model's.")],
    device: Annotated[str, typer.Option()] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check that whole = chunked = token by token, padded = unpadded, reloaded = original. Exit 1 when one fails."""
    from linearize.doctor import examine_folder
    from linearize.tables import doctor_report, findings_json

    findings = examine_folder(path, device)
    if as_json:
        sys.stdout.write(json.dumps(findings_json(findings), indent=2) + "\n")
    else:
        out_console.print(doctor_report(findings))
    raise typer.Exit(0 if all(finding.passed for finding in findings) else 1)


app.command("speed")(speed.speed)
app.command("report")(report.report)


def _show_version(asked: bool) -> None:
    if asked:
        out_console.print(f"linearize {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    handler = RichHandler(console=log_console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def main() -> int:
    """Entry point: a user's error is one paragraph and exit code 2; an interrupted run says how to go on."""
    try:
        app()
    except LinearizeError as error:
        log_console.print(f"[bold red]error[/bold red] {escape(str(error))}", highlight=False)
        return USER_ERROR
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        remedy = "Nothing saved is lost: free space, then repeat the command with --resume."
        log_console.print(f"[bold red]error[/bold red] {escape(str(error))}. {remedy}", highlight=False)
        return USER_ERROR
    except RunInterrupted as stopped:
        log_console.print(escape(str(stopped)), highlight=False)
        return INTERRUPTED
    except KeyboardInterrupt:
        log_console.print("interrupted", highlight=False)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
