"""`linearize report`: the page of a run, or of several side by side."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from linearize.commands.options import log_console, out_console


def report(
    paths: Annotated[list[Path], typer.Argument(help="The --out folder of a conversion; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page. Default: report/index.html in the run's folder, or here for several."
        ),
    ] = None,
) -> None:
    """Write one HTML page of a run, ended or not: opens from disk, needs no network. Several runs are compared.

    report.json and, where matplotlib is installed, a PNG file of every chart lie beside the page.
    """
    from linearize.report import write_report

    images = find_spec("matplotlib") is not None
    if not images:
        log_console.print(
            "No PNG files: matplotlib is not installed (pip install 'linearize\\[report]').", highlight=False
        )
    out_console.print(str(write_report(paths, out, images=images)), highlight=False, soft_wrap=True)
