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
from linearize.commands import data as data_commands
from linearize.commands import evals, families, hub, recipes, report, speed, targets
from linearize.commands.options import (
    DeviceOption,
    ModelOption,
    QuantizeOption,
    RecipeOption,
    SetOption,
    TextFieldOption,
    TokensOption,
    log_console,
    loud_console,
    out_console,
)
from linearize.errors import LinearizeError, MainFailed, RunInterrupted, UnknownFamilyError

USER_ERROR, INTERRUPTED = 2, 130
_FREE_SPACE = "Nothing saved is lost: free space, then repeat the command, `convert` with --resume."
_ALLOW = "Choose another place, or give the rights that allow it."
SYSTEM_ERRORS = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: _ALLOW,
    errno.EIO: "The disk or its connection fails: see the system's log.",
}
"""What a user can do about errors of the operating system that nothing nearer to them has explained."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Convert pretrained Hugging Face transformers into linear-attention students.\n\n"
    "Start with: [bold]linearize convert --model smollm2 --recipe hedgehog --tokens 150k --out out/student[/bold]",
)


@app.command()
def convert(
    model: ModelOption,
    recipe: RecipeOption = "hedgehog",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the student goes; a new folder.")] = Path(
        "out/student"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training text: .parquet, .jsonl, .txt, a folder, or a Hub data set id; repeat it as SOURCE=WEIGHT to "
            "mix several. Default: the recipe's data set, or Python's own documentation when the Hub is out of reach."
        ),
    ] = None,
    text_field: TextFieldOption = None,
    heldout: Annotated[
        str | None, typer.Option(help="Text to measure on. Default: a part of the training text, kept aside.")
    ] = None,
    drop_overlap: Annotated[
        float | None,
        typer.Option(help="Drop training documents that share more than this (0 to 1) with held-out text."),
    ] = None,
    tokens: TokensOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a former run in --out first.")] = False,
    quantize: QuantizeOption = None,
    targets_folder: Annotated[
        Path | None, typer.Option("--targets", help="Cached teacher targets, for stages with top_k: see cache-targets.")
    ] = None,
    compile_mixers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the mixers for training; faster on many GPUs.")
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs/--no-graphs",
            help="On a GPU, record a micro-batch as a CUDA graph and replay it: small models wait less for Python. "
            "Takes the memory of one more micro-batch; left out where there is no room.",
        ),
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps of each stage into OUT/run/profile.")
    ] = False,
    stream_layers: Annotated[
        bool,
        typer.Option("--stream-layers", help="Keep frozen layers in host memory, on the GPU only while they compute."),
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="How many checkpoints stay.")] = 2,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between checkpoints, at most.")] = 120.0,
    split: Annotated[
        str | None,
        typer.Option(help="How several processes share the work: data, layers (in transfer) or fsdp. Default: data."),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Follow the run in tensorboard, wandb or trackio, offline by default; may be repeated."),
    ] = None,
    push: Annotated[str | None, typer.Option(help="owner/name on the Hub: upload the student when it is done.")] = None,
    private: hub.PrivateOption = None,
    accept_license: hub.AcceptLicenseOption = False,
) -> None:
    """Convert a teacher into a student, train it, write it, and measure both.

    The result is an ordinary Hugging Face folder. Ctrl-C saves; the same command with --resume goes on.
    """
    from linearize.job import Conversion
    from linearize.pipeline import convert as run_conversion
    from linearize.tables import conversion_report

    dropping = () if drop_overlap is None else (f"drop_overlap={drop_overlap}",)
    job = Conversion(
        model,
        recipe,
        out,
        tuple(data or ()),
        text_field,
        heldout,
        tokens,
        (*(overrides or ()), *dropping),
        device,
        resume,
        overwrite,
        quantize,
        targets_folder,
        compile_mixers,
        graphs,
        profile,
        stream_layers,
        keep,
        save_every,
        split,
        tuple(track or ()),
    )
    if push is not None:
        hub.check(push)
    out_console.print(conversion_report(run_conversion(job, log_console)))
    if push is not None:
        hub.push(out, push, private, accept_license=accept_license)


@app.command()
def plan(
    model: ModelOption,
    recipe: RecipeOption = "hedgehog",
    tokens: TokensOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Compare the untrained student with its teacher, layer by layer.")
    ] = False,
    text: Annotated[
        str | None, typer.Option(help="Text for --audit; default: a passage that comes with linearize.")
    ] = None,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Memory alone, from the model's config.json: no weights, no GPU are needed."),
    ] = False,
    stream_layers: Annotated[
        bool, typer.Option("--stream-layers", help="Predict with frozen layers in host memory.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Predict for so many processes, a GPU each; they need not be there.")
    ] = 1,
    split: Annotated[
        str | None, typer.Option(help="With --processes: how they share the work: data, layers or fsdp. Default: data.")
    ] = None,
) -> None:
    """Show what a conversion would replace and what it would cost here, measured on one batch. Writes nothing.

    With --audit, exit 1 when a layer's attention cannot be recomputed from the heads that the student sees.
    With --predict, what it would need on a GPU in bf16; --device cpu predicts fp32 on a CPU. --processes predicts it
    of each of several.
    """
    from linearize.planning import check_prediction_options, plan_conversion, predict_conversion, prediction_target
    from linearize.recipe import load_recipe
    from linearize.tables import plan_report, prediction_report

    checked = load_recipe(recipe, overrides or (), tokens)
    if predict or stream_layers or processes > 1 or split is not None:
        check_prediction_options(audit or text is not None, quantize)
        target = prediction_target(device, checked, stream_layers, processes, split)
        out_console.print(prediction_report(predict_conversion(model, checked, target, log_console)))
        return
    audited = audit or text is not None
    try:
        found = plan_conversion(model, checked, device, audited=audited, text=text, quantize=quantize)
    except UnknownFamilyError as error:
        out_console.print(error.proposal, markup=False, highlight=False)
        raise
    out_console.print(plan_report(found))
    raise typer.Exit(1 if found.audit is not None and found.audit.misread else 0)


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="The student's folder or Hub id (NAME@REVISION: a branch).")],
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


@app.command()
def doctor(
    path: Annotated[str, typer.Argument(help="A student's folder or Hub id, or what --model takes.")],
    device: Annotated[str, typer.Option()] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check that whole = chunked = token by token, padded = unpadded, reloaded = original. Exit 1 when one fails."""
    from linearize.doctor import examine_folder
    from linearize.tables import doctor_report, findings_json

    with log_console.status("Loading the model") as status:
        findings = examine_folder(path, device, status.update)
    if as_json:
        sys.stdout.write(json.dumps(findings_json(findings), indent=2) + "\n")
    else:
        out_console.print(doctor_report(findings))
    raise typer.Exit(0 if all(finding.passed for finding in findings) else 1)


