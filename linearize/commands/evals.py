"""`linearize eval`: a student beside its teacher."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from linearize.commands.options import DeviceOption, TextFieldOption, check_teacher_options, log_console, out_console
from linearize.errors import DataError


def evaluate(
    path: Annotated[str, typer.Argument(help="The student's folder.")],
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="Measure perplexity on it: .txt, .jsonl, .parquet or a folder. Also recall's prose."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Of windows and recall contexts, separated by commas; 1k is 1,024.")
    ] = "512,1024",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens read per source and length. Default: 8192, or the longest length."),
    ] = None,
    positions: Annotated[bool, typer.Option("--positions", help="Perplexity by position in the window, too.")] = False,
    recall: Annotated[
        str | None, typer.Option(help="Recall tasks, such as passkey,niah-1; [bold]all[/bold] runs every one.")
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Places of the needle, from first to last.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Questions a length and depth.")] = 10,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval's tasks, such as piqa,arc_easy; with --tasks-dir: which local ones.")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="A folder of local tasks, NAME.jsonl or NAME.jsonl.gz.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of each task.")] = None,
    scorer: Annotated[
        Literal["linearize", "lm-eval"], typer.Option(help="What scores the tasks of --tasks-dir.")
    ] = "linearize",
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Entropy, KL, monotonicity and error of every layer on a short text.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Also without the linear branch, without the window, and a plain window with sinks."
        ),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Positions, all recall tasks, diagnostics, and the probe of a hybrid.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="What --model takes. Default: the teacher named in the student's metrics.json.")
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure the student alone.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Rows go to OUT/evals. Default: the student's folder.")
    ] = None,
    text_field: TextFieldOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the perplexities to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the recall questions.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Measure a student beside its teacher: perplexity, recall, tasks, layers, branches.

    Repeat a command that was interrupted, or ask for more: what was measured is kept in OUT/evals/cells.
    """
    from linearize.evals.bench import Wanted
    from linearize.evals.tables import evaluation_report, perplexity_records
    from linearize.evaluate import evaluate as run_evaluation
    from linearize.evaluate import is_hybrid, parse_lengths, teacher_of
    from linearize.run_folder import write_json

    if not (text or recall or tasks or tasks_dir or diagnostics or everything):
        raise DataError(
            "says nothing to measure",
            place="linearize eval",
            remedy="Give --text, --recall, --tasks, --tasks-dir, --diagnostics or --all.",
        )
    chosen = tuple(dict.fromkeys(parse_lengths(lengths)))
    check_teacher_options(teacher, no_teacher)
    wanted = Wanted(
        folder=path,
        teacher=None if no_teacher else (teacher or teacher_of(path)),
        out=out or Path(path),
        text=text,
        text_field=text_field,
        lengths=chosen,
        max_tokens=max_tokens or max(8192, *chosen),
        positions=positions or (everything and text is not None),
        recall=tuple(recall.split(",")) if recall else (("all",) if everything else ()),
        depths=depths,
        samples=samples,
        tasks=tuple(tasks.split(",")) if tasks else (),
        tasks_dir=tasks_dir,
        limit=limit,
        scorer=scorer,
        diagnostics=diagnostics or (everything and not no_teacher),
        probe=probe or (everything and is_hybrid(path)),
        seed=seed,
        device=device,
        command=shlex.join(["linearize", *sys.argv[1:]]),
    )
    found = run_evaluation(wanted, lambda line: log_console.print(line, highlight=False, markup=False))
    if json_file is not None:
        write_json(json_file, perplexity_records(found["perplexity"]))
    out_console.print(evaluation_report(found))
    log_console.print(f"Rows: {wanted.out / 'evals'}", highlight=False, markup=False)
