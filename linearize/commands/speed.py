"""`linearize speed`: time a student beside its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.commands.options import DeviceOption, check_teacher_options, log_console, out_console


def speed(
    path: Annotated[Path, typer.Argument(help="The student's folder.")],
    lengths: Annotated[str, typer.Option(help="Context lengths, separated by commas; 1k is 1,024.")] = "512,1024",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at one time.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decoding steps that are timed at each length.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Prefills that are timed at each length.")] = 5,
    teacher: Annotated[
        str | None, typer.Option(help="What --model takes. Default: the teacher named in the student's metrics.json.")
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Time the student alone.")] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="Decode in CUDA graphs, where every model can be captured.")
    ] = True,
    device: DeviceOption = None,
) -> None:
    """Prefill and decoding of a student and its teacher by context length: time, memory, and where they cross.

    Every row goes to PATH/evals/speed.json as soon as it is measured; a length that does not fit is one of them.
    """
    from linearize.evals.speed import SpeedSettings, measure_speed
    from linearize.evaluate import parse_lengths, teacher_of
    from linearize.report.terminal import speed_report

    check_teacher_options(teacher, no_teacher)
    settings = SpeedSettings(
        lengths=tuple(sorted(set(parse_lengths(lengths)))), batch=batch, decode=decode, repeats=repeats, graphs=graphs
    )
    name = None if no_teacher else (teacher or teacher_of(path))
    rows = measure_speed(path, settings, name, device, lambda text: log_console.print(text, highlight=False))
    out_console.print(speed_report(rows))