app.command("eval")(evals.evaluate)
app.command("speed")(speed.speed)
app.command("report")(report.report)
app.command()(hub.push)
app.command("cache-targets")(targets.cache_targets)
app.command("families")(families.list_families)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data_commands.app, name="data")


def _show_version(asked: bool) -> None:
    if asked:
        out_console.print(f"linearize {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    handler = RichHandler(console=log_console, show_path=False, show_time=False)
    logging.basicConfig(
        level=logging.ERROR if log_console.quiet else logging.WARNING, format="%(message)s", handlers=[handler]
    )


def main() -> int:
    """Entry point: a user's error is one paragraph and exit code 2; an interrupted run says how to go on."""
    try:
        app()
    except MainFailed:
        return USER_ERROR  # the main process has said why
    except LinearizeError as error:
        loud_console.print(f"[bold red]error[/bold red] {escape(str(error))}", highlight=False)
        return USER_ERROR
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        said = f"{place}{error.strerror}. {SYSTEM_ERRORS[error.errno]}"
        loud_console.print(f"[bold red]error[/bold red] {escape(said)}", highlight=False)
        return USER_ERROR
    except RunInterrupted as stopped:
        log_console.print(escape(str(stopped)), highlight=False)
        return INTERRUPTED
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:  # typer turns Ctrl-C into an exit
            raise
        log_console.print(
            "interrupted; what was finished is kept: repeat the command, `convert` with --resume", highlight=False
        )
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
