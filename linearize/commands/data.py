"""`linearize data`: let a teacher write training text, compare text with held-out text, look after the token cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from linearize.commands.options import DeviceOption, ModelOption, TextFieldOption, log_console, out_console

app = typer.Typer(no_args_is_help=True, help="Training text: let a teacher write it, check it, see what is cached.")


@app.command("generate")
def generate_text(
    model: ModelOption,
    tokens: Annotated[str, typer.Option(help="How much the teacher writes, such as 100k or 2M.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The parquet file; --data takes it.")],
    prompts: Annotated[
        str | None, typer.Option(help="What documents begin with: a .txt with a prompt a line, or text as in --data.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations: answers to --prompts, or to questions the teacher asks.")
    ] = False,
    start: Annotated[
        str | None, typer.Option(help="First token of texts without a prompt. Default: bos, such as <|im_start|>.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    length: Annotated[int, typer.Option(min=1, help="New tokens of a document, at most.")] = 1024,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Documents at one time. Default: what --tokens needs, at most 16, on a GPU 512."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: DeviceOption = None,
) -> None:
    """Let the teacher write text to convert it with. Killed at any moment, the same command goes on."""
    from linearize.data.generate import Generation, generate
    from linearize.data.writer import Sampling
    from linearize.recipe import read_tokens

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, length=length)
    job = Generation(model, out, read_tokens(tokens), sampling, prompts, chat, start, batch, device)
    with log_console.status("Loading the teacher") as status:
        found = generate(job, partial(log_console.print, highlight=False, markup=False), status.update)
    speed = f", {found.new_tokens / found.seconds:,.0f} tokens/s" if found.seconds else ""
    out_console.print(f"{found.out}: {found.documents:,} documents, {found.tokens:,} tokens{speed}.", highlight=False)


@app.command("recall")
def write_recall(
    model: ModelOption,
    tokens: Annotated[str, typer.Option(help="How much to write, such as 2M.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The parquet file; --data takes it.")],
    tasks: Annotated[str, typer.Option(help="Tasks of `linearize eval --recall`; they take turns.")] = "niah-2-like",
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of a document: those of a training row, which it then fills.")
    ] = 1024,
    text: Annotated[str | None, typer.Option(help="Prose for haystacks, as in --data.")] = None,
    text_field: TextFieldOption = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write questions about what lies far back, with their answers. They hide nothing that a test asks for."""
    from linearize.evals.bench import prose_of
    from linearize.evals.recall import find_tasks
    from linearize.evals.recall.texts import RecallTexts, write_recall_texts
    from linearize.recipe import read_tokens
    from linearize.teacher import load_tokenizer

    names = tuple(find_tasks([name.strip() for name in tasks.split(",")], "--tasks"))
    with log_console.status("Writing") as status:
        wanted = RecallTexts(names, length, read_tokens(tokens), seed, prose_of(text, text_field))
        documents = write_recall_texts(wanted, load_tokenizer(model), out, status.update)
    out_console.print(f"{out}: {documents:,} documents, {documents * length:,} tokens.", highlight=False)


@app.command("overlap")
def show_overlap(
    model: ModelOption,
    data: Annotated[list[str], typer.Option(help="Training text, as for convert.")],
    heldout: Annotated[str, typer.Option(help="Held-out text.")],
    tokens: Annotated[str, typer.Option(help="How much of the training text to compare.")] = "8M",
    text_field: TextFieldOption = None,
) -> None:
    """How much of a held-out text stands in the training text, in runs of 13 tokens. The model gives its tokenizer."""
    from linearize.data.overlap import compare_texts
    from linearize.data.report import overlap_report
    from linearize.recipe import read_tokens

    with log_console.status("Reading and tokenising"):
        found = compare_texts(model, data, heldout, read_tokens(tokens), text_field)
    out_console.print(overlap_report(found))


@app.command("cache")
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all tokens that are cached.")] = False,
    show: Annotated[bool, typer.Option("--show", help="List them (the default).")] = False,
) -> None:
    """Tokens kept on disk so that the same text is tokenised once. LINEARIZE_CACHE says where."""
    from linearize.data.cache import cached_corpora, clear_corpora
    from linearize.data.report import cache_report

    if show or not clear:
        out_console.print(cache_report(cached_corpora()))
    if clear:
        out_console.print(f"{clear_corpora() / 1e6:,.1f} MB freed.", highlight=False)
